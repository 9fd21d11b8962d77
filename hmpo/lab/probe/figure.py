"""Angles between objectives and token weights, in the style of the report's plots."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure

from hmpo.lab.plots import COLOURS, INK, plain, save, style
from hmpo.lab.probe.core import Probe
from hmpo.lab.probe.measures import EDGES, Spread

LEAST, MOST = 1e-6, 1.0
"""Ends of the colour scale, the same in every figure, so that two figures compare."""
_LIGHT = "#f4f6f8"


def heat_map(probe: Probe, form: Literal["svg", "png"] = "svg") -> bytes:
    """Cosine distances at the stalest update: exponents with and without clip, and members.

    In the space of weights where the policy was at hand. The bytes are the same for the same probe.
    """
    matrix = probe.stalest.weight_distances
    space = "weights" if matrix is not None else "token log-probs"
    matrix = probe.stalest.distances if matrix is None else matrix
    clipped = next(v for v in probe.variants if v.kind == "clipped")
    clip = f"token clip {clipped.objective.clip_high:g} nat"
    panels: list[tuple[str, tuple[str, ...]]] = [
        ("exponents, no clip", ("exponent",)),
        (f"exponents, {clip}", ("clipped",)),
        ("members", ("member", "own")),
    ]
    sizes = [sum(v.kind in kinds for v in probe.variants) for _, kinds in panels]
    with matplotlib.rc_context(style(form) | {"axes.grid": False}):
        figure = Figure(figsize=(4.6 + 0.55 * sum(sizes[1:]), 6.4), layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=(sizes[0], sizes[2]))
        places = (grid[0, 0], grid[1, 0], grid[:, 1])
        for (title, kinds), place in zip(panels, places, strict=True):
            rows = [i for i, v in enumerate(probe.variants) if v.kind in kinds]
            names = [plain(probe.variants[i].name) for i in rows]
            part = [[matrix[i][j] for j in rows] for i in rows]
            _draw(figure.add_subplot(place), title, names, part)
        _title(
            figure, f"Cosine distance of gradients in the space of {space} ({plain(probe.source)})"
        )
        return save(figure, form)


def weight_histograms(probe: Probe, form: Literal["svg", "png"] = "svg") -> bytes:
    """Token weights of each exponent without a clip, by the advantage's sign, stalest update.

    A weight is a token's share in its response's gradient over an equal share, on a log2 scale;
    beside it stands the effective sample size. The bytes are the same for the same probe.
    """
    shown = [
        (variant.name, spread)
        for variant, spread in zip(probe.variants, probe.stalest.spreads, strict=True)
        if variant.kind == "exponent"
    ]
    columns = min(len(shown), 4)
    rows = -(-len(shown) // columns)
    with matplotlib.rc_context(style(form)):
        size = (1.0 + 2.3 * columns, 1.1 + 1.9 * rows)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
        every = [axes for row in grid for axes in row]
        for axes in every[len(shown) :]:
            axes.remove()
        for place, (axes, (name, spread)) in enumerate(zip(every, shown)):
            _draw_weights(axes, name, spread)
            axes.tick_params(labelbottom=place + columns >= len(shown))
            if place + columns >= len(shown):
                axes.set_xlabel("weight / equal weight")
            if place % columns == 0:
                axes.set_ylabel("share of tokens")
        handles, labels = every[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=2)
        _title(figure, f"Token weights by exponent, no clip ({plain(probe.source)})")
        return save(figure, form)


def _title(figure: Figure, text: str) -> None:
    """A heading over the whole figure; a user's name in it is no formula."""
    heading = figure.suptitle(text, x=0.01, ha="left", fontsize=11, fontweight="bold")
    heading.set_parse_math(False)


def _draw_weights(axes: Axes, name: str, spread: Mapping[str, Spread]) -> None:
    """Both signs of one exponent, each a share of its own tokens."""
    for sign, colour, high in (("positive", COLOURS[0], 0.96), ("negative", COLOURS[1], 0.82)):
        own = spread[sign]
        total = sum(own.histogram)
        if total:
            shares = [count / total for count in own.histogram]
            axes.stairs(shares, EDGES, color=colour, label=f"{sign} advantages", linewidth=1.3)
            axes.stairs(shares, EDGES, color=colour, alpha=0.15, fill=True)
        ess = "-" if own.ess is None else f"{own.ess:.3f}"
        axes.text(
            0.03, high, f"ESS {ess}", color=colour, fontsize=8, va="top", transform=axes.transAxes
        )
    title = axes.set_title(name, loc="left", fontsize=9.5)
    title.set_parse_math(False)
    axes.set_ylim(0, 1.35 * max(axes.get_ylim()[1], 0.05))  # room for the two sizes
    axes.set_xticks([-4, -2, 0, 2, 4], ["1/16", "1/4", "1", "4", "16"])


def _draw(
    axes: Axes, title: str, names: Sequence[str], part: Sequence[Sequence[float | None]]
) -> None:
    colours = LinearSegmentedColormap.from_list("hmpo", [_LIGHT, "#9ecae1", COLOURS[0], "#08306b"])
    known = [[math.nan if value is None else max(value, LEAST) for value in row] for row in part]
    norm = LogNorm(LEAST, MOST)
    axes.imshow(known, cmap=colours, norm=norm, aspect="auto")
    axes.set_title(title, loc="left", fontsize=9.5)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        text.set_parse_math(False)
    axes.tick_params(length=0, labelsize=7.5)
    for side in axes.spines.values():
        side.set_visible(False)
    for i, row in enumerate(part):
        for j, value in enumerate(row):
            dark = value is not None and norm(max(value, LEAST)) > 0.55
            axes.text(
                j, i, _cell(value), ha="center", va="center", fontsize=6,
                color=_LIGHT if dark else INK,
            )  # fmt: skip


def _cell(value: float | None) -> str:
    """A distance in four characters at most."""
    if value is None:
        return "-"
    if value < 1e-9:
        return "0"
    if value < 0.01:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.2f}".lstrip("0") if value < 1 else f"{value:.1f}"
