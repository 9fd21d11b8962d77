"""`dotted.key=value` settings over a file's: all of them hold, whatever their order."""

import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from hmpo.errors import ConfigError, require

DEEPEST = 32
"""Tables and lists inside each other that a configuration may have."""
SHOWN = 60
"""Characters of an override that a message repeats."""


def apply_overrides(data: dict[str, Any], items: Iterable[str]) -> None:
    """Set each `dotted.key=value` in nested tables; of one key given twice the later holds.

    Whole tables come first, then `objective.member`, then what is inside them, so that nothing that
    was given is lost to the order. A member starts the objective afresh: bounds that a file gave
    for another one, perhaps in another unit, do not carry over.

    Args:
        data: the tables, changed in place.
        items: the overrides; a value is TOML, or else taken as a string.

    Raises:
        ConfigError: one line that names the override.
    """
    for keys, value, item in sorted(map(_parsed, items), key=lambda one: _rank(one[0])):
        if keys == ("objective", "member"):
            data["objective"] = {}
        table = data
        for name in keys[:-1]:
            inner = table.setdefault(name, {})
            known = isinstance(inner, dict)
            require(known, "--set", item, f"{name} to be a table, which it is not")
            table = inner
        table[keys[-1]] = value


def overridden(items: Iterable[str]) -> set[str]:
    """The dotted names that overrides set, with spaces taken off."""
    return {".".join(_parsed(item)[0]) for item in items}


def _rank(keys: tuple[str, ...]) -> float:
    return 1.5 if keys == ("objective", "member") else float(len(keys))


def _parsed(item: str) -> tuple[tuple[str, ...], Any, str]:
    """Names, value and the item as a message shows it."""
    key, sign, text = item.partition("=")
    shown = item if len(item) <= SHOWN else item[:SHOWN] + "..."
    require(bool(sign) and bool(key.strip()), "--set", shown, "dotted.key=value")
    keys = tuple(name.strip() for name in key.split("."))
    require(len(keys) <= DEEPEST, "--set", shown, f"at most {DEEPEST} names in a dotted key")
    try:
        given = tomllib.loads(f"value = {text}")
    except ValueError:
        given = {"value": text.strip()}
    except RecursionError:
        raise ConfigError(f"--set: got {shown!r}, expected a value that is less nested") from None
    require(len(given) == 1, "--set", shown, "one value")
    return keys, given["value"], shown


def refuse_deep(data: Any) -> None:
    """Refuse what is nested deeper than any setting is, before anything walks into it.

    Raises:
        ConfigError: one line.
    """
    level = [data]
    for _ in range(DEEPEST + 1):
        level = [inner for value in level for inner in _inside(value)]
        if not level:
            return
    raise ConfigError(f"nested too deeply: expected at most {DEEPEST} tables in each other")


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else ()
