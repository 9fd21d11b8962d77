"""Draw docs/assets/weights.png: what the gradient of a token's log-prob is multiplied by, over r.

python scripts/make_weights_plot.py

The weights are not drawn from formulas: each is the gradient of `power_mean_loss` in the log-prob
of one token of ratio r. A member with a mean gets a response of `LENGTH` tokens, the others of
ratio 1; one whose ratio is a product, the token alone.
"""

import dataclasses
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from hmpo.config.members import BY_NAME
from hmpo.lab.plots import COLOURS, GRID, INK, SOFT
from hmpo.objective.loss import power_mean_loss

PATH = Path(__file__).resolve().parent.parent / "docs" / "assets" / "weights.png"
LENGTH = 2000
OLD = 0.3
"""Probability of the token under the old policy, which DPPO and DRPO look at."""
SHOWN = {
    "grpo": (COLOURS[0], "-"),
    "gmpo": (COLOURS[1], "-"),
    "hmpo": (COLOURS[2], "-"),
    "sign_aware": (COLOURS[2], ":"),
    "aspo": (COLOURS[3], "--"),
    "cispo": (COLOURS[4], "--"),
    "sapo": (COLOURS[5], "-"),
    "dppo_tv": (COLOURS[0], "--"),
    "drpo": (COLOURS[1], "--"),
    "vespo": (COLOURS[5], ":"),
}
"""Colour and line of each member."""


def weights(name: str, log_ratios: torch.Tensor, advantage: float) -> torch.Tensor:
    """The weight at each log ratio (n,), for an advantage of 1 or -1."""
    config = dataclasses.replace(BY_NAME[name](), reduction="length_sum")
    length = 1 if config.weight.level != "token" else LENGTH
    count = len(log_ratios)
    old = torch.full((count, length), math.log(OLD), dtype=torch.float64)
    new = old.clone()
    new[:, 0] += log_ratios
    new.requires_grad_()
    mask = torch.ones(count, length, dtype=torch.bool)
    power_mean_loss(new, old, mask, torch.full((count,), advantage).double(), config).backward()
    assert new.grad is not None
    return -new.grad[:, 0] * count * advantage


def draw() -> Figure:
    """Both signs side by side."""
    figure = Figure(figsize=(9, 3.8), dpi=150, layout="constrained")
    log_ratios = torch.linspace(math.log(0.3), math.log(3.0), 601, dtype=torch.float64)
    for axes, sign in zip(figure.subplots(1, 2, sharey=True), (1.0, -1.0), strict=True):
        for name, (colour, line) in SHOWN.items():
            found = weights(name, log_ratios, sign)
            axes.plot(log_ratios.exp(), found, line, color=colour, label=name, linewidth=1.3)
        axes.set_xscale("log")
        axes.set_xticks([0.33, 0.5, 0.8, 1, 1.2, 2, 3])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(-0.1, 3.3)
        axes.set_title("A > 0" if sign > 0 else "A < 0", color=INK, fontsize=9)
        axes.set_xlabel("ratio r of the token", color=INK, fontsize=8)
        axes.grid(color=GRID, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=SOFT, labelcolor=INK, labelsize=8)
    figure.axes[0].set_ylabel("weight of A d log pi", color=INK, fontsize=8)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def main() -> None:
    """Write the picture."""
    draw().savefig(PATH, metadata={"Software": None})
    print(f"written: {PATH.relative_to(PATH.parents[2])}")


if __name__ == "__main__":
    main()
