"""Finding a base model's files, and telling base models apart."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelling import base
from modelling.checkpoint import fingerprint, folder
from protocol import errors
from protocol.plan import Model
from tests.modelling.drawn import CLASSES


@pytest.fixture
def place(encoder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(encoder, tmp_path / "copy"))


def test_a_copy_has_the_same_fingerprint(encoder: Path, place: Path) -> None:
    assert fingerprint(place) == fingerprint(encoder)


def test_the_fingerprint_does_not_depend_on_how_tensors_are_spread_over_files(encoder: Path, place: Path) -> None:
    tensors = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:7]}, place / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file({name: tensors[name] for name in names[7:]}, place / "model-00002-of-00002.safetensors")
    assert fingerprint(place) == fingerprint(encoder)


def test_the_fingerprint_does_not_depend_on_the_software_that_wrote_the_configuration_or_on_labels(encoder: Path, place: Path) -> None:
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({"id2label": {"0": "no"}, **config, "transformers_version": "0.0.1"}))
    assert fingerprint(place) == fingerprint(encoder)


def test_one_bit_of_the_weights_changes_the_fingerprint(encoder: Path, place: Path) -> None:
    tensors = load_file(place / "model.safetensors")
    changed = tensors["embeddings.word_embeddings.weight"].view(torch.int32)
    changed[3, 5] ^= 1
    save_file(tensors, place / "model.safetensors")
    assert fingerprint(place) != fingerprint(encoder)


def test_a_setting_that_changes_what_the_model_computes_changes_the_fingerprint(encoder: Path, place: Path) -> None:
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    assert fingerprint(place) != fingerprint(encoder)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize(
    "damaged",
    [
        lambda _: POINTER,
        lambda _: b"",
        lambda whole: whole[:100],
        lambda whole: whole[:-2],
        lambda _: b"\x02\0\0\0\0\0\0\0[]",
        lambda _: b"[]",
    ],
    ids=["pointer", "empty", "cut", "cut at the end", "another header", "no object"],
)
def test_a_model_of_which_a_file_is_no_longer_whole_is_refused_by_its_name(
    place: Path, name: str, damaged: Callable[[bytes], bytes]
) -> None:
    file = place / name
    file.write_bytes(damaged(file.read_bytes()))
    for question in (lambda: fingerprint(place), lambda: base.load(Model(id=str(place)), CLASSES)):
        with pytest.raises(errors.ModelRefusal) as refused:
            question()
        assert refused.value.detail == f"{file} is incomplete, damaged or a Git-LFS pointer: fetch the model again"


def test_memory_that_runs_out_is_not_blamed_on_the_model(place: Path) -> None:
    tensors = load_file(place / "model.safetensors")
    del tensors["embeddings.word_embeddings.weight"]  # what a checkpoint does not carry is made anew, here with 128 TB
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"vocab_size": 10**12}))
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        base.load(Model(id=str(place)), CLASSES)


@pytest.fixture
def packages(tmp_path: Path) -> Iterator[Path]:
    """A place from which packages can be imported, for one test."""
    sys.path.insert(0, str(tmp_path))
    yield tmp_path
    sys.path.remove(str(tmp_path))


def test_weights_that_a_package_carries_are_found(encoder: Path, packages: Path) -> None:
    home = packages / "carries_weights"
    shutil.copytree(encoder, home / "model")
    (home / "__init__.py").write_text("from pathlib import Path\ndef get_model_path():\n    return Path(__file__).parent / 'model'\n")
    assert folder(Model(id="package:carries_weights")) == home / "model"


def test_a_package_without_weights_is_not_even_imported(packages: Path) -> None:
    home = packages / "does_harm"
    home.mkdir()
    (home / "__init__.py").write_text("raise AssertionError('a plan made this run')")
    with pytest.raises(errors.ModelRefusal, match="carries no safetensors"):
        folder(Model(id="package:does_harm"))


def test_a_package_that_does_not_say_where_its_weights_are_is_refused(encoder: Path, packages: Path) -> None:
    shutil.copytree(encoder, packages / "says_nothing")
    (packages / "says_nothing" / "__init__.py").touch()
    with pytest.raises(errors.ModelRefusal, match="has no get_model_path"):
        folder(Model(id="package:says_nothing"))


@pytest.mark.parametrize(
    ("id", "advice"),
    [
        ("/no/such/folder", "put the model there"),
        ("package:not_installed_here", "pip install"),
        ("package:os.path", "not installed"),
        ("two words", "neither a folder here nor a hub id"),
        ("nobody/no-such-model", "name its path"),
    ],
)
def test_a_model_that_is_not_there_is_refused_with_advice(id: str, advice: str) -> None:
    with pytest.raises(errors.ModelRefusal, match=advice):
        folder(Model(id=id))


def test_a_folder_without_safetensors_is_refused(place: Path) -> None:
    (place / "model.safetensors").rename(place / "pytorch_model.bin")
    with pytest.raises(errors.ModelRefusal, match=r"no \*\.safetensors"):
        folder(Model(id=str(place)))
