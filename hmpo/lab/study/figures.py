"""Figures of a suite as SVG and PNG: which there are, and the ones of curves against updates.

Drawn in the style of a run's plots (`hmpo.lab.plots`). A figure without data is left out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hmpo.lab.plots import COLOURS, SOFT, plain, save, style
from hmpo.lab.study.analysis import Study
from hmpo.lab.study.grid_tables import setting
from hmpo.lab.study.series import QUANTITIES, Curve, Quantity, blocks, curves_of

DASHES = ("-", "--", ":", "-.")
BESIDE = 3
"""Axes beside each other."""
MOST_BLOCKS = 9
"""Blocks of one figure; the page and the tables have all of them."""
MOST_SEEDS = 20
"""Runs of a cell that are drawn one by one."""


@dataclass(frozen=True)
class Picture:
    """One figure of a report."""

    name: str
    """File name without suffix."""
    title: str
    caption: str
    draw: Callable[[Study], Figure | None]
    """Makes the figure, or None where there is no data for it."""


def draw(picture: Picture, study: Study) -> Mapping[Literal["svg", "png"], bytes]:
    """The bytes of both forms, the same for the same outcomes; {} without data."""
    with matplotlib.rc_context(style("svg")):
        figure = picture.draw(study)
        if figure is None:
            return {}
        found: dict[Literal["svg", "png"], bytes] = {"svg": save(figure, "svg")}
        figure.set_layout_engine(None)  # it stands; laying out again would cost as much
        figure.set_facecolor("#ffffff")
        with matplotlib.rc_context(style("png")):
            found["png"] = save(figure, "png")
    return found


def look(place: int) -> dict[str, Any]:
    """Colour and dashes of the cell at this place of its block: 24 that can be told apart."""
    dashes = DASHES[place // len(COLOURS) % len(DASHES)]
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": dashes}


def grid(columns: int, rows: int = 1, height: float = 2.7) -> tuple[Figure, list[list[Axes]]]:
    """A figure with axes by row and column."""
    size = (1.2 + 3.2 * columns if columns > 1 else 6.4, height * rows + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    made = figure.subplots(rows, columns, squeeze=False)
    return figure, [list(row) for row in made]


def wrapped(count: int, height: float = 2.5) -> tuple[Figure, list[Axes]]:
    """A figure with that many axes of one scale, at most `BESIDE` in a row, named at its rim."""
    columns = min(count, BESIDE)
    figure, rows = grid(columns, -(-count // columns), height)
    every = [axes for row in rows for axes in row]
    for place, axes in enumerate(every):
        if place >= count:
            axes.remove()
        elif place:
            axes.sharey(every[0])
            axes.sharex(every[0])
    for place, axes in enumerate(every[:count]):
        lowest = place + columns >= count
        axes.tick_params(labelleft=place % columns == 0, labelbottom=lowest)
        if lowest:
            axes.set_xlabel("optimizer updates")
    return figure, every[:count]


def name_axes(axes: Axes, text: str) -> None:
    """A short title at the left, without mathematics in it."""
    if not text:
        return
    title = axes.set_title(plain(text), loc="left", fontsize=9.5, fontweight="bold")
    title.set_parse_math(False)


def legend(figure: Figure, rows: Sequence[Sequence[Axes]], columns: int = 5) -> None:
    """Every name once, below the axes."""
    named = {}
    for row in rows:
        for axes in row:
            for handle, label in zip(*axes.get_legend_handles_labels()):
                named.setdefault(label, handle)
    if len(named) > 1:
        found = figure.legend(
            list(named.values()), list(named), loc="outside lower left", ncols=columns
        )
        for text in found.get_texts():
            text.set_parse_math(False)


def curve_figure(name: str) -> Callable[[Study], Figure | None]:
    """Draws one quantity, a pair of axes for each block."""

    def made(study: Study) -> Figure | None:
        quantity = next(q for q in QUANTITIES if q.name == name)
        found = _found(study, quantity, MOST_BLOCKS)
        if not found:
            return None
        figure, every = wrapped(len(found))
        for place, (axes, (block, curves)) in enumerate(zip(every, found.items())):
            _panel(axes, study, curves, faint=name in ("success", "reward"))
            if name == "max_qk":
                _threshold(study, axes)
            if place % BESIDE == 0:
                axes.set_ylabel(quantity.unit)
            name_axes(axes, block)
        if quantity.share:
            every[0].set_ylim(0, None)
        legend(figure, [every])
        return figure

    return made


def signal_figure(study: Study) -> Figure | None:
    """Log gap, KL and clipped shares by sign in rows, the first blocks in columns."""
    names = ("g", "kl3", "clip_pos", "clip_neg")
    found = {q: _found(study, q, BESIDE) for q in QUANTITIES if q.name in names}
    found = {quantity: by_block for quantity, by_block in found.items() if by_block}
    if not found:
        return None
    used = list(next(iter(found.values())))
    figure, rows = grid(len(used), len(found), 2.0)
    for row, (quantity, by_block) in zip(rows, found.items()):
        for axes, block in zip(row, used):
            _panel(axes, study, by_block.get(block, []), faint=False)
            if axes is not row[0]:
                axes.sharey(row[0])
            axes.tick_params(labelleft=axes is row[0], labelbottom=row is rows[-1])
        row[0].set_ylabel(quantity.unit, fontsize=8)
    for axes, block in zip(rows[0], used):
        name_axes(axes, block)
    for axes in rows[-1]:
        axes.set_xlabel("optimizer updates")
    legend(figure, rows)
    return figure


def _found(study: Study, quantity: Quantity, most: int) -> dict[str, list[Curve]]:
    by_block = {
        block: curves_of(study, cells, quantity)
        for block, cells in list(blocks(study).items())[:most]
    }
    return {block: curves for block, curves in by_block.items() if curves}


def _panel(axes: Axes, study: Study, curves: Sequence[Curve], faint: bool) -> None:
    order = order_of(study)
    for curve in curves:
        _draw(axes, curve, order, faint)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))  # each label is drawn, and costs, twice


def order_of(study: Study) -> dict[str, int]:
    """Place of each label among all, so that a method has one colour in all figures."""
    labels = [cell.levels.get(study.plan.factor, cell.name) for cell in study.plan.cells]
    labels += [cell.name for cell in study.plan.cells]
    return {label: place for place, label in enumerate(dict.fromkeys(labels))}


def _draw(axes: Axes, curve: Curve, order: Mapping[str, int], faint: bool) -> None:
    how = look(order.get(curve.label, 0))
    if faint and len(curve.seeds) <= MOST_SEEDS:
        steps, values = joined(curve)  # one line with gaps costs a tenth of many
        axes.plot(steps, values, color=how["color"], linewidth=0.5, alpha=0.18)
    known = [i for i, low in enumerate(curve.low) if low is not None]
    axes.fill_between(
        [curve.steps[i] for i in known],
        [curve.low[i] or 0.0 for i in known],
        [curve.high[i] or 0.0 for i in known],
        color=how["color"],
        alpha=0.16,
        linewidth=0,
    )
    axes.plot(curve.steps, curve.mean, label=plain(curve.label), **how)


def joined(curve: Curve) -> tuple[list[float], list[float]]:
    """All seeds of a curve as one line with gaps (NaN) between them."""
    steps: list[float] = []
    values: list[float] = []
    for own, found in curve.seeds.values():
        steps += [*map(float, own), math.nan]
        values += [*(math.nan if value is None else value for value in found), math.nan]
    return steps, values


def _threshold(study: Study, axes: Axes) -> None:
    """The threshold of QK-clip, where all cells that clip have the same."""
    clipping = [cell for cell in study.cells() if setting(cell, "trainer", "qk_clip") is not False]
    values = {float(setting(cell, "trainer", "max_qk_score") or 100.0) for cell in clipping}
    if len(values) == 1:
        axes.axhline(*values, color=SOFT, linestyle="--", linewidth=1.1, label="threshold")
