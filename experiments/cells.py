"""What stands in a table's cells: numbers with their intervals, differences, and settings in a line."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from experiments.intervals import Interval, interval
from experiments.summary import BySeed

NONE = "–"


def told(values: BySeed, form: Callable[[float], str] = "{:.3f}".format) -> str:
    """A mean with its interval; without, where all seeds say the same."""
    if not values:
        return NONE
    found = interval(list(values.values()))
    return form(found.mean) + (f" ± {form(found.half)}" if found.half else "")


def signed(found: Interval | None) -> str:
    """A difference with its interval, in bold where it is one."""
    if found is None:
        return NONE
    text = f"{found.mean:+.3f}".replace("-", "−") + ("" if found.half is None else f" ± {found.half:.3f}")
    return f"**{text}**" if found.apart else text


def arrived(values: Mapping[int, float | None], form: Callable[[float], str]) -> str:
    """The mean of when runs were somewhere, if all of them ever were: the mean of those that were would flatter."""
    there = {seed: value for seed, value in values.items() if value is not None}
    if len(there) == len(values):
        return NONE if not there else form(interval(list(there.values())).mean)
    return f"in {len(there)} of {len(values)}" if there else "never"


def complete(values: Mapping[int, float | None]) -> BySeed:
    """The values, if no seed lacks one."""
    there = {seed: value for seed, value in values.items() if value is not None}
    return there if len(there) == len(values) else {}


def settings(value: object) -> str:
    """Settings as TOML writes them in a line."""
    match value:
        case bool():
            return str(value).lower()
        case dict():
            return ", ".join(
                f"{key} = {{ {settings(x)} }}" if isinstance(x, dict) else f"{key} = {settings(x)}" for key, x in value.items()
            )
        case list():
            return f"[{', '.join(map(settings, value))}]"
        case str():
            return f'"{value}"'
        case _:
            return str(value)
