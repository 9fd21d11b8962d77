"""Every setting of hmpo: frozen, keyword-only dataclasses, documented under each field.

Standard library only, so that reading a configuration costs no torch. A value out of range
gives one line that names the field. A default lives here and nowhere else; derived values are
properties. The objective's own are in `hmpo.config.objective`, the controllers' in
`hmpo.config.control` and `hmpo.config.agm`. `hmpo.config.reading` reads and writes
them from TOML and JSON.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hmpo.config.advantages import AdvantageConfig
from hmpo.config.batch import BatchConfig
from hmpo.config.checks import within_reason
from hmpo.config.control import ControlConfig
from hmpo.config.distributed import DistributedConfig
from hmpo.config.objective import MismatchConfig, ObjectiveConfig
from hmpo.config.rollout import RolloutConfig
from hmpo.config.trainer import TrainerConfig
from hmpo.errors import require, require_positive

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
TRACKED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,99}")
DEVICE = re.compile(r"auto|cpu|cuda(?::[0-9]{1,4})?")
WINDOWS_RESERVED = frozenset(
    ["con", "prn", "aux", "nul", *(f"{d}{n}" for d in ("com", "lpt") for n in range(1, 10))]
)

VERIFIERS = "verifiers:"
"""What names of tasks of that library begin with."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The language model that is trained."""

    path: str = "tiny-sort"
    """A local Hugging Face folder, a hub's `organisation/name` (downloaded; a folder that is here
    wins where no revision is named), `tiny-sort` (bundled), or `smollm2` (see
    `hmpo fetch-model smollm2`)."""
    revision: str = ""
    """Branch, tag or commit of a policy that comes from a hub; empty takes the main branch. A run
    keeps the commit that it found in environment.json, and a resume takes the same."""
    base_revision: str = ""
    """Branch, tag or commit of the hub's policy below adapters that `path` names; empty takes what
    the adapters name, or else the main branch. A run keeps the commit, as of `revision`."""
    start: str = ""
    """A checkpoint whose weights the policy starts with, as `RUN` (its newest), `RUN@STEP` or
    `RUN@best`; empty starts with those of `path`. `hmpo train --from` sets it. The run keeps a copy
    of them."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Precision of the weights in memory: float32, bfloat16 (half the memory and traffic), or auto,
    which is bfloat16 where they are stored so, else float32. The optimizer steps on float32 copies
    of bfloat16 weights; saving gives the precision that the policy came with."""
    quantize: Literal["none", "4bit"] = "none"
    """4bit keeps the frozen weights below LoRA adapters in 4 bits (QLoRA: NF4, scales quantized
    too), computed with in `dtype`. Needs a GPU, adapters, and `pip install 'hmpo[quant]'`."""
    lora_rank: int = 0
    """Rank of LoRA adapters; 0 trains all weights. Needs `pip install 'hmpo[lora]'`."""
    lora_alpha: float = 16.0
    """LoRA's scale is lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] | Literal["all-linear"] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Module names that get an adapter; all-linear takes every linear layer but the output head."""
    lora_rslora: bool = False
    """LoRA's scale is lora_alpha / sqrt(lora_rank) instead, which does not fade with the rank."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of each layer for the backward pass, which runs the layer again: less
    memory for a third more time. The gradient is the same; sampling does not know it."""
    attention: str = "auto"
    """Attention implementation of transformers: auto (sdpa where the model has it, else eager),
    sdpa, eager, or another that transformers knows."""

    def __post_init__(self) -> None:
        within_reason(self, lora_alpha=1e9)
        require(bool(self.path), "path", self.path, "a folder or a bundled name")
        require(self.lora_rank >= 0, "lora_rank", self.lora_rank, "an integer >= 0")
        require_positive("lora_alpha", self.lora_alpha)
        require(bool(self.attention), "attention", self.attention, "auto, sdpa, eager or another")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Where prompts come from and how an answer is checked."""

    name: str = "sort"
    """sort, reverse, countdown, largest, key, carry, data (prompts or conversations of your own,
    from files or a data set), jsonl, `reasoning-gym:NAME`, or `verifiers:ID` of an installed
    environment, which its prompts are talked with too."""
    level: int | None = None
    """Difficulty level of a built-in task; None takes its default."""
    shots: int = 0
    """Solved examples put before each prompt; in a conversation a user's and an assistant's turn
    each."""
    chat: bool = False
    """Whether a prompt that is text becomes a user's turn in the tokenizer's chat template. Prompts
    that are messages always go through it."""
    system: str = ""
    """System turn of each conversation that has none of its own; empty adds none."""
    template_options: dict[str, Any] = field(default_factory=dict)
    """Further variables of the chat template, such as `enable_thinking = false`; one that the
    template does not mention is refused."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of the task, such as `train` of `data` or a generator's sizes."""
    environment: str = ""
    """What the policy talks with: `module:Class` or `path/to/file.py:Class` with `reset` and
    `step`, or with `reset` and methods that are tools. Its rewards count with those of
    `rewards.functions`, in place of the task's own check. Empty: one turn a response."""
    max_turns: int = 16
    """environment: most turns of the policy in one conversation."""
    stop: tuple[str, ...] | None = None
    """Strings that end a response; unset takes the task's own (a newline, also for jsonl; none
    for `data` and for conversations), an empty list none: only an end token ends a response then.
    """

    @property
    def talks_with(self) -> str:
        """What the policy talks with: `environment`, else the task where it is one of those."""
        return self.environment or (self.name if self.name.startswith(VERIFIERS) else "")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Reward functions with TRL's signature; empty uses the task's own check."""

    functions: tuple[str, ...] = ()
    """`module:function`, `path/to/file.py:function`, or a function of the library such as `math`
    (docs/rewards.md), each called on the whole rollout."""
    weights: tuple[float, ...] = ()
    """One weight for each function; empty weighs all by 1."""
    options: dict[str, Any] = field(default_factory=dict)
    """For functions of the library a table of options by the function's name. With `function` in
    it the name is one of your own, so that a function can be used twice."""

    def __post_init__(self) -> None:
        for name, table in self.options.items():
            own = name in self.functions and ":" not in name
            expected = "a table of one of the functions of the library in rewards.functions"
            require(own and isinstance(table, Mapping), f"options.{name}", table, expected)
        require(
            len(self.weights) in (0, len(self.functions)),
            "weights",
            self.weights,
            f"{len(self.functions)} numbers, one for each function",
        )
        within_reason(self, weights=1e9)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer around which QK-clip is wrapped."""

    name: Literal["adamw", "muon", "sgd", "adamw8bit"] = "adamw"
    """AdamW for all weights, Muon for hidden matrices and AdamW for the rest, plain stochastic
    gradient descent for all weights, the control without second moments, or AdamW with 8-bit
    moments (`pip install 'hmpo[quant]'`)."""
    lr: float = 1e-4
    """Base learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates."""
    momentum: float = 0.0
    """SGD's momentum: the step is lr times b, b = momentum * b + gradient. 0 keeps no state."""
    weight_decay: float = 0.0
    """Weight decay of matrices; vectors are never decayed. Decoupled for AdamW and Muon; for SGD
    it adds weight_decay * w to the gradient (after its norm was clipped), as in torch.optim.SGD,
    which without momentum is the same."""
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
    muon_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of Muon's iterations; auto takes bfloat16 where the machine has instructions for
    it (environment.json says what that is), and a resumed run keeps what it began with."""

    def __post_init__(self) -> None:
        within_reason(self)
        require_positive("lr", self.lr)
        require(len(self.betas) == 2, "betas", self.betas, "two numbers")
        for beta in self.betas:
            require(0 <= beta < 1, "betas", self.betas, "two numbers in [0, 1)")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, ">= 0")
        if self.muon_lr is not None:
            require_positive("muon_lr", self.muon_lr)
        for name in ("momentum", "muon_momentum"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")


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
    success: float = 1.0
    """Total reward from which a response counts as a success. The mean reward is measured beside
    the success rates whatever this is."""

    def __post_init__(self) -> None:
        within_reason(self)
        require(self.every >= 0, "every", self.every, "an integer >= 0")
        require(self.prompts >= 1, "prompts", self.prompts, "an integer >= 1")
        require(self.final_prompts >= 1, "final_prompts", self.final_prompts, ">= 1")
        require(self.pass_at >= 0, "pass_at", self.pass_at, "an integer >= 0")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "an integer >= 1")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the whole state of a run is saved."""

    every: int | Literal["auto"] = "auto"
    """Updates between checkpoints. auto saves after the first update and then as often as costs 2 %
    of the time, every 10 seconds to 30 minutes; 0 saves only at the end and when the run stops or
    fails."""
    keep: int = 2
    """Newest checkpoints kept."""
    keep_best: bool = True
    """Whether the checkpoint that did best on held-out prompts is kept beside them, the earlier of
    equals. A run is saved where it did better than before; only where `eval.every` measures it on
    the way, and `every` is not 0."""

    def __post_init__(self) -> None:
        if self.every != "auto":
            require(self.every >= 0, "every", self.every, 'an integer >= 0, or "auto"')
        require(self.keep >= 1, "keep", self.keep, "an integer >= 1")


