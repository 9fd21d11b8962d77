"""Values of a suite's or a protocol's file, each refused in one line that names its place."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from hmpo.errors import ConfigError, require

MOST_SEEDS = 100_000
"""Seeds of one cell: more is a slip of the pen."""


def refuse_unknown(table: Mapping[str, Any], known: Iterable[str], place: str) -> None:
    """Refuse a key that nothing would read.

    Args:
        table: what was given.
        known: the keys there are.
        place: dotted name of the table; "" at the top.

    Raises:
        ConfigError: one line with the nearest key.
    """
    known = list(known)
    for key in table:
        if key not in known:
            name = f"{place}.{key}" if place else str(key)
            raise ConfigError(f"{name}: unknown; {nearest(key, known)}")


def nearest(name: object, known: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest known one, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {close[0]}?" if close else f"one of {', '.join(known) or 'none'}"


def a_table(value: Any, place: str) -> dict[str, Any]:
    """The value, which must be a table with texts as keys."""
    fits = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    require(fits, place, value, "a table")
    return dict(value)


def a_list(value: Any, place: str, what: str = "a list") -> list[Any]:
    """The value, which must be a list."""
    require(isinstance(value, list | tuple), place, value, what)
    return list(value)


def a_text(value: Any, place: str, form: str = r"(?s).*", expected: str = "a text") -> str:
    """The value, which must be a text of a form."""
    require(isinstance(value, str) and bool(re.fullmatch(form, value)), place, value, expected)
    return value


def a_number(value: Any, place: str, low: float | int, high: float | int) -> float:
    """The value, which must be a number in [low, high)."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    require(number and low <= value < high, place, value, f"a number in [{low:g}, {high:g})")
    return float(value)


def a_count(value: Any, place: str, least: int = 1) -> int:
    """The value, which must be an integer of at least `least`."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
    require(whole, place, value, f"an integer >= {least}")
    return value


def seeds_of(value: Any, place: str) -> tuple[int, ...]:
    """Seeds from a list, or from `{ first, count }`.

    Raises:
        ConfigError: no seed, one twice, or one that is no seed.
    """
    form = "a list of integers >= 0, or { first = 100, count = 20 }"
    if isinstance(value, Mapping):
        refuse_unknown(value, ("first", "count"), place)
        require(len(value) == 2, place, dict(value), form)
        first = a_count(value["first"], f"{place}.first", 0)
        count = a_count(value["count"], f"{place}.count")
        require(count <= MOST_SEEDS, f"{place}.count", count, f"at most {MOST_SEEDS}")
        require(first < 2**62, f"{place}.first", first, "an integer of 64 bits")
        return tuple(range(first, first + count))
    seeds = a_list(value, place, form)
    for seed in seeds:
        whole = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**63
        require(whole, place, seed, form)
        require(seeds.count(seed) == 1, place, seed, "each seed once")
    require(0 < len(seeds) <= MOST_SEEDS, place, seeds, form)
    return tuple(seeds)
