"""What a run is judged by: the endpoint that was decided on beforehand, and its companions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hmpo.lab.statistics.intervals import rate_difference
from hmpo.lab.study.outcomes import Outcome
from hmpo.lab.study.plan import Plan

DIVERGED_GAP = 1.0
"""Mean log gap of an update, in nats, above which a run counts as diverged."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """The numbers of one run that tables compare.

    Example: `score(outcome, plan).success`.
    """

    success: float | None
    """Mean sampled success of the last evaluations; None where none counts."""
    auc: float | None
    """Mean height of the sampled success over the run's updates."""
    best: float | None
    start: float | None
    failed: bool
    diverged: bool
    collapsed: bool
    """It failed, or ended below half of its best or below its start by more than chance."""


def score(outcome: Outcome, plan: Plan) -> Score:
    """The numbers of one run; a crash counts as 0 unless the protocol leaves it out."""
    steps, values = evaluated(outcome)
    later = [value for step, value in zip(steps, values) if step > 0]
    failed = outcome.status == "failed"
    success = math.fsum(later[-plan.last :]) / len(later[-plan.last :]) if later else None
    area = _area(steps, values)
    if failed:
        success, area = (0.0, 0.0) if plan.crash_is_zero else (None, None)
    best = max(values, default=None)
    return Score(
        success=success,
        auc=area,
        best=best,
        start=values[0] if steps and steps[0] == 0 else None,
        failed=failed,
        diverged=_diverged(outcome, later, best),
        collapsed=failed or _halved(later, best) or _below_start(outcome, values, steps),
    )


def evaluated(outcome: Outcome) -> tuple[list[int], list[float]]:
    """Steps and sampled success of the evaluations that measured it."""
    evals = outcome.evals
    pairs = [
        (step, value)
        for step, value in zip(evals.get("step", []), evals.get("sampled", []))
        if value is not None
    ]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _area(steps: Sequence[int], values: Sequence[float]) -> float | None:
    if len(steps) < 2 or steps[-1] <= steps[0]:
        return None
    parts = [(b - a) * (u + v) / 2 for a, b, u, v in zip(steps, steps[1:], values, values[1:])]
    return math.fsum(parts) / (steps[-1] - steps[0])


def _diverged(outcome: Outcome, later: Sequence[float], best: float | None) -> bool:
    """A mean log gap beyond `DIVERGED_GAP`, or less than half of the best success left."""
    gap = outcome.metrics.get("g_max")
    return _halved(later, best) or (gap is not None and gap >= DIVERGED_GAP)


def _halved(later: Sequence[float], best: float | None) -> bool:
    return bool(later) and best is not None and later[-1] < best / 2


def _below_start(outcome: Outcome, values: Sequence[float], steps: Sequence[int]) -> bool:
    """Whether Newcombe's 95 % interval of end less start is below 0, for as many prompts each.

    A run that learns nothing ends below its start half of the time. Where nobody said how many
    prompts there were, nothing is concluded.
    """
    n, m = outcome.before.get("n"), outcome.after.get("n")
    if not (isinstance(n, int) and isinstance(m, int) and min(n, m) > 0):
        return False
    if len(steps) < 2 or steps[0] != 0 or not all(0 <= v <= 1 for v in (values[0], values[-1])):
        return False
    start, end = values[0], values[-1]
    high = rate_difference(round(end * m), m, round(start * n), n).high
    return high is not None and high < 0


def time_to(outcome: Outcome, target: float, unit: str = "step") -> tuple[float, bool]:
    """Updates (or `tokens`) until the sampled success first reached `target`.

    Returns:
        The time and True, or the time of the last evaluation and False: censored there.
    """
    evals = outcome.evals
    last = 0.0
    for step, place, value in zip(
        evals.get("step", []), evals.get(unit, []), evals.get("sampled", [])
    ):
        last = float(place)
        if value is not None and step > 0 and value >= target:
            return last, True
    return last, False


def pass_rate(counts: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Successes, trials and k of pass@k; None where it was not measured."""
    k, n, of = (counts.get(name) for name in ("pass_at", "pass_n", "k"))
    if not (isinstance(k, int) and isinstance(n, int) and isinstance(of, int)):
        return None
    return (k, n, of) if 0 <= k <= n and n > 0 else None


def bits(outcome: Outcome, last: int) -> list[float] | None:
    """Success on each held-out prompt, mean over the last evaluations, as the endpoint takes them.

    Returns:
        One value in [0, 1] for each prompt; None where the bits were not kept.
    """
    n = outcome.after.get("n")
    steps, kept = outcome.evals.get("step", []), outcome.passed
    texts = [text for step, text in zip(steps, kept) if step > 0][-last:]
    if not isinstance(n, int) or n < 1 or not texts or len(kept) != len(steps):
        return None
    if any(len(text) != -(-n // 4) for text in texts):
        return None
    rows = [bin(int(text, 16))[2:].zfill(4 * len(text))[:n] for text in texts]
    return [sum(digit == "1" for digit in column) / len(rows) for column in zip(*rows)]
