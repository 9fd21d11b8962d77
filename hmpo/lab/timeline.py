"""The decisions of a run over time: reward, gap and target, regime and phase, lr, p, level."""

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from hmpo.agm.phase import PHASES
from hmpo.agm.regime import REGIMES
from hmpo.agm.stopping import GO_ON
from hmpo.lab.decisions import values_of
from hmpo.lab.plots import COLOURS, INK, SOFT, plain, save, style
from hmpo.lab.replay import Source
from hmpo.lab.thin import LARGEST, evenly, strips, thin
from hmpo.telemetry.fields import GAP
from hmpo.telemetry.ingest import Record

ABOVE: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.01, 0.96), "ncols": 2}
SHADES = ("#c8cdd3", "#009e73", "#56b4e9", "#e6a000", "#d55e00")
"""Of regimes and phases, from nothing known to bad."""
OTHER = INK
"""Of a state that no controller of this version gives."""


def render_timeline(source: Source, decisions: Sequence[Record], label: str) -> bytes:
    """The decision timeline as PNG; equal for equal decisions.

    Args:
        source: the log, for rewards, gaps, learning rates and exponents that were in force.
        decisions: on it.
        label: shown above.
    """
    steps, evals = source.log.steps, source.log.evals
    rows: list[tuple[float, Any]] = [(1.3, _draw_reward), (1.3, _draw_gap), (0.7, _draw_states)]
    rows.append((0.9, _draw_lr))
    ps = {record["ratio/p"] for record in steps if record.get("ratio/p") is not None}
    if len(ps) > 1 or values_of(decisions, "p"):
        rows.append((0.9, _draw_p))
    if any("curriculum/level" in record for record in steps):
        rows.append((0.7, _draw_level))
    with matplotlib.rc_context(style("png")):
        heights = [height for height, _ in rows]
        figure = Figure(figsize=(8.0, 0.6 + 1.25 * sum(heights)), layout="constrained")
        grid = figure.subplots(len(rows), 1, squeeze=False, sharex=True, height_ratios=heights)
        for (_, draw), axes in zip(rows, grid[:, 0]):
            draw(axes, source, steps, evals, decisions)
            _mark(axes, decisions)
        grid[-1][0].set_xlabel("optimizer updates")
        grid[-1][0].xaxis.set_major_locator(MaxNLocator(integer=True))
        text = figure.suptitle(plain(label), x=0.01, ha="left", fontsize=12, fontweight="bold")
        text.set_parse_math(False)
        return save(figure, "png")


def _series(records: Sequence[Record], name: str) -> tuple[list[int], list[float]]:
    points = [(r["step"], r[name]) for r in records if isinstance(r.get(name), int | float)]
    return thin([step for step, _ in points], [float(value) for _, value in points])


def _draw_reward(axes: Axes, source: Source, steps: Any, evals: Any, decisions: Any) -> None:
    axes.plot(*_series(steps, "reward/mean"), color=COLOURS[0], linewidth=1.0, label="train")
    axes.plot(*_series(evals, "eval/mean"), "o-", color=COLOURS[1], markersize=4, label="held out")
    axes.set_ylabel("reward")
    axes.legend(**ABOVE)


def _draw_gap(axes: Axes, source: Source, steps: Any, evals: Any, decisions: Any) -> None:
    """The log gap of the stalest updates, which alone are compared, against its target."""
    deepest = max((record.get("staleness") or 0 for record in steps), default=0)
    stale = [record for record in steps if (record.get("staleness") or 0) == deepest]
    at, gaps = _series(stale, GAP)
    axes.plot(at, [max(gap, 1e-9) for gap in gaps], color=COLOURS[0], label="g")
    target = min(source.config.resolved.adapter.gap_target, LARGEST)
    axes.axhline(target, color=SOFT, linestyle="--", linewidth=1.1, label="target")
    axes.set_yscale("log")
    axes.set_ylabel("log gap (nat)")
    axes.legend(**ABOVE)


def _draw_states(axes: Axes, source: Source, steps: Any, evals: Any, decisions: Any) -> None:
    """Two strips: the regime above, the phase below."""
    others: list[str] = []
    for row, (name, names) in enumerate((("phase", PHASES), ("regime", REGIMES))):
        points = [(step, str(value)) for step, value in values_of(decisions, name)]
        bars: dict[str, list[tuple[int, int]]] = {}
        for start, end, value in strips(points, points[-1][0] + 1 if points else 0):
            colour = SHADES[names.index(value) % len(SHADES)] if value in names else OTHER
            bars.setdefault(colour, []).append((start, max(1, end - start)))
            if colour == OTHER and value not in others:
                others.append(value)
        for colour, spans in bars.items():
            axes.broken_barh(spans, (row + 0.1, 0.8), color=colour)
    axes.set_yticks([0.5, 1.5], ["phase", "regime"])
    axes.set_ylim(0, 2)
    axes.grid(False)
    labels = [f"{regime.split('_')[0]} / {phase}" for regime, phase in zip(REGIMES, PHASES)]
    patches = [Patch(color=shade, label=text) for shade, text in zip(SHADES, labels)]
    if others:
        shown = ", ".join(plain(value) for value in others[:3]).replace("$", r"\$")
        patches.append(Patch(color=OTHER, label=f"unknown: {shown}"))
    axes.legend(
        handles=patches,
        loc="upper left",
        bbox_to_anchor=(0.0, -0.05),
        ncols=3,
        fontsize=7,
    )


def _draw_lr(axes: Axes, source: Source, steps: Any, evals: Any, decisions: Any) -> None:
    axes.plot(*_series(steps, "lr"), color=COLOURS[0], drawstyle="steps-post")
    axes.set_ylabel("lr")
    axes.set_ylim(bottom=0)


def _draw_p(axes: Axes, source: Source, steps: Any, evals: Any, decisions: Any) -> None:
    axes.plot(*_series(steps, "ratio/p"), color=COLOURS[0], label="in force")
    at, targets = _series(decisions, "decision/p_target")
    if at:
        axes.plot(at, targets, color=SOFT, linewidth=0.9, linestyle="--", label="target")
        axes.legend(**ABOVE)
    axes.set_ylabel("p")


def _draw_level(axes: Axes, source: Source, steps: Any, evals: Any, decisions: Any) -> None:
    axes.plot(*_series(steps, "curriculum/level"), color=COLOURS[0], drawstyle="steps-post")
    axes.set_ylabel("level")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _mark(axes: Axes, decisions: Sequence[Record]) -> None:
    """Applied emergencies and rollbacks, and the end."""
    at = [
        record["step"]
        for record in decisions
        if record["applied"] and record.get("decision/action") in ("emergency", "rollback")
    ]
    for i in evenly(len(at), 200):
        axes.axvline(at[i], color=COLOURS[1], linewidth=0.9, alpha=0.7)
    stops = [step for step, why in values_of(decisions, "stop") if why != GO_ON]
    if stops:
        axes.axvline(stops[0], color=COLOURS[5], linewidth=1.2, linestyle=":")