@dataclass(frozen=True, kw_only=True)
class TrackerConfig:
    """How a run is called where `sinks` send it."""

    project: str = "hmpo"
    """Project of Weights & Biases and trackio; another than hmpo is a folder of TensorBoard too."""
    name: str | None = None
    """Name of the run there, and the folder of its TensorBoard files in `tensorboard/`; None takes
    the run's id."""

    def __post_init__(self) -> None:
        for field_name in ("project", "name"):
            value = getattr(self, field_name)
            fits = value is None or TRACKED_NAME.fullmatch(value) is not None
            expected = "1 to 100 letters, digits, spaces, '.', '_' or '-'"
            require(fits, field_name, value, expected)


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
    """Frozen reference policy: none, or a copy of the starting weights, kept in memory (under LoRA
    of the adapters only). Needed by `objective.kl_coef` and `advantages.kl_in_reward`, and measured
    as `kl/ref` either way."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    device: str = "auto"
    """auto (CUDA where there is one, else CPU), cpu, cuda, or cuda:N."""
    samples: int = 4
    """Completions of each rollout written to completions.jsonl."""
    sinks: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Further places for the telemetry; telemetry.jsonl is always written."""
    relative_to: tuple[str, ...] = ()
    """Folders that relative paths of policy, data and code count from, the first that holds one;
    empty: the current folder. Reading a file fills in its own folder and the current one, so that
    evaluation and resume work from anywhere."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    advantages: AdvantageConfig = field(default_factory=AdvantageConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    agm: ControlConfig = field(default_factory=ControlConfig)

    def __post_init__(self) -> None:
        check_run_name(self.name)
        require(bool(self.out.strip()), "out", self.out, "a folder ('.' is the current one)")
        require(self.updates >= 1, "updates", self.updates, "an integer >= 1")
        require(
            self.prompts_per_rollout >= 1, "prompts_per_rollout", self.prompts_per_rollout, ">= 1"
        )
        require(self.threads >= 0, "threads", self.threads, "an integer >= 0")
        named = DEVICE.fullmatch(self.device) is not None
        require(named, "device", self.device, "auto, cpu, cuda or cuda:N")
        require(self.samples >= 0, "samples", self.samples, "an integer >= 0")
        require(
            self.objective.kl_coef == 0 or self.reference != "none",
            "reference",
            self.reference,
            f'"start" with objective.kl_coef = {self.objective.kl_coef}',
        )
        require(
            self.advantages.kl_in_reward == 0 or self.reference != "none",
            "reference",
            self.reference,
            f'"start" with advantages.kl_in_reward = {self.advantages.kl_in_reward}',
        )
        total = self.trainer.total_updates
        ends = self.trainer.lr_schedule != "constant" and total is not None
        require(
            not ends or (total or 0) >= self.updates,
            "trainer.total_updates",
            total,
            f"nothing, or at least updates = {self.updates}: a schedule ends at 0 there",
        )
        responses = self.prompts_per_rollout * self.trainer.group_size
        require(
            responses >= self.trainer.minibatches,
            "trainer.minibatches",
            self.trainer.minibatches,
            f"at most the {responses} responses of a rollout",
        )
        self.rollout.check(self.policy, self.task, self.trainer)
        climbs = self.agm.mode != "off" and "level" in self.agm.controls
        steers = self.agm.mode == "apply" and "batch" in self.agm.controls
        grows = self.agm.adapter.batch_high if steers else 1.0
        self.batch.check(self.task, responses, climbs=climbs, grows=grows)
        self.distributed.check(self.policy, self.optimizer, self.trainer)
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
