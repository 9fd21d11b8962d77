"""Telemetry as CSV: columns in the order of the table, values typed by it.

A text that a spreadsheet would take for a formula gets an apostrophe in front, which `read_csv`
takes away again.
"""

import contextlib
import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hmpo.errors import TelemetryError
from hmpo.telemetry.field import Field
from hmpo.telemetry.fields import FIELDS
from hmpo.telemetry.lookup import lookup, lookup_trl
from hmpo.telemetry.reading import lines
from hmpo.telemetry.records import decode, encode

_FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
"""Texts that a spreadsheet would run, and those that look like ours in front of them."""
_ORDER = {row.name: i for i, row in enumerate(FIELDS)}


def csv_header(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """The columns that these records need, in the order of the table; TRL's names are left out.

    Members of a family, such as `reward/<function>/mean`, stand by name at its place.
    """
    names = dict.fromkeys(name for record in records for name in record)
    known = {name: row for name in names if (row := lookup(name)) is not None}
    return sorted(known, key=lambda name: (_ORDER[known[name].name], name))


def to_csv(records: Iterable[Mapping[str, Any]]) -> str:
    """Records as CSV text; a missing value is an empty cell."""
    rows = list(records)
    header = csv_header(rows)
    return table_csv(header, ([record.get(name) for name in header] for record in rows))


def table_csv(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Any table as CSV text, cells with commas, quotes and line ends quoted, formulas defused."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_cell(name) for name in header])
    writer.writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue()


def read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any] | TelemetryError]]:
    """Line number and record of each row, or what is wrong with that row.

    Columns of the table have its types; other columns are numbers where they look so, else texts.

    Raises:
        TelemetryError: the file cannot be read or has no header.
    """
    try:
        text = b"".join(line for _, line in lines(path)).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TelemetryError(f"{path}: cannot be read: {error}") from None
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        header = [_told(name) for name in next(reader, [])]
        if not header:
            raise TelemetryError(f"{path}: empty, expected a line of column names")
        yield from _rows(reader, header)
    except csv.Error as error:
        raise TelemetryError(f"{path}, line {reader.line_num}: {error}") from None


def _rows(reader: Any, header: list[str]) -> Iterator[tuple[int, dict[str, Any] | TelemetryError]]:
    """The rows below the header."""
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(header):
            message = f"{len(cells)} cells, expected {len(header)} as in the header"
            yield reader.line_num, TelemetryError(message)
            continue
        try:
            pairs = {name: _value(name, cell) for name, cell in zip(header, cells) if cell != ""}
        except ValueError as error:  # a TelemetryError is one, too
            yield reader.line_num, TelemetryError(str(error))
            continue
        yield reader.line_num, pairs


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        text = value.encode("utf-8", "backslashreplace").decode()  # lone surrogates
        return f"'{text}" if _FORMULA.match(text) else text
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value)  # every digit, and nan, inf, -inf
    return str(value) if isinstance(value, int) else encode({"": value})[4:-1]


def _told(cell: str) -> str:
    """A text as it was before `_cell` defused it."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _value(name: str, cell: str) -> Any:
    row = lookup(name) or lookup_trl(name)
    if row is None or row.kind == "any":
        return _guess(cell)
    return _typed(row, name, cell)


def _typed(row: Field, name: str, cell: str) -> Any:
    match row.kind:
        case "str":
            return _told(cell)
        case "bool":
            if cell.strip().lower() not in _FLAGS:
                raise ValueError(f"{name}: got {cell!r}, expected {row.expected}")
            return _FLAGS[cell.strip().lower()]
        case "object" | "floats":
            return decode(f'{{"":{cell}}}')[""]
    value = _number(cell)
    if value is None:
        raise ValueError(f"{name}: got {cell!r}, expected {row.expected}")
    if row.kind == "float":
        return float(value)
    return int(value) if float(value).is_integer() else value


def _guess(cell: str) -> Any:
    if cell.strip().lower() in ("true", "false"):
        return _FLAGS[cell.strip().lower()]
    value = _number(cell)
    return _told(cell) if value is None else value


def _number(cell: str) -> int | float | None:
    digits = cell.strip().lstrip("+-")
    if len(digits) > 308 and digits.isdecimal():
        raise ValueError(f"an integer of {len(digits)} digits, a float holds 308")
    with contextlib.suppress(ValueError):
        return int(cell)
    with contextlib.suppress(ValueError):
        return float(cell)
    return None


def is_csv(path: Path) -> bool:
    """Whether the name says CSV, packed or not."""
    return path.name.lower().endswith((".csv", ".csv.gz"))
