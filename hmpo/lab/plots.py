"""Plots of one run or several side by side, drawn from the table in `panels.py`.

A plot whose series were not logged is left out. Colours are Okabe and Ito's, told apart with
every common kind of colour blindness; each line is named beside the plot as well.
"""

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hmpo.checkpoint import write_atomic
from hmpo.lab.folder import RunData
from hmpo.lab.panels import PLOTS, Line, Panel, Plot
from hmpo.lab.thin import LARGEST, evenly, smoothed, thin
from hmpo.stats import wilson_interval

INK, SOFT, GRID = "#1f2328", "#59636e", "#d9dde2"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#8a6d00", "#3b3b3b")
LAYERS = ("#1f77b4", "#c9a227", "#17806d", "#7a5195", "#ef5675", "#4d9de0", "#9c6644", "#7f8a94")
"""Fills of parts on top of each other: neighbours differ in lightness too."""
DARK = {
    INK: "#e6e9ed",
    SOFT: "#9aa4b0",
    GRID: "#3a414a",
    **dict(zip(COLOURS, ("#56b4e9", "#f0803c", "#2fbf94", "#dd99cc", "#e6c229", "#c8cdd3"))),
}
"""What each colour becomes on a dark page."""
_SMOOTH_ABOVE = 30
"""Points above which a moving average is drawn over the raw line."""
_BESIDE = 4
"""Runs beside each other in a figure; more of them go below."""
_MARKED = 12
"""Points up to which each is marked: a line needs two neighbours to be seen."""
_EVALS = 300
"""Evaluations drawn with their intervals, evenly spaced."""


def style(form: str) -> dict[str, Any]:
    """Matplotlib's settings of every plot."""
    ground = "#ffffff" if form == "png" else "none"
    return {
        "figure.facecolor": ground,
        "savefig.facecolor": ground,
        "axes.facecolor": "none",
        "axes.edgecolor": SOFT,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "text.color": INK,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "axes.prop_cycle": cycler(color=COLOURS),
        "axes.formatter.limits": (-4, 5),
        "font.size": 9.5,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "lines.linewidth": 1.6,
        "svg.hashsalt": "hmpo",
        "svg.fonttype": "path",
    }


def available(plot: Plot, runs: Sequence[RunData]) -> bool:
    """Whether any run logged any series of this plot."""
    return any(_shown(panel, runs) for panel in plot.panels)


def _shown(panel: Panel, runs: Sequence[RunData]) -> bool:
    """Whether a run logged a series of this panel, and it is worth drawing."""
    all_series = [run.series(line.metric, line.source)[1] for line in panel.lines for run in runs]
    values = {value for series in all_series for value in series}
    return len(values) > 1 or (len(values) == 1 and not panel.varies)


