"""`PowerMeanGRPOConfig`: TRL's `GRPOConfig` with the objective as one of ours."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from hmpo.config import to_dict
from hmpo.config.members import BY_NAME
from hmpo.config.objective import ObjectiveConfig
from hmpo.config.reading import run_config
from hmpo.config.unread import refuse_unread_objective
from hmpo.errors import ConfigError, require
from hmpo.optim import MuonClipConfig

REPLACED = {
    "loss_type": "name the member, or objective={..., 'reduction': ...} for its denominator",
    "importance_sampling_level": "objective={..., 'clip_level': 'token' or 'sequence'} and p",
    "epsilon": "clip_low (and objective={..., 'clip_space': 'ratio'} for TRL's unit)",
    "epsilon_high": "clip_high (and objective={..., 'clip_space': 'ratio'} for TRL's unit)",
    "delta": "objective={..., 'dual_clip': ...}, the same function",
    "sapo_temperature_neg": "objective={'member': 'sapo', 'gate_negative': ...}",
    "sapo_temperature_pos": "objective={'member': 'sapo', 'gate_positive': ...}",
    "vespo_k_pos": "no member of the family is VESPO",
    "vespo_lambda_pos": "no member of the family is VESPO",
    "vespo_k_neg": "no member of the family is VESPO",
    "vespo_lambda_neg": "no member of the family is VESPO",
}
"""TRL's options that the objective takes the place of, and what says the same here."""

ESTIMATORS = {
    "group_std": ("sum_then_normalize", "group"),
    "group": ("sum_then_normalize", "none"),
    "batch_std": ("sum_then_normalize", "batch"),
    "gdpo": ("normalize_then_sum", "group"),
}
"""TRL's `multi_objective_aggregation` and `scale_rewards` for each estimator that TRL has."""

LOSS_TYPES = {
    "sequence_mean": "grpo",
    "token_mean": "dapo",
    "constant": "dr_grpo",
    "length_sum": "dr_grpo",
}
"""TRL's name of the loss that has our denominator, by `ObjectiveConfig.reduction`. TRL's "luspo"
counts padding in some versions; that of "dr_grpo" times the constant length is the same."""


def _replaced(name: str) -> Any:
    return field(default=None, metadata={"help": f"Must stay unset; instead: {REPLACED[name]}."})


