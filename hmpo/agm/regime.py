"""How the dispersion of the ratios behaves: one regime for each rollout.

l = log max(g, floor),  g the log gap of the stalest update,  window of l: slope b, residual s
contraction      -b (nat per update), with its t
volatility       s
dispersion_z     robust z of l against the baseline, which stands still while unstable
convergence_rate 1 - tanh(g / 2) = 1 - (A - H) / (A + H), for display only
"""

import math
from typing import Any

from hmpo.agm.course import PLACE, Course
from hmpo.agm.primitives import Latch, Trend, Window, median, robust_z, trend
from hmpo.agm.protocol import Controller, Decision, Record, Value, number
from hmpo.config.agm import RegimeConfig
from hmpo.telemetry.fields import GAP

REGIMES = ("initialization", "stable_learning", "normal_learning", "struggling", "unstable")


def ahm_iterations(gap: float, tol: float, most: int) -> int:
    """Steps of the arithmetic-harmonic iteration until log A - log H <= tol.

    With q = tanh(gap / 4), each step squares q: the iteration is Heron's method.
    """
    if gap <= tol:
        return 0
    if gap > 100:
        return most
    # Below, tanh(gap / 4) is gap / 4, and the other form cancels.
    q = math.log(gap / 4) if gap < 1e-12 else math.log1p(-2 / (math.exp(gap / 2) + 1))
    ratio = math.log(max(math.tanh(tol / 4), 5e-324)) / q
    return min(most, max(1, math.ceil(math.log2(ratio) - 1e-12)))


class AdaptiveAGMController(Controller):
    """Names the regime of a run from its log gap, and whether growing dispersion pays.

    Args:
        config: settings.
    """

    SOURCE = "regime"
    PLAIN = ("last", "stuck")
    PARTS = ("course", "gaps", "baseline", "rewards", "latch")

    def __init__(self, config: RegimeConfig | None = None) -> None:
        config = config or RegimeConfig()
        super().__init__(config, {"step": (*PLACE, "nonfinite", GAP, "reward/mean")})
        self.course = Course()
        self.gaps = Window(config.window)
        self.baseline = Window(config.baseline_window)
        self.rewards = Window(config.performance_window)
        self.latch = Latch(enter=1.0, exit=0.5, confirm=config.confirm)
        self.last: dict[str, Any] = {"regime": "initialization", "n": 0}
        self.stuck = 0

    def _decide(self, record: Record, clean: bool) -> Decision:
        beat = self.course.follow(record)
        if beat.restarted or beat.deeper:
            self._forget()
        if beat.restarted or beat.moved:
            self.rewards.clear()
        if beat.reward:
            self.rewards.push(record["step"], record["reward/mean"])
        gap = number(record, GAP)
        if number(record, "nonfinite") != 0 or gap is None or not math.isfinite(gap):
            self.gaps.bad += 1
            return self._decision(record, {**self.last, "regime": "unstable"}, "nonfinite")
        if not beat.gap:
            return self._decision(record, self.last, "between_rollouts")
        reason, values = self._judge(record, gap)
        self.last = values
        return self._decision(record, values, reason)

    def _judge(self, record: Record, gap: float) -> tuple[str, dict[str, Value]]:
        config = self.config
        log_gap = math.log(max(gap, config.gap_floor))
        values: dict[str, Value] = {
            "convergence_rate": 1 - math.tanh(gap / 2),
            "log_gap": log_gap,
            "iterations": ahm_iterations(gap, config.tol, config.max_iterations),
        }
        limit = math.log(config.gap_target or config.gap_floor)
        z = 0.0
        if len(self.baseline) >= 2 * config.min_samples:
            z = robust_z(log_gap, self.baseline.values, config.z_floor)
            values["dispersion_z"] = z
        self.gaps.push(record["step"], log_gap)
        fit = trend(self.gaps)
        if fit is not None:
            values |= {
                "contraction": 0.0 - fit.slope,
                "contraction_t": 0.0 - fit.t,
                "volatility": fit.sd,
                "oscillation": fit.oscillation,
            }
        strain = z / config.z_hi if log_gap > limit else 0.0
        if fit is not None and len(self.gaps) >= config.min_samples:
            wide = median(self.gaps.values) > limit
            strain = max(strain, fit.sd / config.vol_hi if wide else 0.0)
        unstable = self.latch.push(strain)
        self.stuck = self.stuck + 1 if unstable else 0
        if not unstable or self.stuck > config.thaw:
            self.baseline.push(record["step"], log_gap)
        reason = self._reason(fit, gap, unstable)
        values |= {"regime": _REGIME[reason], "n": len(self.gaps)}
        return reason, values

    def _reason(self, fit: Trend | None, gap: float, unstable: bool) -> str:
        config = self.config
        if fit is None or len(self.gaps) < config.min_samples:
            return "few_samples"
        if unstable:
            return "dispersed"
        if fit.t >= 2 and fit.rise >= math.log(2) and not self._pays():
            return "growing"
        flat = abs(fit.rise) <= config.band and fit.sd <= config.vol_hi / 2
        if flat and (config.gap_target is None or gap <= config.gap_target):
            return "flat"
        return "moving"

    def _pays(self) -> bool:
        """Whether the rewards rise, as far as is known."""
        fit = trend(self.rewards)
        return fit is not None and len(self.rewards) >= self.config.min_samples and fit.t >= 1

    def _forget(self) -> None:
        self.gaps.clear()
        self.baseline.clear()
        self.latch.clear()
        self.last = {"regime": "initialization", "n": 0}
        self.stuck = 0


_REGIME = {
    "few_samples": "initialization",
    "dispersed": "unstable",
    "growing": "struggling",
    "flat": "stable_learning",
    "moving": "normal_learning",
}
