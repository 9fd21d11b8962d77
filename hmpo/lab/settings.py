"""Settings of runs as the report lists them: by section, and where runs differ."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hmpo.config import RunConfig, to_dict
from hmpo.lab.folder import RunData

UNKNOWN = "not known"
"""Of a run whose log does not tell a setting."""
PLACES = ("name", "out", "relative_to")
"""Settings that say where a run is, and nothing of what it did."""


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


def by_section(
    config: Mapping[str, Any],
) -> tuple[list[tuple[str, str, str]], list[tuple[str, list[tuple[str, str]]]]]:
    """Settings that differ from the defaults (name, value, default), and all of them by section."""
    defaults = dict(flatten(to_dict(RunConfig())))
    rows = flatten(config)
    differing = [
        (name, value, defaults.get(name, ""))
        for name, value in rows
        if defaults.get(name) != value and name not in PLACES
    ]
    sections: dict[str, list[tuple[str, str]]] = {}
    for name, value in rows:
        section, _, rest = name.partition(".")
        sections.setdefault(section if rest else "run", []).append((rest or name, value))
    return differing, list(sections.items())


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as dotted names and texts, in their order."""
    if isinstance(value, Mapping) and (value or not prefix):
        return [
            row
            for key, item in value.items()
            for row in flatten(item, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(value, bool) or value is None:
        return [(prefix, {True: "true", False: "false", None: "none"}[value])]
    if isinstance(value, float):
        return [(prefix, number(value))]
    if isinstance(value, list | tuple):
        return [(prefix, ", ".join(str(item) for item in value) or "(empty)")]
    return [(prefix, str(value) if value not in ("", {}) else "(empty)")]


def number(value: float | int) -> str:
    """A number in at most four significant digits; whole numbers in full."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e9:
        return str(int(value))
    return re.sub(r"e([+-])0*(\d)", r"e\1\2", f"{value:.4g}")
