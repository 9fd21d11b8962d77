"""Rows of other people's files: JSONL, JSON, CSV, Parquet and Arrow, each also through gzip.

What a file is is seen from what is in it, never from its name. Parquet and Arrow need pyarrow.
"""

import csv
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hmpo.config.formats import file_kind
from hmpo.errors import MissingDependencyError, TaskError, byte_size

FORMS = "JSONL, JSON, CSV, Parquet or Arrow"
GZIP = b"\x1f\x8b"
STREAM = b"\xff\xff\xff\xff"
"""How an Arrow stream begins, the form in which `datasets` keeps its files."""
LARGEST = 8 * 2**30
"""Bytes that a file may come to when it is unpacked."""
SEPARATORS = ",;\t|"

Row = tuple[str, dict[str, Any]]
"""Where a row stands (file and line), and its values by column."""


def read_file(path: str) -> list[Row]:
    """All rows of a file.

    Raises:
        TaskError: one line with the file, and the line where there is one.
        MissingDependencyError: Parquet or Arrow without pyarrow.
    """
    data = _bytes(path)
    if data.startswith(GZIP):
        data = _unpacked(data, path)
    if data.startswith((b"PAR1", b"ARROW1", STREAM)):
        table = _table(data, path)
        return [(f"{path}, row {n}", row) for n, row in enumerate(table.to_pylist(), 1)]
    kind = file_kind(data)
    if kind is not None:
        raise TaskError(f"task.options: {path} is {kind}, expected {FORMS}; convert it")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise TaskError(
            f"task.options: cannot read {path}: it is not UTF-8 text, expected {FORMS}"
        ) from None
    begin = text.lstrip()[:1]
    if not begin:
        raise TaskError(f"task.options: {path} is empty, expected {FORMS}")
    if begin == "[":
        return list(_of_array(text, path))
    return list(_of_lines(text, path) if begin == "{" else _of_csv(text, path))


def pyarrow(what: str) -> Any:
    """pyarrow, or how to get it.

    Raises:
        MissingDependencyError: one line that names the extra.
    """
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise MissingDependencyError(f"{what} needs pyarrow: pip install 'hmpo[data]'") from None
    return pyarrow


def _bytes(path: str) -> bytes:
    try:
        place = Path(path).expanduser()
        if place.exists() and not (place.is_file() or place.is_dir()):
            raise TaskError(f"task.options: {path} is no regular file; give {FORMS}")
        return place.read_bytes()
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        hint = ""
        if isinstance(error, FileNotFoundError) and path.count("/") == 1:
            hint = f"; a data set of a hub is task.options.dataset = {path!r}"
        raise TaskError(f"task.options: cannot read {path}: {reason}{hint}") from None


def _unpacked(data: bytes, path: str) -> bytes:
    """What a gzip file holds, which may be several parts, up to `LARGEST` bytes."""
    parts, size = [], 0
    while data:
        unpacker = zlib.decompressobj(16 + zlib.MAX_WBITS)
        try:
            part = unpacker.decompress(data, LARGEST - size + 1)
        except zlib.error as error:
            raise TaskError(f"task.options: {path} is damaged ({error}); pack it anew") from None
        size += len(part)
        if size > LARGEST:
            raise TaskError(
                f"task.options: {path} unpacks to more than {byte_size(LARGEST)}; split it"
            )
        if not unpacker.eof:
            raise TaskError(f"task.options: {path} is cut short; get it again")
        parts.append(part)
        data = unpacker.unused_data.lstrip(b"\0")
    return b"".join(parts)


def _table(data: bytes, path: str) -> Any:
    """A Parquet or Arrow file as a table."""
    arrow = pyarrow(f"task.options: {path}")
    source = arrow.BufferReader(data)
    try:
        if data.startswith(b"PAR1"):
            return arrow.parquet.read_table(source)
        if data.startswith(STREAM):
            return arrow.ipc.open_stream(source).read_all()
        return arrow.ipc.open_file(source).read_all()
    except (arrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise TaskError(f"task.options: {path} is damaged ({reason}); get it again") from None


def _of_lines(text: str, path: str) -> Iterator[Row]:
    """One JSON object a line."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TaskError(
                f"{where}: not JSON ({error}); write one object a line, or an array of objects"
            ) from None
        yield where, _object(row, where)


def _of_array(text: str, path: str) -> Iterator[Row]:
    """A JSON array of objects."""
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"task.options: {path} is not JSON ({error}); mend it") from None
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        yield where, _object(row, where)


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise TaskError(f"{where}: got a {type(row).__name__}, expected an object")
    return row


def _of_csv(text: str, path: str) -> Iterator[Row]:
    """A table with a line of names; its separator is the one that this line has most of."""
    first = text.split("\n", 1)[0]
    separator = max(SEPARATORS, key=first.count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    names: list[str] = []
    try:
        for cells in rows:
            where = f"{path}, line {rows.line_num}"
            if not any(cells):
                continue
            if not names:
                names = [name.strip() for name in cells]
                if len(set(names)) < len(names):
                    raise TaskError(f"{where}: two columns have one name; rename one")
                continue
            if len(cells) != len(names):
                raise TaskError(
                    f"{where}: got {len(cells)} cells, expected {len(names)}, one for each of "
                    f"{', '.join(names)[:200]}"
                )
            yield where, {name: cell or None for name, cell in zip(names, cells)}
    except csv.Error as error:
        raise TaskError(
            f"{path}, line {rows.line_num}: not CSV ({error}); quote it, or take JSONL"
        ) from None
