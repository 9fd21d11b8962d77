"""Which runs of a suite are wanted: `--only` and `--seeds`."""

import re
from collections.abc import Iterable, Sequence

from hmpo.errors import ConfigError
from hmpo.lab.suite.cells import ROLES, Cell
from hmpo.lab.suite.checked import MOST_SEEDS, nearest

_RANGE = re.compile(r"(\d{1,18})(?:-(\d{1,18}))?")


def chosen_cells(cells: Sequence[Cell], only: Iterable[str]) -> list[Cell]:
    """The cells that `--only` asks for; all of them if it asks for nothing.

    Args:
        cells: of the suite.
        only: names of cells, and `factor=level,level` (or `role=main`). A cell is taken if it is
            named, or has one of the levels of every factor that is given.

    Raises:
        ConfigError: one line; also if nothing is left.
    """
    named: list[str] = []
    filters: list[tuple[str, list[str]]] = []
    for item in only:
        factor, sign, text = item.partition("=")
        if sign:
            levels = [level.strip() for level in text.split(",")]
            _check_levels(cells, factor, levels)
            filters.append((factor, levels))
        elif any(cell.name == item for cell in cells):
            named.append(item)
        else:
            known = [cell.name for cell in cells]
            raise ConfigError(f"--only: got {item!r}, no such cell; {nearest(item, known)}")
    if not named and not filters:
        return list(cells)
    found = [
        cell
        for cell in cells
        if cell.name in named
        or (filters and all(_level(cell, factor) in some for factor, some in filters))
    ]
    if not found:
        shown = " ".join(only)
        raise ConfigError(f"--only: got {shown!r}, expected levels that meet in some cell")
    return found


def _level(cell: Cell, factor: str) -> str | None:
    return cell.role if factor == "role" else cell.levels.get(factor)


def _check_levels(cells: Sequence[Cell], factor: str, levels: list[str]) -> None:
    known = list(dict.fromkeys(["role", *(name for cell in cells for name in cell.levels)]))
    if factor not in known:
        raise ConfigError(f"--only {factor}=...: no such factor; {nearest(factor, known)}")
    found = sorted({level for cell in cells if (level := _level(cell, factor)) is not None})
    for level in levels:
        if level not in (ROLES if factor == "role" else found):
            raise ConfigError(f"--only {factor}: no level {level!r}; {nearest(level, found)}")


def chosen_seeds(text: str | None) -> set[int] | None:
    """The seeds in `100-104,110`; None where nothing was given.

    Raises:
        ConfigError: another form.
    """
    if text is None:
        return None
    found: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        first = int(match[1]) if match else 0
        last = int(match[2] or match[1]) if match else -1
        if not match or last < first or last - first > MOST_SEEDS:
            raise ConfigError(f"--seeds: got {text[:80]!r}, expected seeds such as 100-104,110")
        found |= set(range(first, last + 1))
    return found


def chosen_runs(cells: Sequence[Cell], seeds: set[int] | None) -> list[tuple[Cell, int]]:
    """Cell and seed of each run, the first seeds of all cells first.

    Raises:
        ConfigError: a seed that no cell has.
    """
    known = {seed for cell in cells for seed in cell.seeds}
    for seed in sorted((seeds or set()) - known):
        raise ConfigError(f"--seeds: {seed} is a seed of no chosen cell")
    ordered: list[tuple[Cell, int]] = []
    for place in range(max(len(cell.seeds) for cell in cells)):
        ordered += [(cell, cell.seeds[place]) for cell in cells if place < len(cell.seeds)]
    return [(cell, seed) for cell, seed in ordered if seeds is None or seed in seeds]
