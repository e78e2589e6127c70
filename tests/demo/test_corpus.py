"""The corpus: real text of what is installed, honestly divided."""

from __future__ import annotations

import re
import tomllib
from collections import defaultdict

import pytest

from demo import corpus
from demo.departments import Row


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return corpus.collect(12)


def test_every_family_gives_its_texts(rows: list[Row]) -> None:
    known = tomllib.loads(corpus.FAMILIES.read_text("utf-8"))["packages"]
    counts: defaultdict[str, int] = defaultdict(int)
    for row in rows:
        counts[row.label] += 1
    assert counts.keys() == known.keys()
    assert all(12 <= count < 12 + corpus.PER_FILE for count in counts.values())


def test_the_same_packages_give_the_same_corpus(rows: list[Row]) -> None:
    assert corpus.collect(12) == rows


def test_no_two_texts_share_a_run_of_five_words(rows: list[Row]) -> None:
    seen: dict[tuple[str, ...], str] = {}
    for row in rows:
        words = re.findall(r"[a-z0-9]+", row.text.lower())
        for run in zip(*(words[n:] for n in range(5)), strict=False):
            assert seen.setdefault(run, row.text) == row.text


def test_no_file_is_both_trained_on_and_held_out(rows: list[Row]) -> None:
    files = {part: {row.source for row in rows if row.held_out is part} for part in (False, True)}
    assert files[False]
    assert files[True]
    assert files[False].isdisjoint(files[True])


def test_no_text_names_a_package(rows: list[Row]) -> None:
    giveaways = set(tomllib.loads(corpus.FAMILIES.read_text("utf-8"))["giveaways"]["words"])
    assert all(giveaways.isdisjoint(re.findall(r"[a-z0-9_]+", row.text.lower())) for row in rows)


def test_texts_are_of_a_length_that_can_be_read_at_a_glance(rows: list[Row]) -> None:
    assert all(9 <= len(row.text.split()) <= 36 for row in rows)


def test_markup_goes_and_its_content_stays() -> None:
    doc = "Give the :class:`~shop.till.Receipt` of a **paid** basket to ``print_out``, or to the `printer`_ that stands nearest."
    assert corpus.prose(doc) == "Give the Receipt of a paid basket to print_out, or to the printer that stands nearest."


def test_roles_with_a_title_keep_the_title() -> None:
    doc = "Ask the :ref:`manual <how_to_ask>` how a basket is paid before you ask anybody else here."
    assert corpus.prose(doc) == "Ask the manual how a basket is paid before you ask anybody else here."


def test_only_two_paragraphs_of_prose_before_the_first_section_are_kept() -> None:
    doc = """Count the baskets in the shop

    Empty ones count as well.

    A third paragraph.

    Parameters
    ----------
    shop : Shop
    """
    assert corpus.prose(doc) == "Count the baskets in the shop. Empty ones count as well."


def test_long_texts_are_cut_after_36_words() -> None:
    assert corpus.prose("word " * 50) == " ".join(["word"] * 36)


@pytest.mark.parametrize(
    "doc",
    [
        "Too short to say anything.",
        ">>> basket = Basket()\n>>> basket.pay()\n>>> basket.is_empty() and nothing else to see here at all",
        "@param basket: a basket, which is to be paid before it may be taken out of the shop",
        "f(x) = 3 * x ** 2 + 4 * x - 7; g(x) = f(x) / (1 + x ** 2) for all x >= 0, x != 1",
    ],
)
def test_what_is_no_prose_gives_no_text(doc: str) -> None:
    assert corpus.prose(doc) is None
