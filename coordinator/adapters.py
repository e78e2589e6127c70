"""Published adapters as PEFT folders: configuration, tensors under PEFT's names, and a model card.

The canonical form is exported: one rank r for all modules, or one for each where a share of the energy is asked for, and
alpha = r, so that the scale is 1 and every loader agrees on it. The cut to a rank is the best one: the first r columns of b and
rows of a, where the global adapter's directions are in falling order, and they are put in it where its strategy keeps other
factors, as they were for the slices. In the first case a folder of one rank computes what a device computes with the slice of that
rank. One module is in memory at a time.
"""

from __future__ import annotations

import json
import math
import shutil
import zipfile
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from coordinator import aggregation, sizes
from coordinator.cards import Facts, card
from coordinator.reading import SliceReader
from coordinator.readout import Wanted, leading, read_out, singular
from protocol import errors
from protocol.contents import WIRE_NAMES, Header, names
from protocol.plan import Dtype, Layout, Plan, SequenceClassification
from protocol.slices import Factors, numbers

CARD, CONFIG, NUMBERS = "README.md", "adapter_config.json", "adapter_model.safetensors"
BLOCK = 1 << 20  # bytes copied at a time
PREFIX = "base_model.model."  # what PEFT puts before every name of the base model
OLDEST = (1980, 1, 1, 0, 0, 0)  # the first moment that a zip archive can name


def write(plan: Plan, facts: Facts, adapter: SliceReader, wanted: Wanted, folder: Path) -> None:
    """The PEFT folder of a global adapter (a slice of scale 1), read out: the same bytes for the same input, module by module.

    Raises InvalidPlan if the plan was never resolved, MismatchedSlice if the slice is not the plan's adapter.
    """
    layout = _layout(plan, adapter.header)
    kept = adapter.factors if _is_singular(plan) else lambda module: singular(adapter.factors(module))
    found = read_out({module: partial(kept, module) for module in layout.modules}, adapter.header.label.rank, wanted)
    size = _write_numbers(folder / NUMBERS, layout, found.ranks, kept, adapter.full)
    (folder / CONFIG).write_text(json.dumps(config(plan, layout, found.ranks), indent=2, sort_keys=True) + "\n", "utf-8")
    (folder / CARD).write_text(card(plan, facts, found, size), "utf-8")


def _layout(plan: Plan, header: Header) -> Layout:
    layout = sizes.layout(plan)
    shapes = {name: entry.shape for name, entry in header.entries.items()}
    if header.label.scale != 1.0 or shapes != names(layout, header.label.rank):
        raise errors.MismatchedSlice(
            f"these bytes are not the global adapter of plan {plan.name!r}: other tensors, or a scale that is not 1"
        )
    return layout


def _is_singular(plan: Plan) -> bool:
    """Whether the adapter is known to be in singular form; it is not where nobody can say any more how its strategy keeps it."""
    return plan.strategy.name in aggregation.names() and aggregation.load(plan.strategy.name).singular


def _write_numbers(
    path: Path, layout: Layout, ranks: Mapping[str, int], kept: Callable[[str], Factors], full: Callable[[str], Tensor]
) -> int:
    """PEFT's safetensors file, as that library writes it: float32 tensors by name. Gives its length."""
    shapes: dict[str, tuple[int, ...]] = {PREFIX + name: tuple(shape) for name, shape in layout.full.items()}
    sources: dict[str, Callable[[], Tensor]] = {PREFIX + name: partial(full, name) for name in layout.full}
    # A module's factors follow each other in the file.
    both = lru_cache(maxsize=1)(lambda module: leading(kept(module), ranks[module]))
    for module, (n_out, n_in) in layout.modules.items():
        for side, shape in (("A", (ranks[module], n_in)), ("B", (n_out, ranks[module]))):
            name = f"{PREFIX}{module}.lora_{side}.weight"
            shapes[name], sources[name] = shape, partial(_side, both, module, side)
    with path.open("wb") as file:
        file.write(_head(shapes))
        for name in sorted(sources):
            file.write(numbers(sources[name](), dtype=Dtype.float32))
        return file.tell()


def _side(both: Callable[[str], Factors], module: str, side: str) -> Tensor:
    found = both(module)
    return found.a if side == "A" else found.b


def _head(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """A safetensors header of float32 tensors in the order of their names."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in sorted(shapes.items()):
        end = offset + Dtype.float32.size * math.prod(shape)
        table[name] = {"dtype": WIRE_NAMES[Dtype.float32], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def archive(folder: Path, into: BinaryIO) -> None:
    """A zip archive of the folder's files, the same bytes for the same files on every machine; float numbers are not worth compressing."""
    with zipfile.ZipFile(into, "w", zipfile.ZIP_STORED) as packed:
        for path in sorted(folder.iterdir()):
            entry = zipfile.ZipInfo(path.name, OLDEST)
            entry.create_system = 3  # Unix, whatever the machine is
            entry.external_attr = 0o644 << 16
            entry.file_size = path.stat().st_size
            with path.open("rb") as file, packed.open(entry, "w") as target:
                shutil.copyfileobj(file, target, BLOCK)


def config(plan: Plan, layout: Layout, ranks: Mapping[str, int]) -> dict[str, object]:
    """PEFT's adapter_config.json, for one rank per module; those below the largest stand in its patterns.

    Modules stand under their full names. PEFT adapts a module whose name is one of them, or ends with one of them after a
    dot; so exactly these, unless one module's full name is the end of another's.
    """
    largest = max(ranks.values())
    smaller = {module: rank for module, rank in ranks.items() if rank < largest}
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if isinstance(plan.task, SequenceClassification) else "CAUSAL_LM",
        "base_model_name_or_path": plan.model.id,
        "revision": plan.model.revision,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": plan.adapter.dropout,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "target_modules": list(layout.modules),
        "modules_to_save": heads(layout) or None,
    }


def heads(layout: Layout) -> list[str]:
    """The modules trained in full: for each tensor the largest module around it that holds nothing of what is adapted.

    PEFT wraps and saves them whole, and for classifiers adds the head by its usual name, so a part of it must not be named.
    """
    adapted = {prefix for module in layout.modules for prefix in _prefixes(module)}
    found = [next((p for p in _prefixes(name.rpartition(".")[0]) if p not in adapted), "") for name in layout.full]
    return sorted({name for name in found if name})


def _prefixes(name: str) -> list[str]:
    """a, a.b, a.b.c of a.b.c."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
