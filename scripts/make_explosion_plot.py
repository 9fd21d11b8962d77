"""Draw docs/assets/muonclip-explosion.png from benchmarks/results/explosion.json.

python scripts/make_explosion_plot.py
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

from hmpo.lab.plots import COLOURS, GRID, INK, SOFT

ROOT = Path(__file__).resolve().parent.parent
TITLES = {"no clip": "Muon", "tau = 30": "Muon with QK-clip, tau = 30"}


def smooth(values: list[float], width: int = 20) -> list[float]:
    """Trailing means."""
    windows = (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def main() -> None:
    """Largest logit and training loss by step, one line for each seed."""
    result = json.loads((ROOT / "benchmarks" / "results" / "explosion.json").read_text())
    figure = Figure(figsize=(9, 3.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = dict(zip(TITLES, (COLOURS[1], COLOURS[0]), strict=True))
    for row in result["rows"]:
        side = row["side"]
        label = TITLES[side] if row["seed"] == 0 else None
        line = {"color": colours[side], "linewidth": 1.1, "label": label}
        left.plot(row["max_logit_by_step"], **line)
        right.plot(smooth(row["train_loss_by_step"]), **line)
    left.axhline(30, color=SOFT, linewidth=0.8, linestyle="--")
    left.text(4, 34, "tau = 30", color=SOFT, fontsize=8, va="bottom")
    left.set_title("largest attention logit", loc="left", fontsize=10, color=INK)
    right.set_title("training loss, mean of 20 steps", loc="left", fontsize=10, color=INK)
    right.set_ylim(top=2.6)
    for axes in (left, right):
        axes.set_xlabel("step", color=INK)
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8, loc="upper left")
    path = ROOT / "docs" / "assets" / "muonclip-explosion.png"
    figure.savefig(path, metadata={"Software": None})
    print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