def render(
    plot: Plot,
    runs: Sequence[RunData],
    *,
    form: Literal["svg", "png"] = "svg",
    labels: Sequence[str] = (),
    narrow: bool = False,
) -> bytes | None:
    """Draw a plot, one column for each run.

    Args:
        plot: a row of `PLOTS`.
        runs: one or more.
        form: svg has a transparent ground and no title; png has both and 144 dots an inch.
        labels: names of the runs, shown if there are several.
        narrow: for a phone: runs below each other.

    Returns:
        The file's bytes (the same for the same runs), or None if nothing was logged.
    """
    panels = [panel for panel in plot.panels if _shown(panel, runs)]
    if not panels:
        return None
    with matplotlib.rc_context(style(form)):
        figure, grid = _grid(panels, len(runs), narrow)
        for row, panel in zip(grid, panels):
            for axes, run in zip(row, runs):
                _draw(axes, panel, run)
            _limit(row, panel)
            for axes in row[:: 1 if narrow else _BESIDE]:
                axes.set_ylabel(panel.unit)
            _legend(row, above=narrow or len(row) == 1, columns=_columns(panel, narrow))
        for axes, label in zip(grid[0], labels if len(runs) > 1 else ()):
            _name(axes, plain(label))
        for axes in grid[-1]:
            axes.set_xlabel("optimizer updates")
        if form == "png":
            figure.suptitle(plot.title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        return save(figure, form)


def _columns(panel: Panel, narrow: bool) -> int:
    """Names of lines beside each other in a legend."""
    if not narrow:
        return 3
    return 1 if max(len(line.label) for line in panel.lines) > 14 else 2


def _grid(shown: Sequence[Panel], runs: int, narrow: bool) -> tuple[Figure, list[list[Axes]]]:
    """A figure with axes by panel and run, those of a panel with one vertical scale.

    Runs stand beside each other, at most `_BESIDE`, the others below them.
    """
    panels, columns = len(shown), 1 if narrow else min(runs, _BESIDE)
    bands = -(-runs // columns)
    named = sum(-(-len(panel.lines) // _columns(panel, narrow)) for panel in shown)
    size = (6.2 if runs == 1 else 3.6 * columns, 3.7 * bands)
    if narrow:
        size = (3.6, 0.4 + bands * (0.4 + 1.5 * panels) + 0.2 * named)
    figure = Figure(figsize=size, layout="constrained")
    heights = (1.2, 1.0)[:panels] * bands
    made = figure.subplots(
        panels * bands, columns, squeeze=False, sharex=True, height_ratios=heights
    )
    grid = [
        [made[run // columns * panels + panel][run % columns] for run in range(runs)]
        for panel in range(panels)
    ]
    for first, *others in grid:
        for place, axes in enumerate(others, start=1):
            axes.sharey(first)
            axes.tick_params(labelleft=place % columns == 0)
    for axes in set(made.flat) - {axes for row in grid for axes in row}:
        axes.remove()
    for axes in grid[-1]:
        axes.tick_params(labelbottom=True)
    return figure, grid


def render_comparison(
    runs: Sequence[RunData], labels: Sequence[str], narrow: bool = False
) -> bytes | None:
    """Success of several runs in one pair of axes, as SVG; None if none was measured."""
    with matplotlib.rc_context(style("svg")):
        size = (3.6, 3.0 + 0.2 * len(runs)) if narrow else (10.8, 3.4)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        for i, (run, label) in enumerate(zip(runs, labels)):
            metric = "eval/sampled" if run.series("eval/sampled", "evals")[0] else "eval/greedy"
            line = Line(metric, plain(label), "evals", interval=True)
            colour, dashes = COLOURS[i % 6], ("-", "--", ":", "-.")[i // 6 % 4]
            _draw_line(axes, line, run, colour, i - (len(runs) - 1) / 2, dashes)
        if not axes.lines:
            return None
        axes.set_ylim(0, 1.03)
        axes.set_ylabel("success rate")
        axes.set_xlabel("optimizer updates")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if narrow:
            axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0))
        else:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return save(figure, "svg")


def darken(svg: bytes) -> bytes:
    """The same SVG in the colours of a dark page."""
    pattern = re.compile("|".join(DARK))
    return pattern.sub(lambda colour: DARK[colour[0]], svg.decode()).encode()


def write_plots(runs: Sequence[RunData], folder: Path, labels: Sequence[str] = ()) -> list[Path]:
    """Write every available plot as `folder/<name>.png` and return the paths.

    Raises:
        StorageError: the folder cannot be made or written.
    """
    written = []
    for plot in PLOTS:
        image = render(plot, runs, form="png", labels=labels)
        if image is not None:
            write_atomic(folder / f"{plot.name}.png", image, make_folder=True)
            written.append(folder / f"{plot.name}.png")
    return written


def plain(label: str) -> str:
    """A label in printable ASCII of at most 40 characters: fonts have no glyph for the rest."""
    text = label.encode("ascii", "backslashreplace").decode()
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 40 else text[:37] + "..."


def save(figure: Figure, form: str) -> bytes:
    """The figure's bytes, the same for the same figure."""
    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
    figure.savefig(buffer, format=form, dpi=144, metadata=metadata)
    return buffer.getvalue()


def _name(axes: Axes, label: str) -> None:
    text = axes.set_title(label, loc="left", fontsize=9.5, fontweight="bold")
    text.set_parse_math(False)


def _draw(axes: Axes, panel: Panel, run: RunData) -> None:
    if panel.stacked:
        _draw_stack(axes, panel, run)
    for i, line in enumerate(() if panel.stacked else panel.lines):
        _draw_line(axes, line, run, COLOURS[i], offset=float(i - 1) if line.interval else 0.0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    threshold = run.setting(*panel.threshold) if panel.threshold else None
    if isinstance(threshold, int | float) and abs(threshold) <= LARGEST:
        axes.axhline(threshold, color=SOFT, linestyle="--", linewidth=1.1, label="threshold")


def _limit(row: Sequence[Axes], panel: Panel) -> None:
    """The scale that the axes of a panel share, once all runs are drawn on it."""
    if panel.full:
        row[0].set_ylim(0, 1.03)
    elif panel.share:
        row[0].set_ylim(bottom=0)


def _legend(row: Sequence[Axes], above: bool, columns: int) -> None:
    """Names of the lines, once: above the first pair of axes, or right of several."""
    named: dict[str, Any] = {}
    for axes in row:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            named.setdefault(label, handle)
    if len(named) < 2:
        return
    where: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
    if above:
        where = {"loc": "lower left", "bbox_to_anchor": (-0.01, 0.98), "ncols": columns}
    beside = row[0 if above else min(len(row), _BESIDE) - 1]
    beside.legend(list(named.values()), list(named), columnspacing=1.2, **where)


def _draw_stack(axes: Axes, panel: Panel, run: RunData) -> None:
    """Parts on top of each other, as means over whole rollouts (only a first update samples)."""
    parts = [dict(zip(*run.series(line.metric, line.source))) for line in panel.lines]
    steps = sorted({step for part in parts for step in part})
    window = _rollout(len(steps), run) * max(1, round(len(steps) / 60))
    ends = range(window, len(steps) + 1, window)
    layers = [
        (
            line.label,
            colour,
            [sum(part.get(s, 0.0) for s in steps[e - window : e]) / window for e in ends],
        )
        for line, colour, part in zip(panel.lines, LAYERS, parts)
        if part
    ]
    if not layers:
        return
    places = [steps[end - 1] for end in ends]
    if len(places) == 1:  # one rollout: as wide as its updates, else nothing would be seen
        places = [steps[0], max(steps[-1], steps[0] + 1)]
        layers = [(label, colour, values * 2) for label, colour, values in layers]
    axes.stackplot(
        places,
        [values for _, _, values in layers],
        labels=[label for label, _, _ in layers],
        colors=[colour for _, colour, _ in layers],
        linewidth=0,
    )


def _draw_line(
    axes: Axes, line: Line, run: RunData, colour: str, offset: float = 0.0, dashes: str = "-"
) -> None:
    steps, values = run.series(line.metric, line.source)
    if not steps:
        return
    if line.interval:
        _draw_intervals(axes, line, run, colour, offset, dashes)
        return
    window = smoothing(len(values), run)
    if window > 1:
        axes.plot(*thin(steps, values), color=colour, linewidth=0.8, alpha=0.35)
        axes.plot(*smoothed(steps, values, window), dashes, color=colour, label=line.label)
    else:
        mark = "o" if len(values) <= _MARKED else ""
        points = thin(steps, values)
        axes.plot(*points, mark + dashes, color=colour, markersize=3, label=line.label)


def _draw_intervals(
    axes: Axes, line: Line, run: RunData, colour: str, offset: float, dashes: str
) -> None:
    """Points with their 95 % intervals, set apart a little so that bars do not hide each other."""
    rows = {r["step"]: r for r in run.log.evals if isinstance(r.get(line.metric), int | float)}
    steps = sorted(rows)
    steps = [steps[i] for i in evenly(len(steps), _EVALS)]
    span = max(1, run.last_step)
    values = [rows[step][line.metric] for step in steps]
    ends = [interval(rows[step], line.metric) or (v, v) for step, v in zip(steps, values)]
    below = [max(0.0, v - low) for v, (low, _) in zip(values, ends)]
    above = [max(0.0, high - v) for v, (_, high) in zip(values, ends)]
    axes.errorbar(
        [step + offset * span * 0.006 for step in steps],
        values,
        yerr=[below, above],
        fmt=f"o{dashes}",
        color=colour,
        markersize=4,
        elinewidth=1.1,
        capsize=0,
        label=line.label,
    )


def interval(record: dict[str, Any], metric: str) -> tuple[float, float] | None:
    """The 95 % Wilson interval of an eval record's rate, as logged or from its counts."""
    low, high = record.get(f"{metric}_low"), record.get(f"{metric}_high")
    if isinstance(low, int | float) and isinstance(high, int | float):
        return float(low), float(high)
    k, n = record.get(f"{metric}_k"), record.get(f"{metric}_n")
    if isinstance(k, int) and isinstance(n, int) and 0 <= k <= n:
        return wilson_interval(k, n)
    return None


def smoothing(count: int, run: RunData) -> int:
    """Updates in the moving average: 1 for short series, else whole rollouts.

    Ratios, KL and clipping rise from minibatch to minibatch of a rollout and start again at 0.
    """
    if count <= _SMOOTH_ABOVE:
        return 1
    rollout = _rollout(count, run)
    window = rollout * max(1, round(count / 30 / rollout))
    return window if window <= count // 2 else 1  # else next to nothing of it would be full


def _rollout(count: int, run: RunData) -> int:
    """Updates that a rollout serves, by the configuration; at most `count`."""
    parts = [run.setting("trainer", name, default=1) for name in ("minibatches", "epochs")]
    product = math.prod(part for part in parts if isinstance(part, int) and 0 < part <= count)
    return max(1, min(product, count))
