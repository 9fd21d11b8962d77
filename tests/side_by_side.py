"""The tables of docs/coming-from.md, as code spans by row and cell."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "coming-from.md"


def rows() -> list[list[list[str]]]:
    """The code spans of each cell of the page's tables: hmpo, TRL, verl, prime-rl."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    cells = [line.strip("|").split("|") for line in lines if line.startswith("| `")]
    return [[re.findall(r"`([^`]+)`", cell) for cell in row] for row in cells]
