"""Settings as a TOML file, each guess with its reason behind it."""

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

WIDTH = 100
"""Characters of a line at most, as far as values allow."""
COLUMN = 34
"""Where short comments begin."""
BARE = re.compile(r"[A-Za-z0-9_-]+")


def written(tables: Mapping[str, Any], comments: Mapping[str, str], head: str) -> str:
    """The text of a TOML file.

    Args:
        tables: settings as nested plain values; tables that are empty are left out.
        comments: by dotted name, what is said about a setting.
        head: comment above all of them, in lines.

    Returns:
        Text that `tomllib` reads as `tables`.
    """
    lines = [f"# {line}".rstrip() for line in head.splitlines()]
    lines += _settings(_values(tables), "", comments)
    for name, table in tables.items():
        if isinstance(table, Mapping):
            lines += _table(name, table, comments)
    return "\n".join(lines) + "\n"


def _table(name: str, table: Mapping[str, Any], comments: Mapping[str, str]) -> Iterator[str]:
    """A table, those right inside of it with more than two entries as tables of their own."""
    own = {k: v for k, v in table.items() if isinstance(v, Mapping) and len(v) > 1}
    rest = {k: v for k, v in table.items() if k not in own}
    if rest:
        yield from ("", f"[{_key(name)}]")
        yield from _settings(rest, f"{name}.", comments)
    for key, inner in own.items():
        yield from ("", f"[{_key(name)}.{_key(key)}]")
        yield from _settings(inner, f"{name}.{key}.", comments)


def _values(tables: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in tables.items() if not isinstance(v, Mapping)}


def _settings(values: Mapping[str, Any], path: str, comments: Mapping[str, str]) -> Iterator[str]:
    """Lines of settings; a comment that does not fit behind its value stands above it."""
    for key, value in values.items():
        line = f"{_key(key)} = {literal(value)}"
        comment = comments.get(f"{path}{key}", "")
        if isinstance(value, Mapping) and not comment:
            comment = next(
                (comments[n] for k in value if (n := f"{path}{key}.{k}") in comments), ""
            )
        whole = f"{line.ljust(COLUMN - 1)} # {comment}"
        if comment and len(whole) > WIDTH:
            yield from textwrap.wrap(
                comment, WIDTH, initial_indent="# ", subsequent_indent="# ",
                break_long_words=False, break_on_hyphens=False,
            )  # fmt: skip
        yield whole if comment and len(whole) <= WIDTH else line


def literal(value: Any) -> str:
    """A plain value as TOML has it, on one line.

    Raises:
        TypeError: TOML has no such value, such as None.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_key(key)} = {literal(item)}" for key, item in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    raise TypeError(type(value).__name__)


def _number(value: float) -> str:
    """A number as people write it: `1e-5`, `0.05`."""
    mantissa, _, power = f"{value:e}".partition("e")
    short = f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    small = value != 0 and abs(value) < 1e-3
    return short if small and float(short) == value else repr(value)


def _key(key: str) -> str:
    return key if BARE.fullmatch(key) else literal(key)
