"""Finished adapters: fetched as PEFT folders, or merged into the weights of their base model."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Annotated, BinaryIO

import typer

from admin import words
from admin.command import AsJson, answer, connect, group
from admin.download import save
from admin.naming import Run, run_id
from protocol import errors
from protocol.messages import BlobRef
from protocol.plan import Plan, SequenceClassification
from protocol.strict import Strict

app = group("Fetch what a run has made.")
ADAPTER, MODEL = "adapter_config.json", "model*.safetensors"  # a file by which the one and the other kind of folder is known


class Pulled(Strict):
    """What was written, and where."""

    run: str
    folder: str
    files: dict[str, BlobRef]
    ranks: dict[str, int]


@app.command()
def pull(
    ctx: typer.Context,
    run: Run,
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder to write to; it is made if it is not there")],
    rank: Annotated[int | None, typer.Option(help="most directions of a module; by default the rank of the global adapter", min=1)] = None,
    kept: Annotated[float | None, typer.Option(help="as few directions as hold this share of each module's energy: 0.99 for 99 %")] = None,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="with --kept: one rank for all modules, and the share of all their energy")
    ] = False,
    round: Annotated[int | None, typer.Option(help="by default the newest published round", min=0)] = None,
    merged: Annotated[bool, typer.Option("--merged", help="merge it into the base model's weights and write those")] = False,
    as_json: AsJson = False,
) -> None:
    """Fetch a published adapter as a PEFT folder, at a rank or a share of its energy; or the base model with that merged in."""
    _refuse_another_kind(out, merged)
    with connect(ctx) as client, TemporaryFile() as packed:
        id = run_id(client, run)
        with client.adapter(id, round=round, rank=rank, kept=kept, uniform=uniform or None) as download:
            save(download, packed)
        ranks = _merge(packed, client.run(id).plan, out) if merged else unpack(packed, out)
    files = {file.name: _named(file) for file in sorted(out.iterdir()) if file.is_file()}
    written = [f"{out / name}  {words.size(file.bytes)}" for name, file in files.items()]
    answer(Pulled(run=id, folder=str(out), files=files, ranks=ranks), as_json, "\n".join([*written, words.spread(ranks.values())]))


def _refuse_another_kind(out: Path, merged: bool) -> None:
    """Whoever loads a folder with files of both kinds gets the adapter a second time, on weights that hold it already.

    Raises InvalidRequest.
    """
    if any(out.glob(ADAPTER if merged else MODEL)):
        held, asked = ("an adapter", "a whole model") if merged else ("a whole model", "an adapter")
        raise errors.InvalidRequest(f"{out} holds {held}, and {asked} is asked for; name another folder, or empty this one")


def unpack(packed: BinaryIO, folder: Path) -> dict[str, int]:
    """Write an archive's files; gives each module's rank.

    Raises InvalidRequest where the folder cannot be written, HLoRAError for names that lead out of it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(packed) as archive:
            for name in archive.namelist():
                if name != Path(name).name or name in ("", ".", ".."):
                    raise errors.HLoRAError(
                        f"the coordinator's archive has a file {name!r}, which is no plain name; nothing more was written"
                    )
                with archive.open(name) as source, (folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
            return _ranks(archive.read("adapter_config.json"))
    except (zipfile.BadZipFile, KeyError, ValueError):
        raise errors.HLoRAError("the coordinator did not answer with an adapter in a zip archive; is HLORA_URL right?") from None
    except OSError as error:
        raise errors.InvalidRequest(f"{folder} cannot be written: {error.strerror}") from None


def _ranks(config: bytes) -> dict[str, int]:
    """Each module's rank, as PEFT reads it: those that the pattern does not name have the one of all."""
    found = json.loads(config)
    return {module: found["rank_pattern"].get(module, found["r"]) for module in found["target_modules"]}


def _named(file: Path) -> BlobRef:
    with file.open("rb") as stream:
        return BlobRef(digest="sha256:" + hashlib.file_digest(stream, "sha256").hexdigest(), bytes=file.stat().st_size)


def _merge(packed: BinaryIO, plan: Plan, out: Path) -> dict[str, int]:
    try:
        from modelling import export
    except ModuleNotFoundError as error:
        raise errors.InvalidRequest(f"--merged needs {error.name}, which is not installed here; install HLoRA's extra `agent`") from None
    labels = plan.task.labels if isinstance(plan.task, SequenceClassification) else ()
    with TemporaryDirectory() as folder:
        ranks = unpack(packed, Path(folder))
        export.merge_into_base(Path(folder), out, labels=labels, model=plan.model)
    return ranks
