"""Finished adapters: fetched as PEFT folders, or merged into the weights of their base model."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from admin import words
from admin.command import AsJson, answer, connect, group
from admin.naming import Run, run_id
from protocol import errors
from protocol.messages import BlobRef
from protocol.plan import Plan, SequenceClassification
from protocol.strict import Strict

app = group("Fetch what a run has made.")


class Pulled(Strict):
    """What was written, and where."""

    run: str
    folder: str
    files: dict[str, BlobRef]


@app.command()
def pull(
    ctx: typer.Context,
    run: Run,
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder to write to; it is made if it is not there")],
    rank: Annotated[int | None, typer.Option(help="by default the rank of the global adapter", min=1)] = None,
    round: Annotated[int | None, typer.Option(help="by default the newest published round", min=0)] = None,
    merged: Annotated[bool, typer.Option("--merged", help="merge it into the base model's weights and write those")] = False,
    as_json: AsJson = False,
) -> None:
    """Fetch a published adapter as a PEFT folder, cut to a rank; or the base model with the adapter merged in."""
    with connect(ctx) as client:
        id = run_id(client, run)
        packed = client.adapter(id, round, rank)
        plan = client.run(id).plan
    if merged:
        _merge(packed, plan, out)
    else:
        unpack(packed, out)
    files = {file.name: _named(file) for file in sorted(out.iterdir()) if file.is_file()}
    written = "\n".join(f"{out / name}  {words.size(file.bytes)}" for name, file in files.items())
    answer(Pulled(run=id, folder=str(out), files=files), as_json, written)


def unpack(packed: bytes, folder: Path) -> None:
    """Write an archive's files. Raises InvalidRequest where the folder cannot be written, HLoRAError for names that lead out of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            for name in archive.namelist():
                if name != Path(name).name or name in ("", ".", ".."):
                    raise errors.HLoRAError(
                        f"the coordinator's archive has a file {name!r}, which is no plain name; nothing more was written"
                    )
                (folder / name).write_bytes(archive.read(name))
    except zipfile.BadZipFile:
        raise errors.HLoRAError("the coordinator did not answer with a zip archive; is HLORA_URL right?") from None
    except OSError as error:
        raise errors.InvalidRequest(f"{folder} cannot be written: {error.strerror}") from None


def _named(file: Path) -> BlobRef:
    with file.open("rb") as stream:
        return BlobRef(digest="sha256:" + hashlib.file_digest(stream, "sha256").hexdigest(), bytes=file.stat().st_size)


def _merge(packed: bytes, plan: Plan, out: Path) -> None:
    try:
        from modelling import export
    except ModuleNotFoundError as error:
        raise errors.InvalidRequest(f"--merged needs {error.name}, which is not installed here; run pip install 'hlora[agent]'") from None
    labels = plan.task.labels if isinstance(plan.task, SequenceClassification) else ()
    with TemporaryDirectory() as folder:
        unpack(packed, Path(folder))
        export.merge_into_base(Path(folder), out, labels=labels, model=plan.model)
