"""Numbers, times and what others wrote, as people read them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from datetime import UTC, datetime


def printable(text: str) -> str:
    """A text of somebody else's on one line: what is no character to be seen as `ascii()` shows it, so that no terminal obeys it."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def json_text(text: str) -> str:
    """A JSON text with whatever a terminal might obey escaped; it says the same to a program."""
    return "".join(character if character.isprintable() or character == "\n" else json.dumps(character)[1:-1] for character in text)


def size(count: float) -> str:
    """Bytes: 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            break
        count /= 1000
    return f"{count:.3g} {unit}" if count < 999.5 else f"{count:.0f} {unit}"


def duration(seconds: float | None) -> str:
    """Seconds: 0.42 s, 12 s, 3 min 20 s, 2 h 5 min; a dash for none."""
    if seconds is None:
        return "–"
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def moment(time: datetime | None) -> str:
    """A time of the coordinator's clock, in UTC."""
    return "never" if time is None else time.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def metrics(values: Mapping[str, float]) -> str:
    """accuracy 0.8125, loss 0.43"""
    return ", ".join(f"{name} {value:.4g}" for name, value in sorted(values.items()))


def share(value: float | None) -> str:
    """Per cent: 99.2 %; a dash for none."""
    return "–" if value is None else f"{100 * value:.3g} %"


def labels(values: Mapping[str, str]) -> str:
    """class=phone site=north"""
    return " ".join(f"{key}={value}" for key, value in sorted(values.items()))


def ranks(counts: Mapping[int, int]) -> str:
    """2×1 8×3: rank × how many clients."""
    return " ".join(f"{rank}×{count}" for rank, count in sorted(counts.items()))


def spread(ranks: Collection[int]) -> str:
    """rank 8 in 24 modules; ranks 1 to 8, 3.25 on average, in 24 modules"""
    smallest, largest = min(ranks), max(ranks)
    if smallest == largest:
        return f"rank {largest} in {len(ranks)} modules"
    return f"ranks {smallest} to {largest}, {sum(ranks) / len(ranks):.4g} on average, in {len(ranks)} modules"


def kept(values: Mapping[int, float]) -> str:
    """2:71% 8:99%: the share of the energy that each rank keeps."""
    return " ".join(f"{rank}:{100 * value:.3g}%" for rank, value in sorted(values.items()))


def digest(value: str) -> str:
    """sha256:0123456789ab…: enough of a digest to tell it from others."""
    return f"{value[:19]}…"
