"""Settings of the objective: one member of the family, and where its exponent comes from.

Standard library only; `hmpo.config` hands these names on.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from hmpo.config.checks import EXPONENT, within_reason
from hmpo.config.weight import MASKING, WeightConfig, check_weight, k3_bounds
from hmpo.errors import require, require_positive

WIDEST = 1e6
"""Largest half-width of a clip: no ratio reaches it, in nats or as a distance from 1."""
LARGEST_LOG = 700.0
"""Largest log ratio (nat) whose ratio is a number."""


@dataclass(frozen=True, kw_only=True)
class ExponentConfig:
    """Where the exponent p comes from (see `hmpo.objective.exponent`)."""

    kind: Literal["fixed", "linear", "learnable", "matched", "reward", "controller"] = "fixed"
    """fixed: the objective's `p`, `p_positive` and `p_negative`. linear: from `p` to `end` over
    `updates`. learnable: a parameter that starts at `p` and follows `criterion`. matched: one for
    each response, from its share of clipped tokens (PMPO). reward: exp(-gamma * mean reward) of
    the rollout, and the upper clip bound with it (APMPO). controller: `p` until a controller
    sets another."""
    end: float = -2.0
    """linear: the exponent of the last update."""
    updates: int | None = None
    """linear: updates from first to last; None takes the run's."""
    per: Literal["update", "rollout"] = "update"
    """linear: move p with every update, or hold it within a rollout: the updates of the first
    rollout have `p`, those of the last `end`."""
    criterion: Literal["ess", "variance", "surrogate"] = "ess"
    """learnable: hold the effective sample size at `target`; make the second moment of the
    policy gradient small; or raise the surrogate itself, which runs away to `bound`."""
    allow_surrogate: bool = False
    """learnable: needed for `criterion = "surrogate"`, as that criterion is degenerate."""
    target: float = 0.95
    """learnable: effective sample size of the token weights as a share of the tokens."""
    bound: float = 4.0
    """learnable: |p| stays below this; p = bound * tanh(rho)."""
    lr: float = 0.02
    """learnable: learning rate of rho (Adam, no weight decay, outside the model's clipping)."""
    saturation: float = 1.0
    """matched: share of clipped tokens from which on p = 0."""
    matching: Literal["ess", "closed_form"] = "ess"
    """matched: solve for the effective sample size, or take p = sqrt(1 - share / saturation)."""
    gamma: float = 0.8
    """reward: p = exp(-gamma * mean reward); rewards are expected in [0, 1]."""
    clip_gain: float = 0.2
    """reward: the upper bound is clip_high + clip_gain * tanh(mean / std of the rewards)."""

    def __post_init__(self) -> None:
        within_reason(self, end=EXPONENT, bound=EXPONENT, gamma=EXPONENT, clip_gain=EXPONENT)
        updates = self.updates
        require(updates is None or updates >= 2, "updates", updates, "an integer >= 2")
        require(
            self.kind != "learnable" or self.criterion != "surrogate" or self.allow_surrogate,
            "criterion",
            self.criterion,
            '"ess" or "variance" (the surrogate only measures whether dispersion goes with '
            "advantage and drives p to its bound; allow_surrogate = true takes it nevertheless)",
        )
        require(0 < self.target < 1, "target", self.target, "a number in (0, 1)")
        require_positive("bound", self.bound)
        require_positive("lr", self.lr)
        require(0 < self.saturation <= 1, "saturation", self.saturation, "a number in (0, 1]")
        for name in ("gamma", "clip_gain"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, name, value, "a finite number >= 0")


