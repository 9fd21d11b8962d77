"""What controllers decided along the runs: regime and phase by seed, learning rate, p and level."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from hmpo.agm.phase import PHASES
from hmpo.agm.regime import REGIMES
from hmpo.lab.plots import COLOURS, INK, SOFT
from hmpo.lab.study.analysis import COMPARED, Study
from hmpo.lab.study.figures import grid, name_axes
from hmpo.lab.study.outcomes import Outcome
from hmpo.lab.study.series import label_of
from hmpo.lab.timeline import OTHER, SHADES

MOST_CELLS = 4
"""Cells of the figure; the table of controllers has all of them."""
MOST_RUNS = 8
"""Runs of a cell whose states are shown, those of the first seeds."""
CURVES = (("lr", "learning rate"), ("p", "p"), ("level", "level"))
"""What controllers move, where it moved at all."""


def decision_figure(study: Study) -> Figure | None:
    """States of each run above what was moved, one column for each cell with controllers."""
    cells = list(study.cells(*COMPARED, "again", "negative", "positive", "placebo"))
    found = [(cell, _decided(study, cell.name)) for cell in cells]
    shown = [(cell, runs) for cell, runs in found if runs][:MOST_CELLS]
    if not shown:
        return None
    moved = [(name, unit) for name, unit in CURVES if any(_moves(r, name) for _, r in shown)]
    figure, rows = grid(len(shown), 1 + len(moved), 2.0)
    for column, (cell, runs) in enumerate(shown):
        _states(rows[0][column], runs[:MOST_RUNS])
        name_axes(rows[0][column], label_of(study, cell, cells))
        for row, (name, unit) in zip(rows[1:], moved):
            _curve(row[column], runs, name)
            if not column:
                row[column].set_ylabel(unit, fontsize=8)
        for row in rows[:-1]:
            row[column].tick_params(labelbottom=False)
        rows[-1][column].set_xlabel("optimizer updates")
        for row in rows:
            row[column].set_xlim(0, max(run.decisions["end"] for run in runs))
            row[column].xaxis.set_major_locator(MaxNLocator(4, integer=True))
    rows[0][0].set_ylabel("seed", fontsize=8)
    names = [f"{a.replace('_', ' ')} / {b}" for a, b in zip(REGIMES, PHASES, strict=True)]
    patches = [Patch(color=shade, label=name) for shade, name in zip(SHADES, names, strict=True)]
    figure.legend(handles=patches, loc="outside lower left", ncols=3, fontsize=8)
    return figure


def _decided(study: Study, cell: str) -> list[Outcome]:
    """The cell's runs with controllers, in the order of their seeds."""
    outcomes = [run.outcome for run in study.runs[cell].values()]
    return sorted((o for o in outcomes if o.decisions), key=lambda outcome: outcome.seed)


def _moves(runs: Sequence[Outcome], name: str) -> bool:
    """Whether a value is there and not the same throughout, or not the same in all runs."""
    return len({v for run in runs for v in run.curves.get(name, []) if v is not None}) > 1


def _states(axes: Axes, runs: Sequence[Outcome]) -> None:
    """A row for each run: the regime above the phase; marks and a stop."""
    for place, run in enumerate(reversed(runs)):
        told = run.decisions
        for name, known, low in (("phase", PHASES, 0.12), ("regime", REGIMES, 0.52)):
            states = told.get(name, [])
            ends = [start for start, _ in states[1:]] + [told["end"]]
            for (start, state), end in zip(states, ends):
                colour = SHADES[known.index(state)] if state in known else OTHER
                axes.broken_barh(
                    [(start, max(1, end - start))], (place + low, 0.38), color=colour, linewidth=0
                )
        at = [step for step, _ in told.get("marks", [])]
        axes.plot(at, [place + 0.5] * len(at), "v", color=INK, markersize=3)
        stop = [step for step, _ in told.get("stop", [])]
        axes.plot(stop, [place + 0.5] * len(stop), "x", color=INK, markersize=5)
    seeds = [str(run.seed) for run in reversed(runs)]
    axes.set_yticks([place + 0.5 for place in range(len(runs))], seeds, fontsize=7)
    axes.set_ylim(0, len(runs))
    axes.grid(False)


def _curve(axes: Axes, runs: Sequence[Outcome], name: str) -> None:
    """One line for each run."""
    for run in runs:
        curves = run.curves
        if name in curves:
            axes.plot(curves["step"], curves[name], color=COLOURS[0], linewidth=0.7, alpha=0.5)
    if not axes.lines:
        axes.text(0.5, 0.5, "not kept", transform=axes.transAxes, ha="center", color=SOFT)
    axes.yaxis.set_major_locator(MaxNLocator(4))
