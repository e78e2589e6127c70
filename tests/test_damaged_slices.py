"""The slice's reader under damaged slices: refusals and nothing else, of what a fuzzer once found worth keeping and of anything new."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.damage import mutate, seeds
from benchmarks.fuzz import read_corpus, write_corpus
from benchmarks.scrutiny import examine
from protocol import errors

CORPUS = Path(__file__).parent / "corpus" / "slices.txt"
EVERY_END = {None, errors.MalformedSlice, errors.MismatchedSlice, errors.NonFiniteSlice, errors.ExcessiveChange}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "slice"


def test_whatever_the_fuzzer_kept_is_refused_or_counts(file: Path) -> None:
    assert {examine(data, file) for data in [*seeds(), *read_corpus(CORPUS)]} == EVERY_END


def test_a_thousand_damaged_slices_end_in_every_way_that_is_known(file: Path) -> None:
    ends = Counter(examine(damaged(Random(number), 1 + number % 3), file) for number in range(1500))
    assert set(ends) == EVERY_END


@given(chance=st.randoms(use_true_random=False), times=st.integers(1, 6))
@settings(max_examples=300, deadline=None)
def test_any_damaged_slice_is_refused_or_counts(chance: Random, times: int, file: Path) -> None:
    assert examine(damaged(chance, times), file) in EVERY_END


@given(start=st.binary(max_size=64), rest=st.binary(max_size=64))
@settings(max_examples=200, deadline=None)
def test_any_bytes_at_all_are_refused(start: bytes, rest: bytes, file: Path) -> None:
    for data in (start, len(start).to_bytes(8, "little") + start + rest):
        assert examine(data, file) is errors.MalformedSlice


def test_a_corpus_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", [b"longer", b"", *seeds()])
    assert read_corpus(tmp_path / "corpus") == sorted([b"longer", b"", *seeds()], key=lambda data: (len(data), data))


def damaged(chance: Random, times: int) -> bytes:
    """A real slice, mutated so often."""
    data = chance.choice(seeds())
    for _ in range(times):
        data = mutate(data, chance)
    return data
