"""Every setting of hmpo: frozen, keyword-only dataclasses, documented under each field.

Standard library only, so that reading a configuration costs no torch. A value out of range
gives one line that names the field. A default lives here and nowhere else; derived values are
properties. The objective's own are in `hmpo.objective_config`, the controllers' in
`hmpo.control_config` and `hmpo.agm_config`. `hmpo.settings` reads and writes
them from TOML and JSON.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hmpo.control_config import ControlConfig
from hmpo.errors import require, require_positive
from hmpo.objective_config import ExponentConfig, MismatchConfig, ObjectiveConfig

__all__ = [
    "CheckpointConfig",
    "ControlConfig",
    "EvalConfig",
    "ExponentConfig",
    "GSPOConfig",
    "HMPOConfig",
    "MismatchConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PolicyConfig",
    "PowerMeanConfig",
    "RewardConfig",
    "RunConfig",
    "TaskConfig",
    "TrainerConfig",
    "check_run_name",
    "require",
    "to_dict",
]

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
WINDOWS_RESERVED = frozenset(
    ["con", "prn", "aux", "nul", *(f"{d}{n}" for d in ("com", "lpt") for n in range(1, 10))]
)


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """What every trainer shares: sampling, updates per rollout, numerics, safety."""

    group_size: int = 4
    """Responses sampled per prompt; advantages are relative to this group. At least 2."""
    max_length: int = 512
    """Longest response, in tokens."""
    eos_token: int | tuple[int, ...] = 2
    """Token id (or ids) that ends a response; it is counted as the response's last token."""
    pad_token: int = 0
    """Token id that fills the padding; never attended to, never scored."""
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
        require(self.group_size >= 2, "group_size", self.group_size, "an integer >= 2")
        for name in ("max_length", "minibatches", "epochs", "max_nonfinite", "logprob_chunk"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "an integer >= 1")
        require(self.pad_token >= 0, "pad_token", self.pad_token, "a token id >= 0")
        require(
            len(self.stop_tokens) > 0 and min(self.stop_tokens) >= 0,
            "eos_token",
            self.eos_token,
            "one or more token ids >= 0",
        )
        require_positive("temperature", self.temperature)
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
        """`eos_token` as a tuple."""
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
    """The whole objective; excludes the three short forms above."""
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    """Corrections where sampler and trainer disagree."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective is not None:
            short = self.power_p is not None or self.epsilon is not None
            require(
                not short,
                "objective",
                "an ObjectiveConfig together with power_p or epsilon",
                "one or the other",
            )
        if self.power_p is not None:
            require(
                self.mean_type == "power",
                "power_p",
                self.power_p,
                f'None with mean_type = {self.mean_type!r} (set mean_type = "power")',
            )
        objective = self.resolved_objective  # validates the short forms now, not at first use
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


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The language model that is trained."""

    path: str = "tiny-sort"
    """A local Hugging Face folder, `tiny-sort` (bundled), or `smollm2` (see
    `hmpo fetch-model smollm2`)."""
    lora_rank: int = 0
    """Rank of LoRA adapters; 0 trains all weights. Needs `pip install 'hmpo[lora]'`."""
    lora_alpha: float = 16.0
    """LoRA's scale is lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Module names that get an adapter."""

    def __post_init__(self) -> None:
        require(bool(self.path), "path", self.path, "a folder or a bundled name")
        require(self.lora_rank >= 0, "lora_rank", self.lora_rank, "an integer >= 0")
        require_positive("lora_alpha", self.lora_alpha)


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Where prompts come from and how an answer is checked."""

    name: str = "sort"
    """sort, reverse, countdown, largest, key, jsonl, or `reasoning-gym:NAME`."""
    level: int | None = None
    """Difficulty level of a built-in task; None takes its default."""
    shots: int = 0
    """Solved examples put before each prompt."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of the task, such as `path` of `jsonl` or a generator's sizes."""
    stop: tuple[str, ...] = ()
    """Strings that end a response; empty takes the task's own."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Reward functions with TRL's signature; empty uses the task's own check."""

    functions: tuple[str, ...] = ()
    """`module:function` or `path/to/file.py:function`, each called on the whole rollout."""
    weights: tuple[float, ...] = ()
    """One weight for each function; empty weighs all by 1."""

    def __post_init__(self) -> None:
        require(
            len(self.weights) in (0, len(self.functions)),
            "weights",
            self.weights,
            f"{len(self.functions)} numbers, one for each function",
        )
        for weight in self.weights:
            require(math.isfinite(weight), "weights", weight, "finite numbers")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer around which QK-clip is wrapped."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW for all weights, or Muon for hidden matrices and AdamW for the rest."""
    lr: float = 1e-4
    """Base learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; vectors are never decayed."""
    muon_lr: float | None = None
    """Learning rate of Muon's matrices; None means `lr`."""
    muon_momentum: float = 0.95
    """Decay of Muon's momentum."""
    muon_coefficients: Literal["jordan", "you", "polar_express", "cans", "deepseek_v4"] = "jordan"
    """Coefficients of Muon's iteration: 5 steps, 10 for deepseek_v4."""
    muon_update_scale: Literal["formula", "measured", "original"] = "formula"
    """Size of Muon's updates: root mean square 0.2 by a formula (right at full rank) or as
    measured, or the original sqrt(max(1, outputs / inputs))."""
    muon_per_head: bool = False
    """Whether Muon orthogonalises the rows of each attention head apart."""

    def __post_init__(self) -> None:
        require_positive("lr", self.lr)
        require(len(self.betas) == 2, "betas", self.betas, "two numbers")
        for beta in self.betas:
            require(0 <= beta < 1, "betas", self.betas, "two numbers in [0, 1)")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, ">= 0")
        if self.muon_lr is not None:
            require_positive("muon_lr", self.muon_lr)
        require(0 <= self.muon_momentum < 1, "muon_momentum", self.muon_momentum, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Measurement on held-out prompts, before, during and after the run."""

    every: int = 0
    """Updates between evaluations; 0 evaluates only before and after."""
    prompts: int = 64
    """Held-out prompts of an evaluation during the run."""
    final_prompts: int = 256
    """Held-out prompts of the evaluations before and after the run."""
    pass_at: int = 0
    """k of pass@k, from k samples a prompt, before and after; 0 leaves it out."""
    batch_size: int = 128
    """Responses sampled at once."""

    def __post_init__(self) -> None:
        require(self.every >= 0, "every", self.every, "an integer >= 0")
        require(self.prompts >= 1, "prompts", self.prompts, "an integer >= 1")
        require(self.final_prompts >= 1, "final_prompts", self.final_prompts, ">= 1")
        require(self.pass_at >= 0, "pass_at", self.pass_at, "an integer >= 0")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "an integer >= 1")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the whole state of a run is saved."""

    every: int = 0
    """Updates between checkpoints; 0 saves only at the end and when the run is stopped."""
    keep: int = 2
    """Newest checkpoints kept."""

    def __post_init__(self) -> None:
        require(self.every >= 0, "every", self.every, "an integer >= 0")
        require(self.keep >= 1, "keep", self.keep, "an integer >= 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run: policy, task, objective, updates, evaluation, files."""

    name: str = "run"
    """Name of the run's folder: letters, digits, '.', '_' and '-'."""
    out: str = "runs"
    """Folder that holds run folders."""
    seed: int = 0
    """Seed of data, sampling, minibatches and evaluation."""
    updates: int = 40
    """Optimizer updates of the run."""
    prompts_per_rollout: int = 16
    """Prompts of one rollout; each gets `trainer.group_size` responses."""
    algorithm: Literal["power_mean", "gspo"] = "power_mean"
    """The family's trainer, or the independent GSPO baseline."""
    reference: Literal["none", "start"] = "none"
    """Frozen reference policy: none, or a copy of the starting weights, kept in memory. Needed
    by `objective.kl_coef`, and measured as `kl/ref` either way."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    device: str = "auto"
    """auto (CUDA where there is one, else CPU), cpu, cuda, or cuda:N."""
    samples: int = 4
    """Completions of each rollout written to completions.jsonl."""
    sinks: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Further places for the telemetry; telemetry.jsonl is always written."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    agm: ControlConfig = field(default_factory=ControlConfig)

    def __post_init__(self) -> None:
        check_run_name(self.name)
        require(self.updates >= 1, "updates", self.updates, "an integer >= 1")
        require(
            self.prompts_per_rollout >= 1, "prompts_per_rollout", self.prompts_per_rollout, ">= 1"
        )
        require(self.threads >= 0, "threads", self.threads, "an integer >= 0")
        require(self.samples >= 0, "samples", self.samples, "an integer >= 0")
        require(
            self.objective.kl_coef == 0 or self.reference != "none",
            "reference",
            self.reference,
            f'"start" with objective.kl_coef = {self.objective.kl_coef}',
        )
        responses = self.prompts_per_rollout * self.trainer.group_size
        require(
            responses >= self.trainer.minibatches,
            "trainer.minibatches",
            self.trainer.minibatches,
            f"at most the {responses} responses of a rollout",
        )
        self.agm.check(self.algorithm, self.objective)


def check_run_name(name: str) -> None:
    """Refuse a run name that is not a plain, portable file name."""
    portable = RUN_NAME.fullmatch(name) and name.split(".")[0].lower() not in WINDOWS_RESERVED
    require(
        bool(portable) and not name.endswith("."),
        "name",
        name,
        "1 to 100 letters, digits, '.', '_' or '-', starting with a letter or digit",
    )


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON-ready values (tuples become lists)."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        return value

    return plain(config)
