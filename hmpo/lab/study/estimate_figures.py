"""Figures of estimates: forest, heat map, weights by exponent, profile, envelope, sigma, times."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hmpo.lab.plots import COLOURS, GRID, SOFT, plain
from hmpo.lab.statistics.curves import expected_best
from hmpo.lab.statistics.resampling import performance_profile
from hmpo.lab.statistics.survival import kaplan_meier
from hmpo.lab.study.analysis import COMPARED, Contrast, Study
from hmpo.lab.study.figures import (
    BESIDE,
    MOST_BLOCKS,
    grid,
    legend,
    look,
    name_axes,
    order_of,
    wrapped,
)
from hmpo.lab.study.grid_tables import places, setting
from hmpo.lab.study.main_table import average, numbers, time_table
from hmpo.lab.study.plan import Cell
from hmpo.lab.study.series import blocks, label_of

RATES = ("lr", "rate")
"""Factors whose levels are learning rates."""
MOST_ROWS = 60
"""Differences of one forest plot; the table has all of them."""
WORDS = {"better": COLOURS[2], "worse": COLOURS[1], "no difference": COLOURS[0]}


def forest(study: Study) -> Figure | None:
    """Every difference with its interval, and the band that does not matter."""
    shown = [c for c in (*study.contrasts, *study.others) if c.estimate is not None][:MOST_ROWS]
    if not shown:
        return None
    figure = Figure(figsize=(7.6, 1.2 + 0.26 * len(shown)), layout="constrained")
    axes = figure.subplots()
    width = 100 * study.plan.smallest
    axes.axvspan(-width, width, color=GRID, alpha=0.6, linewidth=0)
    axes.axvline(0, color=SOFT, linewidth=1)
    for row, contrast in enumerate(shown):
        _difference(axes, -row, contrast)
    axes.set_yticks(
        [-row for row in range(len(shown))],
        [plain_name(f"{c.cell} - {c.against}") for c in shown],
        fontsize=8,
    )
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    axes.set_ylim(-len(shown) + 0.4, 0.6)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("difference of success, points; the band is too small to matter")
    return figure


def _difference(axes: Axes, place: int, contrast: Contrast) -> None:
    e = contrast.estimate
    assert e is not None
    told = contrast.verdict.word if contrast.verdict else ""
    colour = WORDS.get(told, SOFT)
    if e.low is not None and e.high is not None:
        axes.plot([100 * e.low, 100 * e.high], [place, place], color=colour, linewidth=1.8)
    filled = colour if contrast.confirmatory else "none"
    axes.plot(100 * e.value, place, "o", color=colour, markersize=5, markerfacecolor=filled)


def plain_name(text: str) -> str:
    """As `plain`, for longer names."""
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 64 else text[:61] + "..."


def heat_map(study: Study) -> Figure | None:
    """Mean success by exponent and staleness, with its interval's half-width."""
    found = places(study)
    if not found:
        return None
    exponents = sorted({place.p for place in found.values()})
    ages = list(dict.fromkeys(place.stale for place in found.values()))
    values = np.full((len(ages), len(exponents)), np.nan)
    texts = [["" for _ in exponents] for _ in ages]
    for name, place in found.items():
        scores = study.successes(name)
        row, column = ages.index(place.stale), exponents.index(place.p)
        if not scores or texts[row][column]:  # another factor: its table has the rest
            continue
        e = average(scores, study)
        half = "\none seed" if e.low is None else f"\n+-{100 * (e.value - e.low):.1f}"
        values[row, column], texts[row][column] = 100 * e.value, f"{100 * e.value:.1f}{half}"
    figure = Figure(figsize=(2.2 + 0.9 * len(exponents), 1.4 + 0.7 * len(ages)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    shown = axes.imshow(values, cmap="cividis", aspect="auto")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            colour = "#000000" if values[row, column] > middle else "#ffffff"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(exponents)), [f"{p:g}" for p in exponents])
    axes.set_yticks(range(len(ages)), [plain(age) for age in ages])
    axes.set_xlabel("exponent p")
    axes.grid(visible=False)
    figure.colorbar(shown, ax=axes, label="success, %")
    return figure


def weights(study: Study) -> Figure | None:
    """Effective sample size and entropy of the token weights by cell."""
    names = (("ess_mean", "effective tokens / tokens"), ("weight_entropy", "entropy / log L"))
    return _dots(study, names)


def sigma(study: Study) -> Figure | None:
    """How far the log ratios spread: by token, and over a response."""
    names = (("sigma", "sigma of a token, nat"), ("sigma_sqrt_l", "sigma sqrt L, nat"))
    return _dots(study, names)


