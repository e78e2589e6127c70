"""Numbers and times as people read them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from admin import words


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (999, "999 B"), (999.6, "1 kB"), (1234, "1.23 kB"), (45_600_000, "45.6 MB"), (1_234_000_000_000, "1234 GB")],
)
def test_bytes(count: float, said: str) -> None:
    assert words.size(count) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (None, "–"),
        (0, "0 s"),
        (0.0421, "0.042 s"),
        (9.94, "9.9 s"),
        (9.97, "10 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations(seconds: float | None, said: str) -> None:
    assert words.duration(seconds) == said


def test_moments_are_in_utc() -> None:
    assert words.moment(None) == "never"
    assert words.moment(datetime(2026, 5, 1, 1, 2, 3, tzinfo=UTC)) == "2026-05-01 01:02:03 UTC"
    assert words.moment(datetime(2026, 5, 1, 1, 2, 3, tzinfo=timezone(timedelta(hours=2)))) == "2026-04-30 23:02:03 UTC"


def test_shares_metrics_ranks_and_labels() -> None:
    assert (words.share(None), words.share(0.99234)) == ("–", "99.2 %")
    assert words.metrics({"loss": 0.43, "accuracy": 0.8125}) == "accuracy 0.8125, loss 0.43"
    assert words.ranks({8: 3, 2: 1}) == "2×1 8×3"
    assert words.kept({8: 1.0, 2: 0.71}) == "2:71% 8:100%"
    assert words.digest(f"sha256:{10**63}") == "sha256:100000000000…"
    assert words.labels({"site": "north", "class": "phone"}) == "class=phone site=north"


@pytest.mark.parametrize(("ranks", "said"), [([8, 8], "rank 8 in 2 modules"), ([1, 8, 2], "ranks 1 to 8, 3.667 on average, in 3 modules")])
def test_ranks_of_modules(ranks: list[int], said: str) -> None:
    assert words.spread(ranks) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("phone, größer, 电话", "phone, größer, 电话"),
        ("\x1b]0;mine\x07", r"\x1b]0;mine\x07"),
        ("a\nb\tc\x9b8m", r"a\nb\tc\x9b8m"),
        ("\u202egpj", r"\u202egpj"),
    ],
)
def test_what_no_terminal_shall_obey_is_shown(text: str, said: str) -> None:
    assert words.printable(text) == said
