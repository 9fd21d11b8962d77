"""Settings of the trainers: sampling, updates per rollout, numerics, safety."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from hmpo.config.advantages import AdvantageConfig, refuse_unread_advantages
from hmpo.config.checks import within_reason
from hmpo.config.objective import MismatchConfig, ObjectiveConfig
from hmpo.config.unread import refuse_unread_mismatch, refuse_unread_objective
from hmpo.errors import require, require_positive


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """What every trainer shares: sampling, updates per rollout, numerics, safety."""

    group_size: int = 4
    """Responses sampled per prompt; advantages are relative to this group. At least 2."""
    max_length: int = 512
    """Longest response, in tokens."""
    eos_token: int | tuple[int, ...] | None = None
    """Token id (or ids) that ends a response; it is counted as the response's last token. None
    takes all that the tokenizer and the policy's own settings name (2 where nothing does)."""
    pad_token: int | None = None
    """Token id that fills the padding; never attended to, never scored. None takes the
    tokenizer's or the policy's, else an end token (0 where nothing names one)."""
    temperature: float = 1.0
    """Sampling temperature; log-probs are those of the tempered distribution."""
    top_k: int = 0
    """Keep the k most probable tokens while sampling; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with this probability mass; 1 keeps all."""
    decoder: Literal["auto", "module"] = "auto"
    """Sample by the fast decoder where the policy is one that it knows, or always through the
    policy's own modules."""
    sampling_dtype: Literal["model", "bfloat16"] = "model"
    """Sample from the weights as they are, or from a bfloat16 copy of them that each rollout makes
    anew. Old log-probs then come from the policy's own forward pass, as under
    `mismatch.recompute`, and the mismatch is measured."""
    minibatches: int = 4
    """Optimizer updates per pass over one rollout. With 1 (and epochs = 1) every importance
    ratio is 1 and the exponent p has no effect."""
    epochs: int = 1
    """Passes over one rollout."""
    micro_batch_size: int | None = None
    """Responses per forward pass; gradients accumulate to exactly the whole minibatch.
    None takes the minibatch at once."""
    advantage_scale: Literal["std", "none"] = "std"
    """Divide centred rewards by the group's standard deviation, or not (Dr.GRPO)."""
    std_ddof: Literal[0, 1] = 1
    """0 population, 1 unbiased standard deviation."""
    max_grad_norm: float | None = 1.0
    """Clip the gradient's global L2 norm to this; None does not clip."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after warm-up; linear and cosine end at 0."""
    warmup_updates: int = 0
    """Updates of linear warm-up from 0."""
    total_updates: int | None = None
    """Length of the schedule in updates; needed by linear and cosine (a run fills it in)."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Precision of the policy's forward pass; log-softmax is always float32 or better."""
    qk_clip: bool = True
    """Wrap the optimizer in MuonClip's QK-clip."""
    max_qk_score: float = 100.0
    """QK-clip's threshold on a head's largest attention logit."""
    mask_truncated: bool = False
    """Leave responses that hit `max_length` without an end token out of the loss."""
    on_nonfinite: Literal["skip", "stop"] = "skip"
    """A non-finite loss or gradient: skip the update and count it, or stop the run."""
    max_nonfinite: int = 10
    """Consecutive skipped updates after which the run stops anyway."""
    on_reward_error: Literal["raise", "skip"] = "raise"
    """A reward that raises, times out or is not finite: stop, or drop that sample, counted."""
    reward_timeout: float | None = None
    """Seconds a reward function may take for one rollout; it then runs in a process of its
    own that can be killed. None sets no limit."""
    logprob_chunk: int = 512
    """Token rows per block of the vocabulary projection; eight times as many on CUDA."""
    seed: int = 0
    """Seed of sampling and of the minibatch order."""

    def __post_init__(self) -> None:
        within_reason(self, temperature=1e6, reward_timeout=1e6)
        require(self.group_size >= 2, "group_size", self.group_size, "an integer >= 2")
        for name in ("max_length", "minibatches", "epochs", "max_nonfinite", "logprob_chunk"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "an integer >= 1")
        pad = self.pad_token
        require(pad is None or pad >= 0, "pad_token", pad, "a token id >= 0")
        require(
            len(self.stop_tokens) > 0 and min(self.stop_tokens) >= 0,
            "eos_token",
            self.eos_token,
            "one or more token ids >= 0",
        )
        require(self.temperature >= 1e-6, "temperature", self.temperature, "a number >= 1e-06")
        require(self.top_k >= 0, "top_k", self.top_k, "an integer >= 0")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "a number in (0, 1]")
        for name in ("micro_batch_size", "total_updates"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "an integer >= 1")
        for name in ("max_grad_norm", "reward_timeout"):
            if getattr(self, name) is not None:
                require_positive(name, getattr(self, name))
        require_positive("max_qk_score", self.max_qk_score)
        require(self.warmup_updates >= 0, "warmup_updates", self.warmup_updates, ">= 0")

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """`eos_token` as a tuple; id 2 where it is None, which a trainer resolves before."""
        if self.eos_token is None:
            return (2,)
        return (self.eos_token,) if isinstance(self.eos_token, int) else self.eos_token

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer updates that one rollout serves."""
        return self.minibatches * self.epochs

    def lr_factor(self, update: int) -> float:
        """Factor on the base learning rate for the 0-based `update`.

        Raises:
            ConfigError: a schedule that ends without `total_updates`.
        """
        require(
            self.lr_schedule == "constant" or self.total_updates is not None,
            "total_updates",
            None,
            f"an integer with lr_schedule = {self.lr_schedule!r}",
        )
        if update < self.warmup_updates:
            return (update + 1) / (self.warmup_updates + 1)
        if self.lr_schedule == "constant" or self.total_updates is None:
            return 1.0
        span = max(1, self.total_updates - self.warmup_updates)
        left = min(1.0, max(0.0, 1.0 - (update - self.warmup_updates) / span))
        return left if self.lr_schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))


MEANS = {"arithmetic": 1.0, "geometric": 0.0, "harmonic": -1.0}


@dataclass(frozen=True, kw_only=True)
class PowerMeanConfig(TrainerConfig):
    """Settings of `PowerMeanTrainer`: name a mean, or give a whole `ObjectiveConfig`."""

    mean_type: Literal["arithmetic", "geometric", "harmonic", "power"] = "harmonic"
    """Mean of the token ratios; "power" takes `power_p`."""
    power_p: float | None = None
    """Exponent of `mean_type = "power"`; None means -0.5."""
    epsilon: float | None = None
    """Both clip half-widths, in the unit of the objective's `clip_space`; None keeps them."""
    objective: ObjectiveConfig | None = None
    """The whole objective; excludes the three short forms above. What its own settings leave
    without effect is refused where it differs from the member's values."""
    advantages: AdvantageConfig = field(default_factory=AdvantageConfig)
    """How rewards become advantages."""
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    """Corrections where sampler and trainer disagree."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective is not None:
            for name in ("mean_type", "power_p", "epsilon"):
                value, default = getattr(self, name), getattr(PowerMeanConfig, name)
                require(value == default, name, value, f"{default!r} together with objective")
        if self.power_p is not None:
            require(
                self.mean_type == "power",
                "power_p",
                self.power_p,
                f'None with mean_type = {self.mean_type!r} (set mean_type = "power")',
            )
        objective = self.resolved_objective  # validates the short forms now, not at first use
        refuse_unread_objective(objective)
        refuse_unread_advantages(self.advantages, self.advantage_scale)
        refuse_unread_mismatch(self.mismatch)
        require(
            objective.clip_share is None or self.updates_per_rollout > 1,
            "clip_share",
            objective.clip_share,
            "None with one update per rollout, where no ratio differs from 1",
        )

    @property
    def resolved_objective(self) -> ObjectiveConfig:
        """The objective that the trainer uses."""
        if self.objective is not None:
            return self.objective
        if self.mean_type == "power":
            p = -0.5 if self.power_p is None else self.power_p
        else:
            p = MEANS[self.mean_type]
        config = ObjectiveConfig(name=self.mean_type, p=p)
        if self.epsilon is None:
            return config
        return dataclasses.replace(config, clip_low=self.epsilon, clip_high=self.epsilon)


@dataclass(frozen=True, kw_only=True)
class HMPOConfig(PowerMeanConfig):
    """`PowerMeanConfig` with the harmonic mean: p = -1, token clip 0.4 / 0.4 in log space."""

    def __post_init__(self) -> None:
        super().__post_init__()
        p = self.resolved_objective.p
        require(p == -1.0, "p", p, "-1 in HMPOConfig (use PowerMeanConfig for other means)")


@dataclass(frozen=True, kw_only=True)
class GSPOConfig(TrainerConfig):
    """Settings of the `GSPOTrainer` baseline (Zheng et al. 2025, arXiv 2507.18071)."""

    epsilon_low: float = 3e-4
    """Sequence ratios below 1 - epsilon_low are clipped."""
    epsilon_high: float = 4e-4
    """Sequence ratios above 1 + epsilon_high are clipped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("epsilon_low", self.epsilon_low)
        require_positive("epsilon_high", self.epsilon_high)
        require(self.epsilon_low < 1, "epsilon_low", self.epsilon_low, "a number < 1")
