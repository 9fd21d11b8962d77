"""How far the latest batch can be trusted: diagnostics, not calibrated probabilities.

    a = within-prompt variance / total variance of the rewards         luck of the draw
    e = max(1 - ESS of the sequence weights, SE / (SE + sd between prompts))
    total = 1 - (1 - a)(1 - e)

SE = sqrt(total variance / responses). Each lies in [0, 1]; the gate looks at its percentile in
its own history, so that no scale enters.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from hmpo.agm.course import PLACE, Course
from hmpo.agm.primitives import Latch, Window, rank
from hmpo.agm.protocol import Controller, Decision, Record, finite
from hmpo.config.agm import UncertaintyConfig

READS = (*PLACE, "reward/within_var", "reward/total_var", "ratio/ess_seq", "success/n")


class AGMUncertaintyEstimator(Controller):
    """Splits a batch's uncertainty and closes a gate on batches that are unusually bad.

    Args:
        config: settings.
    """

    SOURCE = "uncertainty"
    PLAIN = ("last",)
    PARTS = ("course", "history", "latch")

    def __init__(self, config: UncertaintyConfig | None = None) -> None:
        config = config or UncertaintyConfig()
        super().__init__(config, {"step": READS})
        self.course = Course()
        self.history = Window(config.window)
        self.latch = Latch(config.enter, config.exit, config.confirm, config.dwell)
        self.last: dict[str, Any] = {"gate": False}

    def _decide(self, record: Record, clean: bool) -> Decision:
        beat = self.course.follow(record)
        if beat.restarted or beat.deeper:
            self.history.clear()
            self.latch.clear()
        if not clean:
            return self._decision(record, self.last, "nonfinite")
        if not beat.gap:
            return self._decision(record, self.last, "between_rollouts")
        a, e, reason = decompose(
            finite(record, "reward/within_var"),
            finite(record, "reward/total_var"),
            finite(record, "ratio/ess_seq"),
            int(finite(record, "success/n")),
        )
        total = 1 - (1 - a) * (1 - e)
        parts = {"aleatoric": a, "epistemic": e, "total": total}
        watched = parts[self.config.mode]
        place = rank(watched, self.history.values)
        enough = len(self.history) >= self.config.min_samples
        self.history.push(record["step"], watched)
        gate = self.latch.push(place) if enough else False
        self.last = {
            "uncertainty_a": a,
            "uncertainty_e": e,
            "uncertainty_total": total,
            "uncertainty_rank": place,
            "gate": gate,
        }
        return self._decision(record, self.last, "unusual" if gate else reason)


def decompose(within: float, total: float, ess: float, responses: int) -> tuple[float, float, str]:
    """Aleatoric and epistemic part, each in [0, 1], and what was special.

    Args:
        within: mean over prompts of the unbiased variance of their rewards.
        total: variance of all rewards.
        ess: effective sample size of the sequence weights as a share of the responses.
        responses: how many there are.
    """
    stale = max(0.0, min(1.0, 1 - ess))
    error = math.sqrt(max(0.0, total) / responses) if responses > 0 else 0.0
    if error <= 0:
        return 0.0, stale, "equal_rewards"
    aleatoric = max(0.0, min(1.0, within / total))
    between = math.sqrt(max(0.0, total - within))
    return aleatoric, max(stale, error / (error + between)), "usual"


def reliability(
    uncertainty: Sequence[float], changes: Sequence[float], bins: int = 4
) -> list[tuple[float, float, int]]:
    """How the next evaluation's change goes with the uncertainty told before it.

    Args:
        uncertainty: values told, one per interval between evaluations.
        changes: absolute change of the evaluation over the same interval.
        bins: groups of equal size, from the least uncertain.

    Returns:
        Mean uncertainty, mean change and size of each group. Useful values rise together.

    Raises:
        ValueError: lengths differ, or fewer pairs than groups.
    """
    if len(uncertainty) != len(changes) or len(changes) < bins:
        raise ValueError(
            f"got {len(uncertainty)} uncertainties and {len(changes)} changes, expected equal "
            f"numbers of at least {bins}"
        )
    pairs = sorted(zip(uncertainty, changes))
    edges = [i * len(pairs) // bins for i in range(bins + 1)]
    groups = [pairs[low:high] for low, high in pairwise(edges)]
    return [
        (math.fsum(u for u, _ in g) / len(g), math.fsum(c for _, c in g) / len(g), len(g))
        for g in groups
    ]
