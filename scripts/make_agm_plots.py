"""Draw docs/assets/agm-*.png from benchmarks/results/agm_demos.json.

python scripts/make_agm_plots.py
"""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hmpo.lab.plots import COLOURS, GRID, INK, SOFT

ROOT = Path(__file__).resolve().parent.parent
MODES = {"off": COLOURS[1], "apply": COLOURS[0]}
MARKERS = ("o", "s", "^")
"""One for each seed."""


def success(axes: Axes, rows: list[dict[str, Any]], against: str, labels: dict[str, str]) -> None:
    """Held-out success with 95 % intervals, one line for each run."""
    span = max(point[against] for row in rows for point in row["curve"])
    for i, row in enumerate(rows):
        points = row["curve"]
        shift = (i - (len(rows) - 1) / 2) * 0.003 * span
        rates = [point["success"] for point in points]
        axes.errorbar(
            [point[against] + shift for point in points],
            rates,
            yerr=[
                [max(0.0, r - p["success_low"]) for r, p in zip(rates, points, strict=True)],
                [max(0.0, p["success_high"] - r) for r, p in zip(rates, points, strict=True)],
            ],
            fmt=f"-{MARKERS[row['seed'] % 3]}",
            color=MODES[row["mode"]],
            markersize=3.5,
            linewidth=1.1,
            elinewidth=0.7,
            label=labels[row["mode"]] if row["seed"] == 0 else None,
        )
    axes.set_ylim(bottom=-0.01)
    axes.set_ylabel("sampled success, held out", color=INK)


def by_update(axes: Axes, rows: list[dict[str, Any]], name: str, first: int, every: int) -> None:
    """A series of the telemetry, one line for each run."""
    for row in rows:
        values = row[f"{name}_by_update"]
        at = range(first, len(values), every)
        line = {"color": MODES[row["mode"]], "linewidth": 0.9, "alpha": 0.85}
        axes.plot(at, [values[k] for k in at], **line)


def finish(figure: Figure, grid: list[Axes], titles: list[str], name: str) -> None:
    """Titles, lines of the grid, the file."""
    for axes, title in zip(grid, titles, strict=True):
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].legend(frameon=False, fontsize=8.5)
    path = ROOT / "docs" / "assets" / name
    figure.savefig(path, metadata={"Software": None})
    print(f"written: {path.relative_to(ROOT)}")


def rate_plot(rows: list[dict[str, Any]], name: str) -> None:
    """Success, log gap and learning rate of a part where the learning rate is controlled."""
    figure = Figure(figsize=(10.5, 3.3), dpi=144, layout="constrained")
    grid = list(figure.subplots(1, 3))
    success(grid[0], rows, "update", {mode: mode for mode in MODES})
    by_update(grid[1], rows, "ratio/log_gap_mean", 1, 2)
    grid[1].axhline(0.02, color=SOFT, linewidth=0.9, linestyle="--")
    edge = {"transform": grid[1].get_yaxis_transform(), "color": SOFT, "fontsize": 8}
    grid[1].text(1.0, 0.02, "budget", va="center", **edge)
    grid[1].set_yscale("log")
    by_update(grid[2], rows, "lr", 0, 1)
    grid[2].set_ylim(bottom=0)
    for axes in grid:
        axes.set_xlabel("optimizer updates", color=INK)
    finish(figure, grid, ["success", "log gap (nat)", "learning rate"], name)


def curriculum_plot(rows: list[dict[str, Any]], facts: dict[str, Any], name: str) -> None:
    """Success at the top level against tokens; the level and the rewards by update."""
    figure = Figure(figsize=(10.5, 3.3), dpi=144, layout="constrained")
    grid = list(figure.subplots(1, 2, width_ratios=(1.6, 1)))
    top, first, target = (facts[key] for key in ("top", "first", "target"))
    labels = {"off": f"{top} digits alone", "apply": f"curriculum from {first} to {top} digits"}
    success(grid[0], rows, "tokens", labels)
    grid[0].axhline(target, color=SOFT, linewidth=0.9, linestyle="--")
    edge = {"transform": grid[0].get_yaxis_transform(), "color": SOFT, "fontsize": 8}
    grid[0].text(1.0, target, "target", va="center", **edge)
    grid[0].set_xlabel("response tokens trained on", color=INK)
    by_update(grid[1], rows, "level", 0, 1)
    grid[1].set_yticks(range(first, top + 1))
    grid[1].set_xlabel("optimizer updates", color=INK)
    finish(figure, grid, [f"success with {top} digits", "digits trained on"], name)


def main() -> None:
    """Every part's plot."""
    result = json.loads((ROOT / "benchmarks" / "results" / "agm_demos.json").read_text())
    rows = {
        part: [row for row in result["rows"] if row["part"] == part] for part in ("a", "b", "c")
    }
    rate_plot(rows["a"], "agm-rate-too-high.png")
    if rows["b"]:
        curriculum_plot(rows["b"], result["facts"], "agm-curriculum.png")
    rate_plot(rows["c"], "agm-healthy.png")


if __name__ == "__main__":
    main()