@dataclass
class PowerMeanGRPOConfig(GRPOConfig):
    """Settings of `PowerMeanGRPOTrainer`; every field of `GRPOConfig` that is not replaced works.

    All fields are plain values, so the configuration survives `to_dict`, JSON, `TrlParser` and a
    checkpoint's `training_args.bin`.

    Raises:
        ConfigError: an option of TRL that would be ignored, or settings of the objective that
            contradict each other.

    Example:
        args = PowerMeanGRPOConfig("out", objective="hmpo", num_iterations=2, learning_rate=1e-5)
        args = PowerMeanGRPOConfig("out", objective="gspo", p=-1.0, exponent="learnable")
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "objective", "exponent"]  # noqa: RUF012

    objective: dict[str, Any] | str | ObjectiveConfig | None = field(
        default="hmpo",
        metadata={
            "help": "Member of the power-mean family (" + ", ".join(BY_NAME) + "), or a mapping "
            "(JSON on the command line) of hmpo's ObjectiveConfig fields, `member` for the start."
        },
    )
    p: float | None = field(
        default=None, metadata={"help": "Exponent of the mean instead of the member's."}
    )
    p_positive: float | None = field(
        default=None, metadata={"help": "Exponent for advantages >= 0; unset: p."}
    )
    p_negative: float | None = field(
        default=None, metadata={"help": "Exponent for advantages < 0; unset: p."}
    )
    clip_low: float | None = field(
        default=None,
        metadata={"help": "Lower half-width instead of the member's, in the member's unit."},
    )
    clip_high: float | None = field(
        default=None,
        metadata={"help": "Upper half-width instead of the member's, in the member's unit."},
    )
    exponent: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Where p comes from: fixed, linear, learnable, matched, reward; or a mapping "
            "(JSON on the command line) of hmpo's ExponentConfig fields."
        },
    )
    estimator: str | None = field(
        default=None,
        metadata={
            "help": "Estimator of the advantages by hmpo's name, of those that TRL has: "
            + ", ".join(ESTIMATORS)
            + "; it sets scale_rewards and multi_objective_aggregation. Unset: as those say."
        },
    )
    qk_clip: bool = field(
        default=True,
        metadata={"help": "Scale down query and key weights whose attention logits are too large."},
    )
    max_qk_score: float = field(
        default=100.0, metadata={"help": "Largest attention logit that QK-clip allows."}
    )
    telemetry: bool = field(
        default=True, metadata={"help": "Write output_dir/telemetry.jsonl, a record per update."}
    )

    loss_type: str | None = _replaced("loss_type")  # type: ignore[assignment]
    importance_sampling_level: str | None = _replaced("importance_sampling_level")  # type: ignore[assignment]
    epsilon: float | None = _replaced("epsilon")  # type: ignore[assignment]
    epsilon_high: float | None = _replaced("epsilon_high")
    delta: float | None = _replaced("delta")
    sapo_temperature_neg: float | None = _replaced("sapo_temperature_neg")  # type: ignore[assignment]
    sapo_temperature_pos: float | None = _replaced("sapo_temperature_pos")  # type: ignore[assignment]
    vespo_k_pos: float | None = _replaced("vespo_k_pos")  # type: ignore[assignment]
    vespo_lambda_pos: float | None = _replaced("vespo_lambda_pos")  # type: ignore[assignment]
    vespo_k_neg: float | None = _replaced("vespo_k_neg")  # type: ignore[assignment]
    vespo_lambda_neg: float | None = _replaced("vespo_lambda_neg")  # type: ignore[assignment]

    def __post_init__(self) -> None:
        for name, instead in REPLACED.items():
            value = getattr(self, name)
            require(value is None, name, value, f"it unset: the objective decides; {instead}")
        require(
            not self.use_liger_kernel,
            "use_liger_kernel",
            True,
            "False: older versions of TRL then use a loss that the objective cannot reach; "
            "model_init_kwargs={'use_kernels': True} has the kernels alone",
        )
        if isinstance(self.objective, ObjectiveConfig):
            self.objective = to_dict(self.objective)
        self._take_estimator()
        super().__post_init__()
        MuonClipConfig(max_qk_score=self.max_qk_score)
        read = self.qk_clip or self.max_qk_score == type(self).max_qk_score
        require(read, "max_qk_score", self.max_qk_score, "it unset with qk_clip=False")
        objective = self.resolved_objective
        self._check(objective)
        self._check_window(objective)

    def _take_estimator(self) -> None:
        """Put the estimator into TRL's own settings, which may not say another thing.

        Raises:
            ConfigError: one that TRL lacks, or that TRL's own settings contradict.
        """
        if self.estimator is None:
            return
        name = self.estimator
        expected = f"one of {', '.join(ESTIMATORS)}, as TRL forms the advantages"
        require(name in ESTIMATORS, "estimator", name, expected)
        plain = {f.name: f.default for f in dataclasses.fields(GRPOConfig)}
        settings = ("multi_objective_aggregation", "scale_rewards")
        for setting, value in zip(settings, ESTIMATORS[name], strict=True):
            if setting not in plain:
                expected = f"it unset: this version of TRL has no {setting}"
                require(value == "sum_then_normalize", "estimator", name, expected)
                continue
            given = getattr(self, setting)
            given = {True: "group", False: "none"}.get(given, given)
            expected = f'it unset with estimator = "{name}"'
            require(given in (plain[setting], value), setting, given, expected)
            setattr(self, setting, value)

    @property
    def resolved_objective(self) -> ObjectiveConfig:
        """The member with the other fields put in.

        Raises:
            ConfigError: one line that names the field.
        """
        given = self.objective
        if not isinstance(given, str | Mapping):
            raise ConfigError(
                f"objective: got {given!r}, expected a member's name, a mapping of its fields, or "
                "an ObjectiveConfig"
            )
        table: dict[str, Any] = {"member": given} if isinstance(given, str) else dict(given)
        whole = "name" in table  # an ObjectiveConfig, of which a field may take the place of one
        for name in ("p", "p_positive", "p_negative", "clip_low", "clip_high", "exponent"):
            value = getattr(self, name)
            if value is None:
                continue
            expected = f"it in one place: objective has {table.get(name)!r} already"
            require(whole or name not in table, name, value, expected)
            if name == "exponent":
                table[name] = {"kind": value} if isinstance(value, str) else dict(value)
            else:
                table[name] = float(value)
        own_length = "max_length" not in table
        objective = run_config({"objective": table}).objective  # strict, and by the names of files
        if objective.reduction == "constant" and own_length:
            objective = dataclasses.replace(objective, max_length=self.max_completion_length)
        return objective

    @property
    def host_loss(self) -> tuple[str, float]:
        """TRL's name of the loss whose denominator the objective has, and the factor that lacks."""
        reduction = self.resolved_objective.reduction
        factor = float(self.max_completion_length or 1) if reduction == "length_sum" else 1.0
        return LOSS_TYPES[reduction], factor

    @property
    def updates_per_generation(self) -> float:
        """Optimizer updates that one generation serves; at most 1: every ratio is 1."""
        steps = self.steps_per_generation or self.gradient_accumulation_steps  # TRL fills it in
        return steps * self.num_iterations / self.gradient_accumulation_steps

    @property
    def updates_per_rollout(self) -> int:
        """Updates that share a generation; 1 also where an update learns from several."""
        return max(1, int(self.updates_per_generation))

    def _check(self, objective: ObjectiveConfig) -> None:
        """What TRL decides by other means, and settings without effect."""
        require(objective.kl_coef == 0, "kl_coef", objective.kl_coef, "0: TRL's `beta` weighs it")
        for name, own in (("entropy_coef", "entropy_coef"), ("entropy_target", "entropy_target")):
            value = getattr(objective, name)
            expected = f"nothing inside objective: TRL's own `{own}` has the bonus"
            require(not value, name, value, expected)
        if objective.reduction == "constant":
            expected = f"max_completion_length = {self.max_completion_length}, or nothing"
            same = objective.max_length == self.max_completion_length
            require(same, "max_length", objective.max_length, expected)
        refuse_unread_objective(objective)
        has_p = objective.mean == "power" and objective.has_mean
        own = objective.exponent.kind in ("matched", "reward")
        for name in ("p", "p_positive", "p_negative"):
            value = getattr(self, name)
            expected = f"it unset: {objective.name} has no p that could be set"
            require(value is None or (has_p and not own), name, value, expected)
        hidden = self.p is not None and None not in (self.p_positive, self.p_negative)
        require(not hidden, "p", self.p, "it unset: p_positive and p_negative are used")
        if objective.clip_level == "none":
            for name in ("clip_low", "clip_high"):
                value = getattr(self, name)
                require(value is None, name, value, f"it unset: {objective.name} has no clip")
        if objective.clip_share is not None:
            expected = "it unset with one update per generation, where no ratio differs from 1"
            enough = self.updates_per_generation > 1
            require(enough, "clip_share", objective.clip_share, expected)

    def _check_window(self, objective: ObjectiveConfig) -> None:
        """Whether what an update has to know of its rows is known before the first of them."""
        if objective.needs_band:
            split = self.gradient_accumulation_steps > 1 or self.world_size > 1
            require(
                not split,
                "gradient_accumulation_steps",
                self.gradient_accumulation_steps,
                "1, and one process, with a clip that is centred or scaled by the minibatch: its "
                "statistics are not known before the last part",
            )
        if objective.exponent.kind == "linear" and objective.exponent.per == "rollout":
            whole = self.updates_per_generation <= 1 or self.updates_per_generation % 1 == 0
            expected = '"update", or a divisor of steps_per_generation * num_iterations as '
            expected += "gradient_accumulation_steps: else an update learns from two generations"
            require(whole, "exponent.per", "rollout", expected)
        if objective.reduction == "token_mean":
            served = (self.steps_per_generation or 1) * self.num_iterations
            require(
                served % self.gradient_accumulation_steps == 0,
                "gradient_accumulation_steps",
                self.gradient_accumulation_steps,
                f"a divisor of steps_per_generation * num_iterations = {served} with a token mean: "
                "the tokens of an update are not known before all of them are generated",
            )
