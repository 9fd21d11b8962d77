"""When a run has come to its end, and why; a reason once given stays."""

import math

from hmpo.agm.course import PLACE, Course
from hmpo.agm.primitives import EwStat
from hmpo.agm.protocol import Controller, Decision, Record, Value, finite, number
from hmpo.config.agm import StopConfig
from hmpo.stats import wilson_interval
from hmpo.telemetry.fields import GAP

GO_ON = "continue_training"
"""What `decision/stop` says while a run goes on."""
FAULTS = ("nonfinite", "diverged", "stalled")
REASONS = (*FAULTS, "target_reached", "plateau", "budget")


class AGMConvergenceDetector(Controller):
    """Says when to stop. Only evaluations count towards a plateau, and faults are told apart.

    A log gap of zero is no success: the policy does not move. A flat performance is a plateau
    only if the phase says so, too.

    Args:
        config: settings.
    """

    SOURCE = "stop"
    PLAIN = ("stop", "phase", "best", "stale", "bad_run", "wide_run", "still_run")
    PARTS = ("course", "mean")

    def __init__(self, config: StopConfig | None = None) -> None:
        config = config or StopConfig()
        judged = ("eval/sampled_k", "eval/sampled_n") if config.target is not None else ()
        reads = (*PLACE, "nonfinite", GAP, "grad_norm", "adv/zero_frac", "decision/phase")
        super().__init__(config, {"step": reads, "eval": ("eval/mean", *judged)})
        self.course = Course()
        self.mean = EwStat(config.halflife)
        self.stop: str | None = None
        self.phase = "exploration"
        self.best: float | None = None
        self.stale = self.bad_run = self.wide_run = self.still_run = 0

    def _decide(self, record: Record, clean: bool) -> Decision:
        if record["type"] == "eval":
            reason = self._after_eval(record)
        else:
            reason = self._after_step(record, clean)
        if self.stop is None and reason in REASONS:
            self.stop = reason
        values: dict[str, Value] = {
            "stop": self.stop or GO_ON,
            "fault": self.stop in FAULTS,
            "evals_without_improvement": self.stale,
        }
        return self._decision(record, values, self.stop or reason)

    def _after_step(self, record: Record, clean: bool) -> str:
        config = self.config
        beat = self.course.follow(record)
        if beat.restarted or beat.moved:
            self._forget()
        self.phase = record["decision/phase"]
        bad = not clean or finite_or(record, "nonfinite", 1.0) != 0
        self.bad_run = self.bad_run + 1 if bad else 0
        if self.bad_run >= config.abort_confirm:
            return "nonfinite"
        if bad:
            return "nonfinite_record"
        gap = finite(record, GAP)
        if beat.gap:
            self.wide_run = self.wide_run + 1 if gap >= config.gap_abort else 0
        still = gap <= config.stall_gap and finite(record, "grad_norm") <= config.stall_grad
        still = still or finite(record, "adv/zero_frac") >= 1
        self.still_run = self.still_run + 1 if still else 0
        if self.wide_run >= config.abort_confirm:
            return "diverged"
        if self.still_run >= config.patience:
            return "stalled"
        if config.max_steps is not None and record["step"] + 1 >= config.max_steps:
            return "budget"
        return GO_ON

    def _after_eval(self, record: Record) -> str:
        config = self.config
        sign = 1.0 if config.mode == "max" else -1.0
        if not self.mean.push(sign * finite_or(record, "eval/mean", math.nan)):
            return "nonfinite_record"
        if self.mean.n >= 2 * config.halflife:  # the first few are luck
            if self.best is None or self.mean.mean > self.best + config.min_delta_sd * self.mean.sd:
                self.best, self.stale = self.mean.mean, 0
            else:
                self.stale += 1
        if config.target is not None:
            successes = int(finite(record, "eval/sampled_k"))
            trials = int(finite(record, "eval/sampled_n"))
            if wilson_interval(successes, trials)[0] >= config.target:
                return "target_reached"
        flat = self.phase in ("plateau", "convergence")
        if flat and self.stale >= config.patience and record["step"] >= config.min_steps:
            return "plateau"
        return GO_ON

    def _forget(self) -> None:
        """Another course or another task: what was best before says nothing."""
        self.mean.clear()
        self.best, self.stale = None, 0


def finite_or(record: Record, name: str, otherwise: float) -> float:
    """The field, or `otherwise` where it is not finite."""
    value = number(record, name)
    return value if value is not None and math.isfinite(value) else otherwise
