"""A KL budget kept by the learning rate, and what goes with it.

    u = median of log g over the last rollouts - log target,   g ~ 2 KL
    |u| > dead band:  log lr moves by -gain dwell clip(u, +-2), by at most log step_max

An unstable regime halves the learning rate once, a gap far above the target at once and again as
long as it lasts, a falling performance after a change takes back
the last values that were good. What was decided counts only once it is committed.
"""

import math
from collections.abc import Mapping
from typing import Any

from hmpo.agm.course import PLACE, Course
from hmpo.agm.phase import moved
from hmpo.agm.primitives import NEVER, EwStat, Latch, Multiplier, Window, held, median, trend
from hmpo.agm.protocol import Controller, Decision, Record, Value, finite, number
from hmpo.config.agm import AdapterConfig
from hmpo.errors import ConfigError
from hmpo.telemetry.fields import GAP

CUT = 0.5
"""Factor on the learning rate in an emergency."""


class AGMHyperparameterAdapter(Controller):
    """Proposes factors of learning rate, clip width and batch, and the exponent.

    `update` proposes and `commit` tells that a proposal was applied; without it nothing changes.
    Timers count rollouts.

    Args:
        config: settings; only what `controls` names is moved.
    """

    SOURCE = "hyperparameters"
    PLAIN = ("beats", "timers", "good", "best", "proposed", "reference", "falls")
    PARTS = ("course", "gaps", "variances", "rewards", "mean", "band", "lr", "eps", "batch")

    def __init__(self, config: AdapterConfig | None = None) -> None:
        config = config or AdapterConfig()
        reads = (*PLACE, "nonfinite", GAP, "reward/mean", "decision/regime")
        if "eps" in config.controls:
            reads += ("ratio/d_var",)
        if "p" in config.controls:
            reads += ("ratio/p", "decision/p_target")
        super().__init__(config, {"step": reads})
        self.course = Course()
        self.gaps, self.variances = (Window(config.median_window) for _ in range(2))
        self.rewards = Window(config.performance_window)
        self.mean = EwStat(config.performance_window / 2)
        self.band = Latch(config.dead_band, config.dead_band / 2)
        self.lr = Multiplier(config.lr_low, config.lr_high, config.step_max)
        self.eps = Multiplier(config.eps_low, config.eps_high, config.step_max)
        self.batch = Multiplier(1.0, config.batch_high, config.step_max)
        self.beats = 0
        self.timers = {"change": NEVER, "cut": NEVER, "lock": NEVER, "unstable": NEVER}
        """Rollout of the last change, emergency, rollback, and unstable regime."""
        self.good: dict[str, float] = {}
        """Values in force when the performance was best."""
        self.best: float | None = None
        self.proposed: dict[str, Any] = {"step": -1, "reason": "hold"}
        self.reference: float | None = None
        """Token variance that the clip width is calibrated on."""
        self.falls = 0
        """Rewards in a row whose trend was down."""

    # ---------------------------------------------------------------------------------- proposing

    def _decide(self, record: Record, clean: bool) -> Decision:
        beat = self.course.follow(record)
        if beat.restarted or beat.deeper:
            self._forget_gaps()
        if beat.restarted or beat.moved:
            self._forget_rewards()
        self.beats += beat.reward
        if beat.reward:
            self._follow_rewards(record)
        if beat.gap:
            self._follow_gaps(record)
        unstable = record["decision/regime"] == "unstable"
        if unstable:
            self.timers["unstable"] = self.beats
        bad = not clean or number(record, "nonfinite") != 0
        gap = finite_or_none(record, GAP)
        far = gap is not None and gap > self.config.panic * self.config.gap_target
        wanted, reason = self._wanted(record, unstable, bad, far)
        values = self._values(wanted) | {"skip_update": bad}
        self.proposed = {"step": record["step"], "reason": reason}
        return self._decision(record, values, reason)

    def held(self, record: Record) -> dict[str, Value]:
        """The values in force, for whoever overrules a proposal."""
        wanted = self._applied(record)
        return {f"decision/{name}": value for name, value in self._values(wanted).items()}

    @property
    def factors(self) -> dict[str, float]:
        """The factors in force, by the names of their decisions."""
        parts = {"lr": self.lr, "eps": self.eps, "batch": self.batch}
        return {f"decision/{name}_mult": part.value for name, part in parts.items()}

    def _applied(self, record: Record) -> dict[str, float]:
        wanted = {"lr_mult": self.lr.value}
        if "eps" in self.config.controls:
            wanted["eps_mult"] = self.eps.value
        if "batch" in self.config.controls:
            wanted["batch_mult"] = self.batch.value
        p = number(record, "ratio/p") if "p" in self.config.controls else None
        if p is not None and math.isfinite(p):
            wanted["p"] = p
        return wanted

    def _wanted(
        self, record: Record, unstable: bool, bad: bool, far: bool
    ) -> tuple[dict[str, float], str]:
        """The values to propose and the most important reason."""
        wanted = self._applied(record)
        since_change = self.beats - self.timers["change"]
        locked = self.beats - self.timers["lock"] < self.config.cooldown
        since_cut = self.beats - self.timers["cut"]
        cut_lately = since_cut < self.config.cooldown
        cut = (unstable or bad) and not cut_lately
        cut = cut or (far and since_cut >= self.config.dwell)
        if cut and "lr" in self.config.controls:
            sane = min(self.lr.value, self.good.get("lr_mult", self.lr.value))
            wanted["lr_mult"] = max(self.config.lr_low, CUT * sane)
            reason = "nonfinite" if bad else "emergency"
        elif self._was_bad(since_change) and not locked and self._differs(wanted):
            ceiling = self.lr.value if unstable or cut_lately else math.inf
            wanted |= {name: value for name, value in self.good.items() if name != "p"}
            wanted["lr_mult"] = min(wanted["lr_mult"], ceiling)
            reason = "rollback"
        elif locked or cut_lately:
            reason = "cooldown"
        else:
            reason = self._budget(wanted, since_change)
        if not bad:
            before = (wanted.get("eps_mult"), wanted.get("batch_mult"))
            self._adjust(record, wanted, unstable, locked or reason == "rollback")
            after = (wanted.get("eps_mult"), wanted.get("batch_mult"))
            if before != after and reason not in ("emergency", "rollback", "budget"):
                reason = "clip_width" if before[0] != after[0] else "batch"
        return wanted, reason

    def _budget(self, wanted: dict[str, float], since_change: int) -> str:
        """Move the learning rate towards the KL budget."""
        config = self.config
        if "lr" not in config.controls or len(self.gaps) < config.median_window:
            return "few_samples"
        u = median(self.gaps.values) - math.log(config.gap_target)
        if not self.band.on:
            return "in_budget"
        if since_change < config.dwell:
            return "dwell"
        wanted["lr_mult"] = self.lr.moved(-config.gain * config.dwell * held(u, 2.0))
        return "at_bound" if wanted["lr_mult"] == self.lr.value else "budget"

    def _adjust(
        self, record: Record, wanted: dict[str, float], unstable: bool, locked: bool
    ) -> None:
        """Clip width, batch and exponent, which follow their own signals."""
        config = self.config
        reference = self.reference if self.variances.values else None
        if "eps" in config.controls and reference is not None and not locked:
            v = max(median(self.variances.values), 1e-300)
            spread = math.sqrt(max(v / reference, 5e-324))
            aim = math.log(spread) - math.log(self.eps.value)
            eps = self.eps.moved(aim)
            dispersed = unstable or self.band.on
            wanted["eps_mult"] = min(eps, self.eps.value) if dispersed else eps
        if "batch" in config.controls and not locked:
            calm = self.beats - self.timers["unstable"] >= config.cooldown
            if self.beats - self.timers["change"] >= config.dwell:
                if unstable:
                    wanted["batch_mult"] = self.batch.moved(math.log(config.step_max))
                elif calm and self.batch.value > 1:
                    wanted["batch_mult"] = self.batch.moved(-math.log(config.step_max))
        if "p" in wanted:
            goal = finite(record, "decision/p_target") if not locked else wanted["p"]
            goal = self.good.get("p", goal) if locked else goal
            wanted["p"] = moved(wanted["p"], goal, config.p_move, config.p_low, config.p_high)

    def _values(self, wanted: Mapping[str, float]) -> dict[str, Value]:
        """Factors and, where the base is known, what they come to; a batch in whole units."""
        config = self.config
        values: dict[str, Value] = dict(wanted)
        if config.base_lr is not None:
            values["lr"] = config.base_lr * wanted["lr_mult"]
        if config.base_eps is not None and "eps_mult" in wanted:
            values["eps"] = config.base_eps * wanted["eps_mult"]
        if config.base_batch is not None and "batch_mult" in wanted:
            units = math.ceil(config.base_batch * wanted["batch_mult"] / config.batch_unit - 1e-9)
            most = math.floor(config.base_batch * config.batch_high / config.batch_unit + 1e-9)
            values["batch"] = min(units, most) * config.batch_unit
        return values

    # ---------------------------------------------------------------------------------- observing

    def _follow_rewards(self, record: Record) -> None:
        reward = finite_or_none(record, "reward/mean")
        if reward is None:
            self.rewards.bad += 1
            return
        self.rewards.push(record["step"], reward)
        self.mean.push(reward)
        fit = trend(self.rewards) if self.rewards.full else None
        falling = fit is not None and fit.t <= -self.config.t_hi
        self.falls = self.falls + 1 if falling else 0
        settled = self.mean.n >= self.config.performance_window // 2
        calm = record["decision/regime"] not in ("unstable", "struggling")
        if settled and calm and (self.best is None or self.mean.mean >= self.best):
            self.best, self.good = self.mean.mean, self._applied(record)

    def _follow_gaps(self, record: Record) -> None:
        gap = finite_or_none(record, GAP)
        if gap is None:
            self.gaps.bad += 1
            return
        self.gaps.push(record["step"], math.log(max(gap, 1e-12)))
        if len(self.gaps) == self.config.median_window:
            self.band.push(abs(median(self.gaps.values) - math.log(self.config.gap_target)))
        if "eps" not in self.config.controls:
            return
        variance = finite_or_none(record, "ratio/d_var")
        if variance is not None and self.variances.push(record["step"], variance):
            enough = len(self.variances) == self.config.median_window
            if self.reference is None and enough and median(self.variances.values) > 0:
                self.reference = median(self.variances.values)

    def _was_bad(self, since_change: int) -> bool:
        """Whether the performance falls soon after a change."""
        return since_change <= self.config.cooldown and self.falls >= self.config.confirm

    def _differs(self, wanted: Mapping[str, float]) -> bool:
        return any(wanted.get(name) != value for name, value in self.good.items() if name != "p")

    def _forget_gaps(self) -> None:
        self.gaps.clear()
        self.variances.clear()
        self.band.clear()

    def _forget_rewards(self) -> None:
        self.rewards.clear()
        self.mean.clear()
        self.best, self.good, self.falls = None, {}, 0

    # --------------------------------------------------------------------------------- committing

    def commit(self, decision: Decision, applied: Mapping[str, Value] | None = None) -> None:
        """Take the values that were applied as those in force.

        Raises:
            ConfigError: the decision is not the latest, or an applied value is no finite number.
        """
        if decision.step != self.proposed["step"]:
            raise ConfigError(
                f"commit: got the decision of step {decision.step}, expected that of step "
                f"{self.proposed['step']}, the latest"
            )
        values = decision.values if applied is None else applied
        changed = False
        for name, part in (("lr", self.lr), ("eps", self.eps), ("batch", self.batch)):
            value = values.get(f"decision/{name}_mult")
            if value is None:
                continue
            if isinstance(value, str) or not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}_mult: got {value!r}, expected a finite number > 0")
            changed = changed or float(value) != part.value
            part.set(float(value))
        if not changed:
            return
        self.timers["change"] = self.beats
        if self.proposed["reason"] in ("emergency", "nonfinite"):
            self.timers["cut"] = self.beats
        if self.proposed["reason"] == "rollback":
            self.timers["lock"] = self.beats
            self.rewards.clear()
            self.falls = 0


def finite_or_none(record: Record, name: str) -> float | None:
    """The field, or None where it is not finite."""
    value = number(record, name)
    return value if value is not None and math.isfinite(value) else None
