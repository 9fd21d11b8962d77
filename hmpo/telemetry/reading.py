"""What others wrote, read within bounds: lines, JSON and packed files that nobody can vouch for.

A packed log of a few megabytes may unpack to many gigabytes, a number may have more digits than
a float can hold, and lists may be nested deeper than Python can follow. Each is refused with one
line before it costs memory or ends in a traceback.
"""

import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hmpo.errors import TelemetryError

MOST_LINE = 16 * 2**20
"""Bytes of the longest line that is read."""
MOST_UNPACKED = 2**30
"""Bytes of memory, by `_cost`, that the records of one packed log may take."""
DEEPEST = 64
"""Levels of lists and mappings within each other."""

_IMMENSE = re.compile(r"\d{300}")


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a file, unpacked where its name ends in .gz.

    Raises:
        TelemetryError: not readable, a line beyond `MOST_LINE`, or a packed file beyond
            `MOST_UNPACKED`.
    """
    packed = path.suffix == ".gz"
    spent = 0
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            for number in itertools.count(1):
                line = file.readline(MOST_LINE + 1)
                if not line:
                    return
                if len(line) > MOST_LINE:
                    raise TelemetryError(
                        f"{path}, line {number}: longer than {MOST_LINE // 2**20} MiB, expected "
                        "one record a line"
                    )
                spent += _cost(line) if packed else 0
                if spent > MOST_UNPACKED:
                    raise TelemetryError(
                        f"{path}: takes more than {MOST_UNPACKED // 2**30} GiB of memory unpacked "
                        f"(at line {number}); if you trust it, gunzip it and give the plain file"
                    )
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise TelemetryError(f"{path}: cannot be read: {reason(error)}") from None


def _cost(line: bytes) -> int:
    """Bytes of memory, roughly, that the line takes once it is read."""
    parts = sum(line.count(sign) for sign in (b",", b":", b"[", b"{"))
    return 512 + len(line) + 64 * parts


def reason(error: Exception) -> str:
    """What the system says is wrong, without its number and without the path again."""
    told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return told[:1].lower() + told[1:]


def loads(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: no JSON, NaN or Infinity, an integer beyond the range of a float, or nested
            beyond `DEEPEST`.
    """
    try:
        if isinstance(text, bytes | bytearray):
            text = text.decode(json.detect_encoding(text), "surrogatepass")
        whole = _whole if len(text) > 300 and _IMMENSE.search(text) else None
        value = json.loads(text, parse_constant=_refuse_constant, parse_int=whole)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEEPEST} levels") from None
    if text.count("[") + text.count("{") > DEEPEST:
        _measure(value, DEEPEST)
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f'{name} is not JSON; write it as a text, "nan"')


def _whole(digits: str) -> int:
    if len(digits.lstrip("-")) > 308:
        raise ValueError(f"an integer of {len(digits.lstrip('-'))} digits, a float holds 308")
    return int(digits)


def _measure(value: Any, left: int) -> None:
    if isinstance(value, dict | list):
        if left == 0:
            raise ValueError(f"nested deeper than {DEEPEST} levels")
        for item in value.values() if isinstance(value, dict) else value:
            _measure(item, left - 1)
