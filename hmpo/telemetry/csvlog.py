"""Telemetry as CSV: columns in the order of the table, values typed by it."""

import contextlib
import csv
import gzip
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hmpo.errors import TelemetryError
from hmpo.telemetry.field import Field
from hmpo.telemetry.fields import FIELDS
from hmpo.telemetry.lookup import lookup, lookup_trl
from hmpo.telemetry.records import decode, encode

_FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
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
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = csv_header(rows)
    writer.writerow(header)
    for record in rows:
        writer.writerow([_cell(record.get(name)) for name in header])
    return text.getvalue()


def read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any] | TelemetryError]]:
    """Line number and record of each row, or what is wrong with that row.

    Columns of the table have its types; other columns are numbers where they look so, else texts.

    Raises:
        TelemetryError: the file cannot be read or has no header.
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise TelemetryError(f"{path}: cannot be read: {error}") from None
    reader = csv.reader(io.StringIO(text, newline=""))
    header = next(reader, None)
    if not header:
        raise TelemetryError(f"{path}: empty, expected a line of column names")
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
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value)  # every digit, and nan, inf, -inf
    return str(value) if isinstance(value, int) else encode({"": value})[4:-1]


def _value(name: str, cell: str) -> Any:
    row = lookup(name) or lookup_trl(name)
    if row is None or row.kind == "any":
        return _guess(cell)
    return _typed(row, name, cell)


def _typed(row: Field, name: str, cell: str) -> Any:
    match row.kind:
        case "str":
            return cell
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
    return cell if value is None else value


def _number(cell: str) -> int | float | None:
    with contextlib.suppress(ValueError):
        return int(cell)
    with contextlib.suppress(ValueError):
        return float(cell)
    return None


def is_csv(path: Path) -> bool:
    """Whether the name says CSV, packed or not."""
    return path.name.lower().endswith((".csv", ".csv.gz"))