def _dots(study: Study, names: Sequence[tuple[str, str]]) -> Figure | None:
    """Means with intervals, a row for each cell and a panel for each metric."""
    cells = study.cells(*COMPARED)
    found = {
        unit: {c.name: numbers(study.runs[c.name], name) for c in cells} for name, unit in names
    }
    found = {unit: values for unit, values in found.items() if any(values.values())}
    if not found:
        return None
    rows = [cell for cell in cells if any(values[cell.name] for values in found.values())]
    figure = Figure(figsize=(3.2 + 3.0 * len(found), 1.1 + 0.17 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    order = order_of(study)
    for axes, (unit, values) in zip(panels, found.items()):
        for row, cell in enumerate(rows):
            if not values[cell.name]:
                continue
            e = average(values[cell.name], study)
            label = cell.levels.get(study.plan.factor, cell.name)
            colour = look(order.get(label, 0))["color"]
            if e.low is not None and e.high is not None:
                axes.plot([e.low, e.high], [-row, -row], color=colour, linewidth=1.8)
            axes.plot(e.value, -row, "o", color=colour, markersize=4)
        axes.set_xlabel(unit)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
    panels[0].set_yticks([-row for row in range(len(rows))], [plain_name(c.name) for c in rows])
    for text in panels[0].get_yticklabels():
        text.set_parse_math(False)
        text.set_fontsize(7)
    return figure


def profile(study: Study) -> Figure | None:
    """Share of runs above each success, by level of the compared factor over all blocks."""
    factor = study.plan.factor
    by_level: dict[str, list[list[float]]] = {}
    for cell in study.compared:
        if factor in cell.levels and study.successes(cell.name):
            by_level.setdefault(cell.levels[factor], []).append(study.successes(cell.name))
    if len(by_level) < 2:
        return None
    figure, ((axes,),) = grid(1)
    every = [value for tasks in by_level.values() for task in tasks for value in task]
    thresholds = np.linspace(max(0.0, min(every) - 0.02), min(1.0, max(every) + 0.02), 101)
    order = order_of(study)
    for level, tasks in by_level.items():
        found, how = performance_profile(tasks, thresholds), look(order.get(level, 0))
        axes.fill_between(
            thresholds, found.low, found.high, color=how["color"], alpha=0.13, linewidth=0
        )
        axes.plot(thresholds, found.share, label=plain(level), **how)
    axes.set_xlabel("success")
    axes.set_ylabel("share of runs above it")
    axes.set_ylim(0, 1.03)
    legend(figure, [[axes]])
    return figure


Rates = dict[str, list[tuple[float, list[float]]]]
"""By method: learning rate and success by seed, in ascending order."""


def tuning(study: Study) -> dict[str, Rates]:
    """By block, what each method came to at each of several learning rates.

    Taken from cells of role `tuning`, and from those of a factor that is called `lr` or `rate`.
    """
    swept = [c for c in study.cells("main") if any(factor in c.levels for factor in RATES)]
    found: dict[str, Rates] = {}
    for cell in [*study.cells("tuning"), *swept]:
        rate = setting(cell, "optimizer", "lr")
        scores = study.successes(cell.name)
        if isinstance(rate, int | float) and rate > 0 and scores:
            block, method = _tuned(study, cell)
            found.setdefault(block, {}).setdefault(method, []).append((float(rate), scores))
    several = {
        block: {method: sorted(rows) for method, rows in methods.items() if len(rows) > 1}
        for block, methods in found.items()
    }
    return {block: methods for block, methods in several.items() if methods}


def _tuned(study: Study, cell: Cell) -> tuple[str, str]:
    """Block and method of a cell, whatever its learning rate."""
    rest = {f: level for f, level in cell.levels.items() if f not in (*RATES, "optimizer")}
    factor = study.plan.factor if study.plan.factor in rest else next(iter(rest), "")
    method = rest.pop(factor, cell.name)
    return ", ".join(rest.values()), method


def envelope(study: Study) -> Figure | None:
    """Success by learning rate, and what the best of k tried rates is expected to give."""
    found = dict(list(tuning(study).items())[:MOST_BLOCKS])
    if not found:
        return None
    figure, every = grid(2, len(found))
    order = order_of(study)
    names = list(dict.fromkeys(method for methods in found.values() for method in methods))
    for (left, right), (block, methods) in zip(every, found.items()):
        for method, rows in methods.items():
            how = look(order.get(method, names.index(method)))
            _envelope(left, right, study, rows, plain(method), how)
        name_axes(left, block)
        left.set_xscale("log")
        left.set_xlabel("learning rate")
        left.set_ylabel("success")
        right.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        right.set_xlabel("learning rates tried")
        right.set_ylabel("expected best success")
    legend(figure, every)
    return figure


def _envelope(
    left: Axes,
    right: Axes,
    study: Study,
    rows: list[tuple[float, list[float]]],
    label: str,
    how: dict[str, Any],
) -> None:
    """One method: mean and interval by rate at the left, expected best by budget at the right."""
    means = [average(scores, study) for _, scores in rows]
    rates = [rate for rate, _ in rows]
    left.plot(rates, [e.value for e in means], marker="o", label=label, **how)
    for rate, e in zip(rates, means):
        if e.low is not None and e.high is not None:
            left.plot([rate, rate], [e.low, e.high], color=how["color"], linewidth=1)
    seeds = min(len(scores) for _, scores in rows)
    table = [scores[:seeds] for _, scores in rows]
    best = [expected_best(table, draws) for draws in range(1, len(table) + 1)]
    right.plot(range(1, len(best) + 1), [e.value for e in best], marker="o", **how)


def times(study: Study) -> Figure | None:
    """Share of runs that have reached the target, by updates, in each block."""
    by_block: dict[str, list[tuple[str, list[float], list[bool]]]] = {}
    for block, cells in blocks(study).items():
        for cell in cells if block != "controls" else ():
            target = study.target(cell)
            if target is not None:
                steps, _, reached = time_table(study, cell, target)
                row = (label_of(study, cell, cells), steps, reached)
                by_block.setdefault(block, []).append(row)
    if not any(any(hit) for rows in by_block.values() for _, _, hit in rows):
        return None
    shown = dict(list(by_block.items())[:MOST_BLOCKS])
    figure, every = wrapped(len(shown))
    order = order_of(study)
    for place, (axes, (block, rows)) in enumerate(zip(every, shown.items())):
        for label, steps, reached in rows:
            found, how = kaplan_meier(steps, reached), look(order.get(label, 0))
            at = [0.0, *found.times.tolist(), max(steps)]
            height = [0.0, *(1 - found.survival).tolist()]
            axes.step(at, [*height, height[-1]], where="post", label=plain(label), **how)
        axes.set_ylim(0, 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        name_axes(axes, block)
        if place % BESIDE == 0:
            axes.set_ylabel("share that reached the target")
    legend(figure, [every])
    return figure
