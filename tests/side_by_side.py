"""The tables of docs/coming-from.md, as code spans by row and cell."""

import dataclasses
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "coming-from.md"


def rows() -> list[list[list[str]]]:
    """The code spans of each cell of the page's tables: hmpo, TRL, verl, prime-rl."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    cells = [line.strip("|").split("|") for line in lines if line.startswith("| `")]
    return [[re.findall(r"`([^`]+)`", cell) for cell in row] for row in cells]


def has_field(config: Any, path: str) -> bool:
    """Whether a dotted path leads to a field."""
    first, _, rest = path.partition(".")
    names = {field.name for field in dataclasses.fields(config)}
    return first in names and (not rest or has_field(getattr(config, first), rest))
