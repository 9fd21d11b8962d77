"""Settings of the adaptive controllers (`hmpo.agm`), one class each; standard library only.

Counts of records mean rollouts, unless "updates" is said. Log gaps are in nats; twice the KL
divergence, in nats per token, for normal log ratios.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from hmpo.config.checks import EXPONENT, at_least, between, positive, within_reason
from hmpo.errors import require


@dataclass(frozen=True, kw_only=True)
class RegimeConfig:
    """`AdaptiveAGMController`: how the dispersion of the ratios behaves."""

    window: int = 20
    """Gaps that trend, volatility and oscillation are taken from."""
    baseline_window: int = 100
    """Gaps that say what is usual."""
    min_samples: int = 10
    """Gaps before anything but `initialization` is said; twice as many make a baseline."""
    z_hi: float = 4.0
    """Robust standard deviations above the usual that are unstable."""
    z_floor: float = 0.1
    """Least robust standard deviation of the log gap."""
    vol_hi: float = math.log(2)
    """Residual standard deviation of the log gap that is unstable."""
    band: float = math.log(1.25)
    """Rise of the log gap over the window that still counts as none."""
    confirm: int = 2
    """Gaps in a row until unstable."""
    thaw: int = 50
    """Unstable gaps after which a lasting new level enters the baseline."""
    gap_floor: float = 1e-4
    """Gaps below this count as this: policies that close differ by rounding and luck."""
    gap_target: float | None = 2e-2
    """Log gap up to which no run is unstable, and above which none is stable; None: no limit."""
    performance_window: int = 50
    """Rewards that say whether growing dispersion pays."""
    tol: float = 1e-6
    """Log gap at which the arithmetic-harmonic iteration counts as converged."""
    max_iterations: int = 12
    """Most iterations that are reported."""

    def __post_init__(self) -> None:
        within_reason(self)
        at_least(self, 3, "window", "baseline_window", "min_samples", "performance_window")
        at_least(self, 1, "confirm", "thaw", "max_iterations")
        positive(self, "z_hi", "z_floor", "vol_hi", "band", "gap_floor", "tol")
        if self.gap_target is not None:
            positive(self, "gap_target")
        most = min(self.window, self.baseline_window)
        require(self.min_samples <= most, "min_samples", self.min_samples, f"at most {most}")


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """`TrainingPhaseDetector`: where in its course a training is."""

    performance: str = "reward/mean"
    """Field of the step record that is to improve."""
    mode: Literal["max", "min"] = "max"
    """Whether more of it is better."""
    window: int = 50
    """Values that the trend is taken from."""
    min_samples: int = 20
    """Values before a phase is told."""
    t_hi: float = 3.0
    """t from which on a trend is one."""
    t_lo: float = 1.0
    """t up to which there is none."""
    effect_lo: float = 0.5
    """Rise, in residual standard deviations, up to which there is none."""
    confirm: int = 3
    """Values in a row that must agree on another phase."""
    dwell: int = 25
    """Values that a phase lasts at least; instability comes without waiting."""

    def __post_init__(self) -> None:
        within_reason(self)
        at_least(self, 3, "window", "min_samples")
        at_least(self, 1, "confirm")
        at_least(self, 0, "dwell")
        positive(self, "t_hi", "t_lo", "effect_lo")
        require(self.min_samples <= self.window, "min_samples", self.min_samples, "<= window")
        require(self.t_lo < self.t_hi, "t_lo", self.t_lo, f"less than t_hi = {self.t_hi:g}")
        require(self.mode in ("max", "min"), "mode", self.mode, '"max" or "min"')


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """`TrainingPhaseAdaptiveAGM`: the exponent of each phase."""

    exploration_p: float = 0.6
    """arithmetic_weighted_agm: to second order the weighted mean A^0.8 H^0.2."""
    exploitation_p: float = 0.0
    """standard_agm: to second order sqrt(A H)."""
    instability_p: float = -0.6
    """harmonic_weighted_agm: to second order A^0.2 H^0.8."""
    boost: float = 0.3
    """oscillating_agm, on a plateau: amplitude of p."""
    period: int = 10
    """oscillating_agm: period in updates."""
    max_move: float = 0.1
    """Most that p moves in one update; beside the other controllers `adapter.p_move` decides it."""
    low: float = -2.0
    """Least p."""
    high: float = 2.0
    """Greatest p."""
    aggregation: Literal["power", "ahm"] = "power"
    """What `p_target` or `weight` is meant for: the power mean M_p, or A^w H^(1-w)."""

    def __post_init__(self) -> None:
        within_reason(self, low=EXPONENT, high=EXPONENT, boost=EXPONENT)
        positive(self, "max_move")
        at_least(self, 2, "period")
        require(self.max_move <= 0.1, "max_move", self.max_move, "at most 0.1")
        require(self.low < self.high, "low", self.low, f"less than high = {self.high:g}")
        for name in ("exploration_p", "exploitation_p", "instability_p"):
            value = getattr(self, name)
            require(self.low <= value <= self.high, name, value, "a number in [low, high]")
        require(0 <= self.boost <= min(-self.low, self.high), "boost", self.boost, "in the bounds")
        require(self.aggregation in ("power", "ahm"), "aggregation", self.aggregation, "power, ahm")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """`AGMHyperparameterAdapter`: a KL budget kept by the learning rate, and what goes with it."""

    controls: tuple[str, ...] = ("lr",)
    """What it may move: lr, eps, batch, p."""
    gap_target: float = 2e-2
    """Log gap of the stalest updates that is aimed at: a KL budget of half of it per rollout."""
    dead_band: float = math.log(1.5)
    """Distance of the log gap from its target that is left alone."""
    gain: float = 0.15
    """Share of the distance that the log learning rate moves, per rollout of `dwell`."""
    panic: float = 10.0
    """Multiple of the target at which the learning rate is halved at once, and again after
    `dwell` as long as it lasts."""
    step_max: float = 1.25
    """Most that a factor changes at a time, save in an emergency."""
    lr_low: float = 0.25
    """Least factor of the learning rate."""
    lr_high: float = 1.0
    """Greatest factor of the learning rate. At 1 the budget is a ceiling; above, a small gap
    raises the learning rate, also where a schedule has just lowered it on purpose."""
    eps_low: float = 0.5
    """Least factor of the clip width."""
    eps_high: float = 2.0
    """Greatest factor of the clip width."""
    batch_high: float = 4.0
    """Greatest factor of the batch."""
    p_low: float = -2.0
    """Least exponent."""
    p_high: float = 2.0
    """Greatest exponent."""
    p_move: float = 0.1
    """Most that the exponent moves in one update."""
    dwell: int = 5
    """Rollouts between two changes."""
    median_window: int = 10
    """Gaps whose median is compared with the target."""
    cooldown: int = 50
    """Rollouts that a change is watched, and that nothing changes after a rollback."""
    performance_window: int = 30
    """Rewards whose trend tells whether a change was bad."""
    t_hi: float = 3.0
    """t of a falling performance that is a bad change."""
    confirm: int = 3
    """Rewards in a row that must say so."""
    base_lr: float | None = None
    """Learning rate that the factor is of; None tells the factor alone."""
    base_eps: float | None = None
    """Clip half-width that the factor is of, likewise."""
    base_batch: int | None = None
    """Responses per update that the factor is of; needed to control batch."""
    batch_unit: int = 1
    """The batch stays a multiple of it: group size times processes."""

    def __post_init__(self) -> None:
        within_reason(self, p_low=EXPONENT, p_high=EXPONENT)
        known = ("lr", "eps", "batch", "p")
        require(set(self.controls) <= set(known), "controls", self.controls, f"some of {known}")
        positive(self, "gap_target", "dead_band", "gain", "lr_low", "eps_low", "t_hi")
        at_least(self, 1, "dwell", "median_window", "cooldown", "confirm", "batch_unit")
        at_least(self, 3, "performance_window")
        require(self.panic > 1, "panic", self.panic, "a number > 1")
        require(self.step_max > 1, "step_max", self.step_max, "a number > 1")
        for name in ("lr_low", "eps_low"):
            require(getattr(self, name) <= 1, name, getattr(self, name), "at most 1")
        for name in ("lr_high", "eps_high", "batch_high"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.p_low < self.p_high, "p_low", self.p_low, f"less than p_high = {self.p_high}")
        require(0 < self.p_move <= 0.1, "p_move", self.p_move, "a number in (0, 0.1]")
        batch = self.base_batch
        if "batch" in self.controls:
            whole = batch is not None and batch > 0 and batch % self.batch_unit == 0
            require(whole, "base_batch", batch, f"a multiple of batch_unit = {self.batch_unit}")


@dataclass(frozen=True, kw_only=True)
class ScalesConfig:
    """`MultiScaleAGMFramework`: advice at once, soon, and in the long run."""

    scales: tuple[int, int, int] = (10, 100, 1000)
    """Records of the short, medium and long view."""
    min_fill: float = 0.5
    """Share of a view that must be there before it says anything."""
    blocks: int = 50
    """Most entries kept of a view of rewards; longer views keep means of blocks."""
    gap_target: float = 2e-2
    """Four times this gap, with falling performance, calls for a checkpoint."""
    gap_floor: float = 1e-4
    """Gaps below this count as this."""

    def __post_init__(self) -> None:
        within_reason(self)
        rising = list(self.scales) == sorted(set(self.scales)) and len(self.scales) == 3
        require(rising and self.scales[0] >= 6, "scales", self.scales, "three rising sizes >= 6")
        require(0 < self.min_fill <= 1, "min_fill", self.min_fill, "a number in (0, 1]")
        at_least(self, 10, "blocks")
        positive(self, "gap_target", "gap_floor")


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """`AGMCurriculumController`: when to go to another level of a task."""

    levels: int = 1
    """Levels of the task, from 1."""
    promote: float = 0.8
    """Success rate that the interval must lie above."""
    demote: float = 0.4
    """Success rate that the interval must lie below."""
    min_trials: int = 64
    """Trials before anything is decided."""
    max_trials: int = 256
    """Newest trials that count: older ones are of a weaker policy."""
    confidence: float = 0.95
    """Coverage of the Wilson interval."""
    confirm: int = 2
    """Rollouts in a row that must agree."""
    dwell: int = 20
    """Rollouts between two changes."""
    consolidate: float = 0.9
    """Success rate above which an unstable run is told to stay and settle."""
    mix_previous: float = 0.2
    """Share of prompts from the level below, so that it is not forgotten."""

    def __post_init__(self) -> None:
        within_reason(self)
        at_least(self, 1, "levels", "min_trials", "confirm")
        at_least(self, 0, "dwell")
        between(self, 0, 1, "promote", "demote", "confidence", "consolidate")
        apart = self.promote - self.demote
        require(apart >= 0.2 - 1e-9, "demote", self.demote, "at least 0.2 below promote")
        enough = self.max_trials >= self.min_trials
        require(enough, "max_trials", self.max_trials, "at least min_trials")
        require(0 <= self.mix_previous < 1, "mix_previous", self.mix_previous, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class StopConfig:
    """`AGMConvergenceDetector`: when a run has come to its end."""

    patience: int = 50
    """Evaluations without improvement until a plateau; updates without movement until stalled."""
    min_delta_sd: float = 0.25
    """Improvement that counts, in standard deviations of the evaluations."""
    min_steps: int = 100
    """Updates before a plateau can end a run."""
    halflife: float = 5.0
    """Evaluations after which one counts half in the mean that is compared."""
    target: float | None = None
    """Success rate of sampled evaluations that is enough; None goes on."""
    gap_abort: float = 1.0
    """Log gap of a run that has diverged: tokens off by a factor of e."""
    abort_confirm: int = 3
    """Records in a row that a divergence or non-finite numbers take."""
    stall_gap: float = 1e-8
    """Log gap up to which the policy has not moved."""
    stall_grad: float = 1e-12
    """Gradient norm up to which it will not."""
    max_steps: int | None = None
    """Updates that may be made; None sets no limit."""
    mode: Literal["max", "min"] = "max"
    """Whether more of eval/mean is better."""

    def __post_init__(self) -> None:
        within_reason(self)
        at_least(self, 2, "patience")
        at_least(self, 0, "min_steps")
        at_least(self, 1, "abort_confirm")
        positive(self, "min_delta_sd", "halflife", "gap_abort", "stall_gap", "stall_grad")
        if self.target is not None:
            between(self, 0, 1, "target")
        if self.max_steps is not None:
            at_least(self, 1, "max_steps")
        require(self.mode in ("max", "min"), "mode", self.mode, '"max" or "min"')


@dataclass(frozen=True, kw_only=True)
class UncertaintyConfig:
    """`AGMUncertaintyEstimator`: how far the latest batch can be trusted."""

    window: int = 200
    """Rollouts that percentiles are taken from."""
    min_samples: int = 20
    """Rollouts before the gate may close."""
    mode: Literal["total", "epistemic", "aleatoric"] = "total"
    """What the gate looks at."""
    enter: float = 0.95
    """Percentile that closes the gate."""
    exit: float = 0.8
    """Percentile that opens it."""
    confirm: int = 2
    """Rollouts in a row that close it: of noise, one in 20 is above `enter`."""
    dwell: int = 10
    """Rollouts that it stays closed at least."""

    def __post_init__(self) -> None:
        within_reason(self)
        at_least(self, 3, "window", "min_samples")
        at_least(self, 1, "confirm")
        at_least(self, 0, "dwell")
        between(self, 0, 1, "enter", "exit")
        require(self.exit < self.enter, "exit", self.exit, f"less than enter = {self.enter:g}")
        known = ("total", "epistemic", "aleatoric")
        require(self.mode in known, "mode", self.mode, f"one of {known}")


@dataclass(frozen=True, kw_only=True)
class AGMConfig:
    """`AdaptiveAGMFramework`: all controllers, and how their decisions are weighed."""

    regime: RegimeConfig = field(default_factory=RegimeConfig)
    scales: ScalesConfig = field(default_factory=ScalesConfig)
    phase: PhaseConfig = field(default_factory=PhaseConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    uncertainty: UncertaintyConfig = field(default_factory=UncertaintyConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    """With one level there is no curriculum, and nothing of it is read."""
    stop: StopConfig = field(default_factory=StopConfig)
    gap_target: float | None = None
    """The budget of regime, scales and adapter alike; None leaves each its own."""
    gating: bool = True
    """Whether an uncertain batch holds back changes of the learning rate and clip width."""
    dwell: int = 20
    """Rollouts between two changes of level or batch; p stands still as long after either."""

    def __post_init__(self) -> None:
        within_reason(self)
        at_least(self, 0, "dwell")
        if self.gap_target is not None:
            positive(self, "gap_target")
        move, expected = self.strategy.max_move, "nothing: adapter.p_move decides it"
        require(move == StrategyConfig().max_move, "strategy.max_move", move, expected)

    @property
    def resolved(self) -> "AGMConfig":
        """With the common budget in its three places."""
        if self.gap_target is None:
            return self
        target = self.gap_target
        return replace(
            self,
            regime=replace(self.regime, gap_target=target),
            scales=replace(self.scales, gap_target=target),
            adapter=replace(self.adapter, gap_target=target),
        )
