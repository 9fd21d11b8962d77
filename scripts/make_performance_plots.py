"""Draw docs/assets/performance-*.png from the results of `make bench`.

python scripts/make_performance_plots.py
"""

from pathlib import Path
from typing import Any

from goals import Goal, goals
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from results import rows_of

from hmpo.lab.plots import COLOURS, GRID, INK, SOFT

ASSETS = Path(__file__).resolve().parent.parent / "docs" / "assets"
REACHED, MISSED = COLOURS[0], COLOURS[1]
MARKS = {"tokens": "o", "group": "s", "vocabulary": "^"}


def write(figure: Figure, name: str) -> None:
    """Save one picture."""
    path = ASSETS / f"performance-{name}.png"
    figure.savefig(path, metadata={"Software": None})
    print(f"written: {path.relative_to(ASSETS.parent.parent)}")


def plain(axes: Any, grid: str) -> None:
    """The look of every picture here."""
    axes.grid(axis=grid, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=SOFT, labelcolor=INK, labelsize=8)


def logarithmic(axes: Any) -> None:
    """Both axes, with plain numbers at 1, 2 and 5."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())


def bars() -> None:
    """One bar a goal that is a ratio to a peer, with its target."""
    rows = [goal for goal in goals() if goal.unit.startswith("of ") and goal.measured is not None]
    figure = Figure(figsize=(9, 0.8 + 0.27 * len(rows)), dpi=150, layout="constrained")
    axes = figure.subplots()
    for place, goal in enumerate(reversed(rows)):
        _bar(axes, place, goal)
    axes.axvline(1, color=SOFT, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [goal.work.replace("`", "") for goal in reversed(rows)])
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlim(0, 1.2 * max(1.1, *(goal.measured or 0 for goal in rows)))
    axes.set_xlabel("ours / peer; black: the target; orange: not reached", color=INK, fontsize=8)
    plain(axes, "x")
    axes.tick_params(axis="y", length=0)
    write(figure, "goals")


def _bar(axes: Any, place: int, goal: Goal) -> None:
    value = goal.measured or 0.0
    axes.barh(place, value, height=0.62, color=REACHED if goal.reached else MISSED)
    axes.vlines(goal.target, place - 0.42, place + 0.42, color=INK, linewidth=2)
    edge = max(value, goal.target) if -0.05 < goal.target - value < 0.22 else value
    axes.text(
        edge + 0.012,
        place,
        f"{value:.2f} {goal.unit}".replace("`", ""),
        va="center",
        fontsize=7,
        color=INK if goal.reached else MISSED,
    )


def roofs() -> None:
    """Speed reached by each piece of work over its operations for each byte, below the limits."""
    kinds = {
        "generation": [(row, row["cpu_s"]["fast"]) for row in rows_of("sampling")],
        "whole update": [(row, row["floor_s"] / row["share"]) for row in rows_of("trl")],
        "log-probs": [
            (row, row["cpu_s"]) for row in rows_of("logprobs") if row.get("ours") and "share" in row
        ],
        "packed forward and backward": [(row, row["cpu_s"]["shared"]) for row in rows_of("update")],
    }
    points = [
        (kind, row["necessary"]["gflop"] / row["necessary"]["gbyte"], row, seconds)
        for kind, rows in kinds.items()
        for row, seconds in rows
    ]
    flops = max(row["ceilings"]["gflop_s"] for _, _, row, _ in points)
    bytes_ = max(row["ceilings"]["gbyte_s"] for _, _, row, _ in points)
    figure = Figure(figsize=(7.5, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    low = min(x for _, x, _, _ in points) / 2
    high = 2 * max(x for _, x, _, _ in points)
    axes.plot([low, flops / bytes_, high], [low * bytes_, flops, flops], color=INK, linewidth=1.2)
    axes.text(
        high, 1.06 * flops, f"{flops:.0f} GFLOP/s", fontsize=8, color=INK, ha="right", va="bottom"
    )
    left = 0.55 * flops / bytes_
    axes.text(left, 0.62 * flops, f"{bytes_:.0f} GB/s", fontsize=8, color=INK, ha="right")
    for colour, mark, kind in zip(COLOURS, "os^D", kinds, strict=False):
        mine = [(x, row["necessary"]["gflop"] / s) for name, x, row, s in points if name == kind]
        if mine:
            axes.plot(
                *zip(*mine, strict=True), mark, color=colour, markersize=6, label=kind, alpha=0.85
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(top=1.4 * flops)
    logarithmic(axes)
    axes.set_xlabel("operations that the work needs for each byte that it needs", color=INK)
    axes.set_ylabel("10^9 operations a second", color=INK)
    plain(axes, "both")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    write(figure, "roofline")


def growth() -> None:
    """Time and memory of an update over its work, and memory of log-probs over its formula."""
    rows = rows_of("growth")
    figure = Figure(figsize=(9.6, 3.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, 3)
    titles = ("time of an update", "peak memory of an update", "peak memory of log-probs")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.set_xscale("log")
        axes.set_yscale("log")
        logarithmic(axes)
    time, memory, head = panels
    for colour, (axis, mark) in zip(COLOURS, MARKS.items(), strict=False):
        mine = [row for row in rows if row["axis"] == axis]
        update = [row for row in mine if row["part"] == "update"]
        work = [row["necessary"]["gflop"] for row in update]
        line = {"color": colour, "marker": mark, "markersize": 5, "linewidth": 1.2, "label": axis}
        time.plot(work, [row["cpu_s"] for row in update], **line)
        memory.plot(work, [row["peak_mib"] for row in update], **line)
        alone = [row for row in mine if row["part"] == "head"]
        if alone:
            predicted = [row["predicted_mib"] for row in alone]
            head.plot(predicted, [row["peak_mib"] for row in alone], **(line | {"linestyle": ""}))
    ends = [f(row["predicted_mib"] for row in rows if "predicted_mib" in row) for f in (min, max)]
    head.plot(ends, ends, color=SOFT, linewidth=0.8, linestyle="--")
    time.set_ylabel("CPU seconds", color=INK, fontsize=8)
    for axes in (memory, head):
        axes.set_ylabel("MiB", color=INK, fontsize=8)
    for axes in (time, memory):
        axes.set_xlabel("10^9 operations needed", color=INK, fontsize=8)
    head.set_xlabel("MiB by the formula", color=INK, fontsize=8)
    for axes in panels:
        plain(axes, "both")
    time.legend(frameon=False, fontsize=8, loc="upper left")
    write(figure, "growth")


def main() -> None:
    """Draw all three; the third where there is what it shows."""
    bars()
    roofs()
    if rows_of("growth"):
        growth()


if __name__ == "__main__":
    main()
