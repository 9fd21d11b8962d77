"""Advice on three scales: at once, soon, and in the long run."""

import math
from dataclasses import dataclass
from typing import Any

from hmpo.agm.course import PLACE, Course
from hmpo.agm.primitives import EwStat, Trend, Window, robust_z, trend
from hmpo.agm.protocol import Controller, Decision, Record, number
from hmpo.config.agm import ScalesConfig
from hmpo.telemetry.fields import GAP

UNKNOWN = "insufficient_data"
OSCILLATION = 20
"""Gaps in which an alternation is looked for; means of blocks would hide it."""


@dataclass(frozen=True, kw_only=True)
class AdaptationSignal:
    """What the three scales advise; a scale that has seen too little says `insufficient_data`.

    Example: `AdaptationSignal(immediate="continue_current", tactical="maintain_course",
    strategic="insufficient_data")`.
    """

    immediate: str
    """emergency_conservative_mode, accelerate_slightly, continue_current."""
    tactical: str
    """dampen_oscillations, increase_stability, increase_exploration, maintain_course."""
    strategic: str
    """reset_to_checkpoint, curriculum_advancement, maintain_strategy, standard_operation."""


class AGMTracker:
    """One view of the rewards: the last `scale` of them, and their weighted mean at its best.

    Args:
        scale: rewards in view.
        min_fill: share of them that must be there.
        blocks: most entries kept; longer views keep means of blocks.
    """

    def __init__(self, scale: int, min_fill: float, blocks: int) -> None:
        block = -(-scale // blocks)
        self.rewards = Window(scale // block, block)
        self.needed = math.ceil(min_fill * (scale // block))
        self.mean = EwStat(scale / 3)
        self.least = math.ceil(min_fill * scale)
        self.best: float | None = None
        self.best_step = 0

    def push(self, step: int, reward: float) -> None:
        """Take in a rollout's reward."""
        self.rewards.push(step, reward)
        if not self.mean.push(reward) or self.mean.n < self.least:
            return
        if self.best is None or self.mean.mean > self.best:
            self.best, self.best_step = self.mean.mean, step

    def clear(self) -> None:
        """Forget the rewards."""
        self.rewards.clear()
        self.mean.clear()
        self.best, self.best_step = None, 0

    @property
    def trend(self) -> Trend | None:
        """Trend of the view; None before it is filled enough."""
        return trend(self.rewards) if len(self.rewards) >= self.needed else None

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        parts = {"rewards": self.rewards.state_dict(), "mean": self.mean.state_dict()}
        return {**parts, "best": self.best, "best_step": self.best_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self.rewards.load_state_dict(state["rewards"])
        self.mean.load_state_dict(state["mean"])
        self.best, self.best_step = state["best"], state["best_step"]


class MultiScaleAGMFramework(Controller):
    """Advises from the log gap and the rewards, each scale in its own words.

    Args:
        config: settings.
    """

    SOURCE = "scales"
    PLAIN = ("resets", "last")
    PARTS = ("course", "short", "medium", "long", "near", "gaps")

    def __init__(self, config: ScalesConfig | None = None) -> None:
        config = config or ScalesConfig()
        reads = (*PLACE, GAP, "reward/mean", "decision/regime")
        super().__init__(config, {"step": reads})
        self.course = Course()
        self.short, self.medium, self.long = (
            AGMTracker(scale, config.min_fill, config.blocks) for scale in config.scales
        )
        self.near = Window(OSCILLATION)
        block = -(-config.scales[1] // config.blocks)
        self.gaps = Window(config.scales[1] // block, block)
        self.resets: dict[str, int] = {"count": 0, "rewards_since": 0}
        self.last: dict[str, Any] = {
            "immediate": UNKNOWN,
            "tactical": UNKNOWN,
            "strategic": UNKNOWN,
        }

    def _decide(self, record: Record, clean: bool) -> Decision:
        beat = self.course.follow(record)
        step, regime = record["step"], record["decision/regime"]
        if beat.restarted or beat.deeper:
            self.near.clear()
            self.gaps.clear()
        if beat.restarted or beat.moved:
            for tracker in (self.short, self.medium, self.long):
                tracker.clear()
        reward, gap = number(record, "reward/mean"), number(record, GAP)
        assert reward is not None and gap is not None
        if beat.reward:
            self.resets["rewards_since"] += 1
            for tracker in (self.short, self.medium, self.long):
                tracker.push(step, reward)
        z = None
        if beat.gap and math.isfinite(gap):
            log_gap = math.log(max(gap, self.config.gap_floor))
            if self._filled:
                z = robust_z(log_gap, self.gaps.values, 0.1)
            self.gaps.push(step, log_gap)
            self.near.push(step, log_gap)
        if regime == "unstable" or beat.gap:
            signal = self._signal(regime, z, gap)
            self.last = {
                "immediate": signal.immediate,
                "tactical": signal.tactical,
                "strategic": signal.strategic,
            }
            if signal.strategic == "reset_to_checkpoint":
                assert self.long.best is not None
                self.last["reset_to_step"] = self.long.best_step
                self.resets = {"count": self.resets["count"] + 1, "rewards_since": 0}
            return self._decision(record, self.last, "judged" if clean else "nonfinite")
        if self.last["strategic"] == "reset_to_checkpoint":
            self.last = {**self.last, "strategic": "standard_operation"}
            del self.last["reset_to_step"]
        return self._decision(record, self.last, "between_rollouts")

    def _signal(self, regime: str, z: float | None, gap: float) -> AdaptationSignal:
        short = self.short.trend
        if regime == "unstable":
            immediate = "emergency_conservative_mode"
        elif short is None or z is None:
            immediate = UNKNOWN
        else:
            calm = z <= -1 and short.t >= 0
            immediate = "accelerate_slightly" if calm else "continue_current"
        return AdaptationSignal(
            immediate=immediate, tactical=self._tactical(), strategic=self._strategic(regime, gap)
        )

    @property
    def _filled(self) -> bool:
        """Whether the medium view of the gaps says anything."""
        size = self.gaps.values.maxlen or 0
        return len(self.gaps) >= max(3, math.ceil(self.config.min_fill * size))

    def _tactical(self) -> str:
        rewards = self.medium.trend
        gaps = trend(self.gaps) if self._filled else None
        if rewards is None or gaps is None:
            return UNKNOWN
        near = trend(self.near)
        if near is not None and near.oscillation >= 0.5:
            return "dampen_oscillations"
        if gaps.t >= 3 and gaps.rise >= math.log(1.5):
            return "increase_stability"
        if abs(rewards.t) < 1 and gaps.t <= -3:
            return "increase_exploration"
        return "maintain_course"

    def _strategic(self, regime: str, gap: float) -> str:
        fit = self.long.trend
        if fit is None or self.long.best is None:
            return UNKNOWN
        fell = fit.t <= -3 and self.long.best - self.long.mean.mean >= 3 * fit.sd
        danger = regime == "unstable" or gap > 4 * self.config.gap_target
        rested = self.resets["count"] == 0 or self.resets["rewards_since"] >= self.config.scales[2]
        if fell and danger and rested:
            return "reset_to_checkpoint"
        if abs(fit.t) <= 1 and abs(fit.effect) <= 0.5:
            return "curriculum_advancement"
        return "maintain_strategy" if fit.t >= 3 else "standard_operation"
