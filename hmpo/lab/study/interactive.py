"""What the page's chart draws: curves as data, each grid of updates once."""

import json
from collections.abc import Sequence
from typing import Any

from hmpo.errors import MissingDependencyError
from hmpo.lab.plots import COLOURS, DARK
from hmpo.lab.study.analysis import Study
from hmpo.lab.study.figures import DASHES, order_of
from hmpo.lab.study.series import QUANTITIES, blocks, curves_of

WITH_SEEDS = ("success", "reward")
"""Quantities of which every run's own curve is in the page."""
_DASHES = dict(zip(DASHES, ("solid", "dash", "dot", "dashdot")))


def plotly_source() -> str:
    """The text of plotly.js.

    Raises:
        MissingDependencyError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise MissingDependencyError(
            "a suite's page needs plotly: pip install 'hmpo[lab]'"
        ) from None
    return get_plotlyjs()


def chart_data(study: Study) -> dict[str, Any]:
    """Everything that the chart can show, as plain values.

    Returns:
        `quantities` (name, title, unit), `blocks`, `looks` (label to light colour, dark colour and
        dash), `grids` (lists of updates), and `curves[quantity][block]`: label, cell, grid, mean,
        low, high, and `seeds` as [seed, grid, values].
    """
    grids: dict[tuple[int, ...], int] = {}

    def grid(steps: Sequence[int]) -> int:
        return grids.setdefault(tuple(steps), len(grids))

    curves: dict[str, dict[str, list[dict[str, Any]]]] = {}
    used: dict[str, None] = {}
    for quantity in QUANTITIES:
        by_block = {}
        for block, cells in blocks(study).items():
            rows = []
            for curve in curves_of(study, cells, quantity):
                used[curve.label] = None
                row: dict[str, Any] = {
                    "label": curve.label,
                    "cell": curve.cell,
                    "grid": grid(curve.steps),
                    "mean": _short(curve.mean),
                    "low": _short(curve.low),
                    "high": _short(curve.high),
                }
                if quantity.name in WITH_SEEDS:
                    row["seeds"] = [
                        [seed, grid(steps), _short(values)]
                        for seed, (steps, values) in curve.seeds.items()
                    ]
                rows.append(row)
            if rows:
                by_block[block] = rows
        if by_block:
            curves[quantity.name] = by_block
    order = order_of(study)
    return {
        "quantities": [
            {"name": q.name, "title": q.title, "unit": q.unit}
            for q in QUANTITIES
            if q.name in curves
        ],
        "blocks": [block for block in blocks(study) if any(block in c for c in curves.values())],
        "looks": {label: _look(order.get(label, 0)) for label in used},
        "grids": [list(steps) for steps in grids],
        "curves": curves,
    }


def _look(place: int) -> list[str]:
    colour = COLOURS[place % len(COLOURS)]
    dash = DASHES[place // len(COLOURS) % len(DASHES)]
    return [colour, DARK[colour], _DASHES[dash]]


def _short(values: Sequence[float | None]) -> list[float | None]:
    """Four digits: a chart shows no more."""
    return [None if value is None else float(f"{value:.4g}") for value in values]


def script_json(value: Any) -> str:
    """JSON that can stand in a script element: nothing in it ends the element or starts a comment.

    Raises:
        ValueError: NaN or infinity in it.
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