@dataclass(frozen=True, kw_only=True)
class MismatchConfig:
    """Corrections where sampler and trainer differ in probabilities (`hmpo.objective.mismatch`).

    rho = pi_old / pi_sampled is the ratio of a token or, as the product over its tokens, of a
    response. All thresholds are ratios.
    """

    recompute: bool = False
    """Compute the old log-probs anew by the trainer's own forward pass, once per rollout. Done in
    any case where the sampler rounds to bfloat16 (weights, `autocast`, `sampling_dtype`); otherwise
    only top-k and top-p make a difference."""
    correction: Literal["none", "truncate", "mask"] = "none"
    """Weigh the gradient by rho held between `low` and `high` (TIS), or by rho where it lies
    between them and by 0 elsewhere (IcePop, MIS)."""
    level: Literal["token", "sequence"] = "token"
    """Whether each token has its own rho, or the whole response one."""
    low: float = 0.0
    """Least rho."""
    high: float = 2.0
    """Largest rho."""
    sequence_low: float | None = None
    """Leave out responses whose geometric mean of rho over tokens is below this; None keeps."""
    sequence_high: float | None = None
    """Leave out responses whose geometric mean of rho over tokens is above this; None keeps."""
    off_policy_low: float | None = None
    """Leave out responses with advantage < 0 whose geometric mean of pi / pi_sampled has fallen
    below this ratio (DeepSeek-V3.2's off-policy mask with delta = -log of it); None keeps."""

    def __post_init__(self) -> None:
        within_reason(self)
        require(0 <= self.low <= 1, "low", self.low, "a ratio in [0, 1]")
        high = self.high
        require(math.isfinite(high) and high >= 1, "high", high, "a finite ratio >= 1")
        for name in ("sequence_low", "off_policy_low"):
            value = getattr(self, name)
            require(value is None or 0 < value <= 1, name, value, "a ratio in (0, 1]")
        top = self.sequence_high
        require(
            top is None or (math.isfinite(top) and top >= 1),
            "sequence_high",
            top,
            "a finite ratio >= 1",
        )

    @property
    def corrects(self) -> bool:
        """Whether anything of it changes the gradient."""
        limits = (self.sequence_low, self.sequence_high, self.off_policy_low)
        return self.correction != "none" or any(limit is not None for limit in limits)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """One member of the power-mean family (see `hmpo.config.members` for the named ones)."""

    name: str = "hmpo"
    """Label used in logs and reports; it changes nothing."""
    mean: Literal["power", "ahm"] = "power"
    """Mean of a response's token ratios: the power mean of exponent `p`, or the limit of the
    arithmetic-harmonic iteration, sqrt(A H), which has no p."""
    ahm_weight: float = 0.5
    """mean = "ahm": weight w of the arithmetic mean in A^w H^(1-w)."""
    p: float = -1.0
    """Exponent of the power mean over a response's token ratios: 1 arithmetic, 0 geometric,
    -1 harmonic. Any finite number."""
    p_positive: float | None = None
    """Exponent for responses with advantage >= 0; None means `p`."""
    p_negative: float | None = None
    """Exponent for responses with advantage < 0; None means `p`."""
    exponent: ExponentConfig = field(default_factory=ExponentConfig)
    """Where the exponent comes from, if not from the three fields above."""
    gate: Literal["clip", "soft", "detached", "unweighted"] = "clip"
    """What limits the ratios: a hard clip; SAPO's smooth gate of each token ratio; clipped ratios
    as constant weights of the log-probs (CISPO, TIS), which has no mean and no p; or log-probs
    without any ratio, each with weight 1 (REINFORCE), which has no clip either."""
    weight: WeightConfig = field(default_factory=WeightConfig)
    """gate = "detached": which function of which ratio the weight is."""
    gate_positive: float = 1.0
    """gate = "soft": temperature tau for advantages >= 0."""
    gate_negative: float = 1.05
    """gate = "soft": temperature tau for advantages < 0."""
    clip_level: Literal["token", "sequence", "none"] = "token"
    """Where the clip sits: on token ratios before the mean, on the mean, or nowhere."""
    clip_space: Literal["log", "ratio", "k3", "tv", "kl"] = "log"
    """Unit of the two bounds: nats around 0 (log); distance from 1 (ratio); or the k3 estimate
    r - 1 - log r of a token's KL, whose two roots are the bounds. With `weight.bound = "mask"`
    also what the token's probability has gained or lost (tv), or the KL of the old policy to this
    one over the two events that it is sampled or not (kl)."""
    clip_low: float = 0.4
    """Lower half-width: log ratios below -clip_low (log), ratios below 1 - clip_low (ratio; 1
    there means no lower bound)."""
    clip_high: float = 0.4
    """Upper half-width: log ratios above clip_high (log), ratios above 1 + clip_high (ratio)."""
    token_clamp: float | None = None
    """Hold each token's log ratio within +-this (nat), whatever the advantage's sign, before the
    mean is taken; beyond it a token has no gradient. With a sequence clip or none; neither
    `clip_share` nor a controller scales it."""
    clip_width: Literal["absolute", "z", "sqrt"] = "absolute"
    """The half-widths as they stand; (sequence clip in log space) in units of sigma / sqrt(L),
    with sigma the minibatch's standard deviation of the token log ratios; or (weight of level
    "prefix" or "sequence") in units of the square root of the number of tokens in the product."""
    clip_sigma: float = 0.01
    """clip_width = "z": least sigma (nat), as the log ratios of a first update are all 0."""
    clip_center: Literal["one", "drift"] = "one"
    """Centre of a sequence clip: 1, or the minibatch's mean of M_p / M_1 (in log space), around
    which the mean of p != 1 lies even where nothing was learned."""
    clip_share: float | None = None
    """Calibrate the half-widths so that this share of the units clips (0.05 to 0.2 is usual),
    from the updates after the first of the first `clip_rollouts` rollouts; their proportion
    stays. None keeps them as they are. Acts in the trainer."""
    clip_rollouts: int = 2
    """clip_share: rollouts to calibrate on; until then the half-widths hold as they are."""
    sign_convention: Literal["bound", "paper"] = "bound"
    """Asymmetric bounds for advantages < 0: the lower one limits falling ratios (PPO, verl, TRL);
    or, as in GMPO's formula for ratio^sign, the upper one does, mirrored: 1/r <= upper."""
    dual_clip: float | None = None
    """For advantages < 0, ratios above this (> 1) count as this: verl's `clip_ratio_c`, and TRL's
    `delta`, which is the same function. None leaves them unbounded."""
    segments: Literal["response", "turn", "token"] = "response"
    """What a mean is taken of, and a sequence clip acts on: all ratios of a response, those of each
    turn of a conversation, or each ratio alone, where p has no effect. A segment has one advantage
    and, of its response's weight, the share of its tokens."""
    reduction: Literal["sequence_mean", "token_mean", "constant", "length_sum"] = "sequence_mean"
    """Weight of a response: 1/N, its share of all tokens, L / (N * max_length), or L / N."""
    max_length: int | None = None
    """Token constant of `reduction="constant"` (Dr.GRPO)."""
    kl_coef: float = 0.0
    """Weight of the KL term to the reference policy; 0 needs no reference."""
    kl_estimator: Literal["k1", "k2", "k3", "k3+"] = "k3+"
    """Per-token estimator of that KL (J. Schulman's names). k3+ has the value of k3 and the
    gradient of k2, which is that of the KL; k3, whose own gradient is not, is what the paper of
    GRPO has, and TRL."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus: the loss less this times the mean entropy (nat) of the policy,
    weighted over tokens as `reduction` says. 0 has none. With `entropy_target` the start."""
    entropy_target: float | None = None
    """Entropy (nat, token mean) below which the coefficient rises by `entropy_coef_delta` an update
    and acts, and above which it falls and does not (Skywork-OR1); None keeps it fixed."""
    entropy_coef_delta: float = 0.005
    """entropy_target: by how much the coefficient is moved after each update."""
    entropy_coef_max: float = 1.0
    """entropy_target: largest coefficient; the least is 0."""
    proximal_coef: float = 0.0
    """Weight of a penalty on the distance from the old policy; 0 has none."""
    proximal: Literal["k2", "pearson"] = "k2"
    """That penalty for each token, with d its log ratio: d^2 / 2 (DRO); or, by the size of the
    advantage and the old probability, |A| pi_old (r - 1)^2 / 2 (DRPO)."""

    def __post_init__(self) -> None:
        exponents = dict.fromkeys(("p", "p_positive", "p_negative"), EXPONENT)
        within_reason(self, **exponents, clip_low=WIDEST, clip_high=WIDEST, token_clamp=WIDEST)
        require(0 <= self.ahm_weight <= 1, "ahm_weight", self.ahm_weight, "a number in [0, 1]")
        for name in ("gate_positive", "gate_negative", "clip_low", "clip_high", "clip_sigma"):
            require_positive(name, getattr(self, name))
        if self.clip_space == "ratio":
            require(self.clip_low <= 1, "clip_low", self.clip_low, "a number <= 1 in ratio space")
        if self.reduction == "constant":
            require(
                self.max_length is not None and self.max_length > 0,
                "max_length",
                self.max_length,
                'a positive integer with reduction = "constant"',
            )
        require(math.isfinite(self.kl_coef) and self.kl_coef >= 0, "kl_coef", self.kl_coef, ">= 0")
        self._check_entropy()
        self._check_clip()
        check_weight(self)
        self._check_exponent()

    def _check_clip(self) -> None:
        """Options of the clip that would be without effect, or contradict each other."""
        level = self.clip_level
        if self.gate == "soft":
            require(level == "none", "clip_level", level, '"none" with gate = "soft"')
        if self.gate == "detached":
            require(level != "sequence", "clip_level", level, '"token" or "none" with detached')
        if self.gate == "unweighted":
            require(level == "none", "clip_level", level, '"none" with gate = "unweighted"')
        if self.token_clamp is not None:
            require_positive("token_clamp", self.token_clamp)
            clamps = self.gate == "clip" and level != "token"
            expected = 'None but with gate = "clip" and clip_level = "sequence" or "none"'
            require(clamps, "token_clamp", self.token_clamp, expected)
        for name, plain in (("clip_center", "one"), ("clip_width", "absolute")):
            value = getattr(self, name)
            require(
                value in (plain, "sqrt") or level == "sequence",
                name,
                value,
                f'"{plain}" with clip_level = "{level}"',
            )
        if self.clip_share is not None:
            share, kind = self.clip_share, self.exponent.kind
            require(0 < share < 1, "clip_share", share, "a number in (0, 1)")
            require(level != "none", "clip_share", share, 'None with clip_level = "none"')
            plain = kind not in ("reward", "matched")
            require(plain, "clip_share", share, f'None with exponent.kind = "{kind}"')
        require(self.clip_rollouts >= 1, "clip_rollouts", self.clip_rollouts, "an integer >= 1")
        if self.clip_width == "z":
            require(self.clip_space == "log", "clip_space", self.clip_space, '"log" with z widths')
        if self.dual_clip is not None:
            masks = self.gate == "detached" and self.weight.bound == "mask"
            plain = self.gate == "clip" and self.clip_width == "absolute"
            plain = level != "none" and (plain or masks)
            require(plain, "dual_clip", self.dual_clip, "None without a clip of absolute width")
            high = math.exp(min(self.log_bounds[1], LARGEST_LOG))
            require(
                math.isfinite(self.dual_clip) and self.dual_clip > (1 if masks else high),
                "dual_clip",
                self.dual_clip,
                "a ratio above 1" if masks else f"a ratio above the upper bound {high:g}",
            )

    def _check_entropy(self) -> None:
        """Ranges of the entropy bonus."""
        coef, target, most = self.entropy_coef, self.entropy_target, self.entropy_coef_max
        require(coef >= 0, "entropy_coef", coef, ">= 0")
        require(target is None or target > 0, "entropy_target", target, "nats > 0")
        require_positive("entropy_coef_delta", self.entropy_coef_delta)
        require_positive("entropy_coef_max", most)
        fits = target is None or coef <= most
        require(fits, "entropy_coef", coef, f"at most entropy_coef_max = {most}")

    @property
    def has_entropy_bonus(self) -> bool:
        """Whether the loss may have an entropy term."""
        return self.entropy_coef > 0 or self.entropy_target is not None

    def _check_exponent(self) -> None:
        """Exponent sources that would be without effect."""
        kind = self.exponent.kind
        if kind == "fixed":
            return
        for name in ("p_positive", "p_negative"):
            value = getattr(self, name)
            require(value is None, name, value, f'None with exponent.kind = "{kind}"')
        has_p = self.mean == "power" and self.has_mean
        require(has_p, "exponent.kind", kind, '"fixed" for an objective without p')
        hard = self.gate == "clip" and self.clip_level == "token"
        require(
            kind != "matched" or hard, "exponent.kind", kind, 'clip_level = "token" with "matched"'
        )
        if kind == "learnable":
            p, bound = self.p, self.exponent.bound
            require(abs(p) < bound, "p", p, f"|p| < exponent.bound = {bound}")
            flat = p == 0 and self.exponent.criterion == "ess"
            require(
                not flat, "p", p, 'p != 0 as the start of criterion = "ess", which is flat there'
            )

    @property
    def has_mean(self) -> bool:
        """Whether a mean of ratios is differentiated, and not log-probs with constant weights."""
        return self.gate in ("clip", "soft")

    @property
    def log_bounds(self) -> tuple[float, float]:
        """Lower and upper bound of the log ratio, in nats (z widths: in sigma / sqrt(L))."""
        if self.clip_level == "none" or self.clip_space in MASKING:
            return -math.inf, math.inf
        if self.clip_space == "log":
            return -self.clip_low, self.clip_high
        if self.clip_space == "k3":
            return k3_bounds(self.clip_low, self.clip_high)
        low = math.log1p(-self.clip_low) if self.clip_low < 1 else -math.inf
        return low, math.log1p(self.clip_high)

    @property
    def needs_band(self) -> bool:
        """Whether the clip depends on statistics of the whole minibatch."""
        return self.clip_center == "drift" or self.clip_width == "z"

    def exponent_for(self, *, positive: bool) -> float:
        """Exponent in force for one advantage sign."""
        chosen = self.p_positive if positive else self.p_negative
        return self.p if chosen is None else chosen
