"""Several runs side by side: what each came to, and what was set differently."""

from collections.abc import Mapping, Sequence
from typing import Any

from hmpo.lab.folder import RunData
from hmpo.lab.settings import PLACES, flatten

UNKNOWN = "not known"
"""Of a run whose log does not tell a setting."""


def differing_settings(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs: name, and the value of each run.

    A run of a host such as TRL has no config.json; of it only what its log tells is known.
    """
    tables = [_known(run) for run in runs]
    rows = []
    for name in dict.fromkeys(name for table in tables for name in table):
        values = [table.get(name, UNKNOWN) for table in tables]
        if len({value for value in values if value != UNKNOWN}) > 1:
            rows.append((name, values))
    return rows


def _known(run: RunData) -> dict[str, str]:
    if run.config:
        return {k: v for k, v in flatten(run.config) if k not in PLACES}
    head = run.log.run or {}
    base = head.get("base", {})
    told = {
        "seed": head.get("seed"),
        "algorithm": head.get("algo"),
        "objective.name": str(head.get("objective", "")).partition(" ")[0] or None,
        "objective.p": base.get("p"),
        "trainer.group_size": head.get("group_size"),
        "optimizer.lr": base.get("lr"),
    }
    return dict(flatten({name: value for name, value in told.items() if value is not None}))


def compare(views: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table that sets several runs side by side: name, and one cell for each run.

    A cell is a text, a rate (see `_cell`) or None.
    """
    rows = []
    for part in ("facts", "rates", "progress", "health", "breakdown"):
        for name in dict.fromkeys(_row_name(row) for view in views for row in view[part]):
            entries = [
                next((row for row in view[part] if _row_name(row) == name), None) for view in views
            ]
            if part == "rates":
                for end in ("before", "after"):
                    cells = [_dated(row, end, view) for row, view in zip(entries, views)]
                    strong = end == "after"
                    rows.append({"name": f"{name}, {end}", "cells": cells, "strong": strong})
            else:
                texts = [row and row[1] for row in entries]
                rows.append({"name": name, "cells": texts, "strong": False})
    return rows


def _dated(row: Mapping[str, Any] | None, end: str, view: Mapping[str, Any]) -> Any:
    """A rate that is not from the end of its run says when it was measured."""
    cell = row[end] if row else None
    if cell is None or end == "before" or view["after_name"] == "after":
        return cell
    return {**cell, "at": view["after_name"]}


def _row_name(row: Any) -> str:
    return row["name"] if isinstance(row, Mapping) else row[0]
