"""Where in its course a training is, and the exponent that suits it.

The trend of the performance and the regime of the dispersion tell the phase; the phase names a
strategy; a strategy is a setting of p. The weighted mean A^w H^(1-w) equals M_(2w-1) to second
order in the log ratios, so each strategy of the family has a p.
"""

import math
from typing import Any

from hmpo.agm.course import PLACE, Course
from hmpo.agm.primitives import Trend, Window, held, trend
from hmpo.agm.protocol import Controller, Decision, Record, Value, finite, number
from hmpo.config.agm import PhaseConfig, StrategyConfig
from hmpo.telemetry.fields import GAP

PHASES = ("exploration", "exploitation", "plateau", "convergence", "instability")


class TrainingPhaseDetector(Controller):
    """Names the phase from the trend of a performance series and the regime.

    Args:
        config: settings.
    """

    SOURCE = "phase"
    PLAIN = ("phase", "raw", "run", "since", "since_step", "struggles", "plateau", "last")
    PARTS = ("course", "values", "gaps")

    def __init__(self, config: PhaseConfig | None = None) -> None:
        config = config or PhaseConfig()
        reads = (*PLACE, config.performance, GAP, "decision/regime")
        super().__init__(config, {"step": reads})
        self.course = Course()
        self.values = Window(config.window)
        self.gaps = Window(config.window)
        self._begin()

    def _begin(self) -> None:
        self.phase = self.raw = "exploration"
        self.run = self.since = self.since_step = self.struggles = self.plateau = 0
        self.last: dict[str, Any] = {"phase": self.phase, "warm": False, "since_step": 0}

    def _decide(self, record: Record, clean: bool) -> Decision:
        beat = self.course.follow(record)
        if beat.restarted or beat.deeper:
            self.gaps.clear()
        if beat.restarted or beat.moved:
            self.values.clear()
            self._begin()
            self.since_step = record["step"]
        gap = number(record, GAP)
        if beat.gap and gap is not None:
            self.gaps.push(record["step"], math.log(max(gap, 1e-12)))
        if not beat.reward:
            return self._decision(record, self.last, "between_rollouts")
        sign = 1.0 if self.config.mode == "max" else -1.0
        value = number(record, self.config.performance)
        assert value is not None
        if not self.values.push(record["step"], sign * value):
            return self._decision(record, self.last, "nonfinite")
        fit = trend(self.values)
        reason = self._advance(record, fit)
        self.last = {
            "phase": self.phase,
            "raw_phase": self.raw,
            "warm": len(self.values) >= self.config.min_samples,
            "since_step": self.since_step,
        }
        if fit is not None:
            self.last |= {
                "performance_t": fit.t,
                "performance_effect": fit.effect,
                "phase_confidence": min(1.0, abs(fit.t) / self.config.t_hi),
            }
        return self._decision(record, self.last, reason)

    def _advance(self, record: Record, fit: Trend | None) -> str:
        """Classify, and change the phase where enough values agree."""
        regime = record["decision/regime"]
        self.struggles = self.struggles + 1 if regime == "struggling" else 0
        raw, reason = self._classify(regime, fit)
        self.plateau = self.plateau + 1 if raw in ("plateau", "convergence") else 0
        self.run = self.run + 1 if raw == self.raw else 1
        self.raw = raw
        self.since += 1
        urgent = raw == "instability"
        agreed = self.run >= (2 if urgent else self.config.confirm)
        if raw != self.phase and agreed and (urgent or self.since >= self.config.dwell):
            self.phase, self.since, self.since_step = raw, 0, record["step"]
        return reason

    def _classify(self, regime: str, fit: Trend | None) -> tuple[str, str]:
        config = self.config
        if fit is None or len(self.values) < config.min_samples:
            return "exploration", "few_samples"
        if regime == "unstable":
            return "instability", "unstable"
        if fit.t <= -config.t_hi:
            return "instability", "performance_falls"
        if self.struggles >= config.confirm:
            return "instability", "struggling"
        if fit.t >= config.t_hi and regime in ("stable_learning", "normal_learning"):
            return "exploitation", "performance_rises"
        flat = abs(fit.t) <= config.t_lo and abs(fit.effect) <= config.effect_lo
        if flat and regime == "stable_learning":
            if self.plateau >= 2 * config.window and not self._gap_rises():
                return "convergence", "performance_flat_for_long"
            return "plateau", "performance_flat"
        return "exploration", "undecided"

    def _gap_rises(self) -> bool:
        fit = trend(self.gaps)
        return fit is not None and fit.t >= self.config.t_hi


class TrainingPhaseAdaptiveAGM(Controller):
    """Gives each phase its strategy and moves p towards it by at most `max_move` per update.

    Args:
        config: settings.
    """

    SOURCE = "strategy"

    def __init__(self, config: StrategyConfig | None = None) -> None:
        reads = ("ratio/p", "decision/phase", "decision/warm", "decision/since_step")
        super().__init__(config or StrategyConfig(), {"step": reads})

    def _decide(self, record: Record, clean: bool) -> Decision:
        if not clean:
            return self._decision(record, {"strategy": "keep"}, "nonfinite")
        config, p = self.config, finite(record, "ratio/p")
        if not record["decision/warm"]:
            return self._decision(record, {"strategy": "keep", "p": p, "p_target": p}, "warmup")
        phase = record["decision/phase"]
        strategy, target = {
            "exploration": ("arithmetic_weighted_agm", config.exploration_p),
            "exploitation": ("standard_agm", config.exploitation_p),
            "instability": ("harmonic_weighted_agm", config.instability_p),
            "convergence": ("geometric_mean_direct", 0.0),
            "plateau": ("oscillating_agm", 0.0),
        }[phase]
        if phase == "plateau":
            turn = (record["step"] - record["decision/since_step"]) / config.period
            target = config.boost * math.sin(2 * math.pi * turn)
        values: dict[str, Value] = {
            "strategy": strategy,
            "p_target": target,
            "p": moved(p, target, config.max_move, config.low, config.high),
            "aggregation": config.aggregation,
            "weight": max(0.0, min(1.0, (target + 1) / 2)),
        }
        return self._decision(record, values, phase)


def moved(p: float, target: float, most: float, low: float, high: float) -> float:
    """`p` one move nearer to `target`; the target lies within [low, high], p may not yet."""
    target = max(low, min(high, target))
    return target if abs(target - p) <= most else p + held(target - p, most)
