"""Settings of runs as the report lists them: by section, as texts."""

import math
import re
from collections.abc import Mapping
from typing import Any

from hmpo.config import RunConfig, to_dict

PLACES = ("name", "out", "relative_to")
"""Settings that say where a run is, and nothing of what it did."""


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
