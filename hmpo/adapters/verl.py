"""The family inside verl 0.9: importing this module registers the policy loss `power_mean`.

    actor_rollout_ref.actor.policy_loss._target_=hmpo.adapters.verl.PowerMeanLossConfig
    actor_rollout_ref.actor.policy_loss.loss_mode=power_mean
    +actor_rollout_ref.actor.policy_loss.member=gmpo

The first line makes every worker import this module and build the config, which carries a member
and what differs from it. The entry point `verl.plugins` registers the loss as well; then, without
`_target_`, it is HMPO with its own values, as verl's plain config has no place for others.

Counts of the whole minibatch come from verl, so that the losses of micro-batches and of
data-parallel ranks (whose gradients are averaged) add up to the loss of the whole minibatch. As in
verl, a fully masked response counts in the number of responses.
"""

import dataclasses
import logging
import typing
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from verl.trainer.ppo.core_algos import register_policy_loss  # pyrefly: ignore[missing-import]
from verl.workers.config import ActorConfig, PolicyLossConfig  # pyrefly: ignore[missing-import]

from hmpo.config.members import BY_NAME
from hmpo.config.objective import ExponentConfig, ObjectiveConfig
from hmpo.config.reading import from_dict
from hmpo.config.unread import refuse_unread_objective
from hmpo.config.weight import WeightConfig
from hmpo.errors import ConfigError, ShapeError, require
from hmpo.objective.loss import power_mean_loss
from hmpo.objective.metrics import objective_metrics
from hmpo.types import Denominators

logger = logging.getLogger(__name__)

LOSS_MODE = "power_mean"
"""The name in verl's registry."""

AGGREGATION = {
    "sequence_mean": "seq-mean-token-mean",
    "token_mean": "token-mean",
    "constant": "seq-mean-token-sum-norm",
    "length_sum": "seq-mean-token-sum",
}
"""verl's `loss_agg_mode` for each reduction; verl uses it for its entropy and KL terms."""

METRICS = {
    "actor/pg_clipfrac": "clip/frac",
    "actor/ppo_kl": "kl/k1",
} | {
    f"actor/{name}": name
    for name in (
        "clip/frac_pos",
        "clip/frac_neg",
        "kl/k3",
        "ratio/p",
        "ratio/logA",
        "ratio/logG",
        "ratio/logH",
        "ratio/log_gap_mean",
        "ratio/m_mean",
        "ratio/m_std",
        "ratio/clamped",
        "ratio/ess_tok",
        "ratio/ess_seq",
    )
}
"""verl's metric names and the telemetry names behind them; averaged over micro-batches by verl."""

_UNUSED = ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "tau_pos", "tau_neg")
_WITHIN_A_CALL = ("fixed", "matched")
_NOT_WITHIN_A_CALL = {
    "learnable": "verl's optimizer holds only the model's parameters",
    "linear": "verl does not tell a loss how far the run is",
    "reward": "verl does not tell a loss the rewards",
}


def _offered(cls: type, prefix: str = "") -> dict[str, Any]:
    """Types of the fields of a settings table, by the names under which verl's config has them."""
    hints = typing.get_type_hints(cls)
    return {
        f"{prefix}{field.name}": (str if typing.get_origin(kind) is Literal else kind) | None
        for field in dataclasses.fields(cls)
        if not dataclasses.is_dataclass(kind := hints[field.name])
    }


_EXPONENT = _offered(ExponentConfig, "exponent_")
_WEIGHT = _offered(WeightConfig, "weight_")
_FIELDS = {name: kind for name, kind in _offered(ObjectiveConfig).items() if name != "name"}
_Fields = dataclasses.make_dataclass(
    "_Fields",
    [(name, kind, None) for name, kind in (_FIELDS | _EXPONENT | _WEIGHT).items()],
    bases=(PolicyLossConfig,),
    namespace={"__module__": __name__},
)


@dataclass
class PowerMeanLossConfig(_Fields):  # pyrefly: ignore[invalid-inheritance]
    """A member of the family and what differs from it; None keeps the member's value.

    The fields are those of `hmpo.config.objective.ObjectiveConfig`, where they are explained;
    `exponent_kind`, `weight_kind` and so on are those of its `exponent` and its `weight`. What a
    loss inside verl cannot follow is refused.
    """

    loss_mode: str = LOSS_MODE
    member: str = "hmpo"
    """Name of a member (see `hmpo.config.members`)."""

    def __post_init__(self) -> None:
        require(
            self.loss_mode == LOSS_MODE,
            "policy_loss.loss_mode",
            self.loss_mode,
            f'"{LOSS_MODE}" with PowerMeanLossConfig; verl\'s V0 trainer overwrites it where '
            "algorithm.rollout_correction.bypass_mode=true",
        )
        _refuse_unread(self)
        self.objective()

    def objective(self) -> ObjectiveConfig:
        """The member with these changes.

        Raises:
            ConfigError: the member or a value is unknown, or verl cannot supply what it needs.
        """
        known = ", ".join(BY_NAME)
        require(self.member in BY_NAME, "policy_loss.member", self.member, f"one of {known}")
        member = BY_NAME[self.member]()
        values = dataclasses.asdict(member)
        values |= {name: self[name] for name in _FIELDS if self[name] is not None}
        for table, fields in (("exponent", _EXPONENT), ("weight", _WEIGHT)):
            given = {name: self[name] for name in fields if self[name] is not None}
            values[table] |= {name.removeprefix(f"{table}_"): v for name, v in given.items()}
        objective = from_dict(ObjectiveConfig, values, "policy_loss")
        _check_objective(objective)
        return objective


@register_policy_loss(LOSS_MODE)
def power_mean(
    old_log_prob: Float[Tensor, "N T"],
    log_prob: Float[Tensor, "N T"],
    advantages: Float[Tensor, "N T"],
    response_mask: Bool[Tensor, "N T"],
    loss_agg_mode: str = "seq-mean-token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: Float[Tensor, "N T"] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Any]]:
    """This micro-batch's share of the loss, as verl's `ppo_loss` calls it.

    Rollout weights that are equal in a response multiply its advantage. Others multiply the
    gradient of their token's log-prob and leave the value of the mean as it is, because a mean of
    ratios has no per-token losses which they could multiply.

    Args:
        old_log_prob: log-probs of the response tokens under the old policy (nat).
        log_prob: the same under the policy; carries the gradient.
        advantages: the same number on every token of what a mean is taken of
            (`policy_loss.segments`); any numbers where there is no mean.
        response_mask: True on response tokens.
        loss_agg_mode: verl's reduction, which must be that of the member.
        config: the actor's config; `config.global_batch_info` has the counts.
        rollout_is_weights: train/inference correction, if any; a constant.

    Returns:
        The loss times the data-parallel size, and `METRICS` of this micro-batch as floats.

    Raises:
        ConfigError: a setting contradicts the member, or a count is missing.
        ShapeError: advantages vary within a mean.
    """
    if config is None:
        raise ConfigError("config: got None, expected verl's ActorConfig")
    objective = _objective(config, loss_agg_mode)
    mask = response_mask.bool()
    given = _own_advantages(advantages, mask, objective)
    weights = rollout_is_weights
    if weights is not None:
        given, weights = _split_weights(given, weights, mask)
    inputs = (log_prob, old_log_prob, mask, given, objective)
    denominators = _denominators(config, objective)
    loss = power_mean_loss(*inputs, weights=weights, denominators=denominators)
    fine = loss.detach().isfinite()
    if rollout_is_weights is not None:  # those of tokens reach the gradient and not the value
        fine = fine & (rollout_is_weights.isfinite() | ~mask).all()
    if not bool(fine):
        _tell_bad_rows(log_prob, old_log_prob, mask, given, rollout_is_weights)
    return loss * config.global_batch_info["dp_size"], _metrics(*inputs)


def _refuse_unread(chosen: PolicyLossConfig) -> None:
    """Refuse settings of verl's other losses."""
    for field in dataclasses.fields(PolicyLossConfig):
        if field.name in ("loss_mode", "rollout_correction"):  # the latter is read by the trainer
            continue
        value = getattr(chosen, field.name)
        expected = f"{field.default} (untouched), as {LOSS_MODE} does not read it"
        require(value == field.default, f"policy_loss.{field.name}", value, expected)


def _check_objective(objective: ObjectiveConfig) -> None:
    """Refuse what needs more than one micro-batch and no memory can give."""
    kind = objective.exponent.kind
    if kind not in _WITHIN_A_CALL:
        reason = _NOT_WITHIN_A_CALL.get(kind, "verl's loss is a function without a state")
        raise ConfigError(
            f"policy_loss.exponent_kind: got {kind!r} (member {objective.name!r}), expected "
            f'"fixed" or "matched", as {reason}; a fixed p is '
            "policy_loss.exponent_kind=fixed policy_loss.p=..."
        )
    for name, plain in (("clip_center", "one"), ("clip_width", "absolute")):
        value = getattr(objective, name)
        require(
            value in (plain, "sqrt"),  # which is of each response
            f"policy_loss.{name}",
            value,
            f'"{plain}", as a loss inside verl sees micro-batches and not the whole minibatch',
        )
    require(
        objective.kl_coef == 0,
        "policy_loss.kl_coef",
        objective.kl_coef,
        "0, as verl adds the KL term itself: actor.use_kl_loss=true actor.kl_loss_coef=...",
    )
    for name in ("entropy_coef", "entropy_target"):
        value, expected = getattr(objective, name), "actor.entropy_coeff, by which verl adds it"
        require(not value, f"policy_loss.{name}", value, expected)
    require(
        objective.clip_share is None,
        "policy_loss.clip_share",
        objective.clip_share,
        "None, as verl's loss is a function without a state",
    )
    refuse_unread_objective(objective, "policy_loss")


def _objective(config: ActorConfig, loss_agg_mode: str) -> ObjectiveConfig:
    """The objective in force, after the rest of the actor's config was found to agree with it."""
    chosen = config.policy_loss
    require(chosen.loss_mode == LOSS_MODE, "loss_mode", chosen.loss_mode, f'"{LOSS_MODE}"')
    _refuse_unread(chosen)
    own = chosen if isinstance(chosen, PowerMeanLossConfig) else PowerMeanLossConfig()
    objective = own.objective()
    wanted = AGGREGATION[objective.reduction]
    require(
        loss_agg_mode == wanted,
        "actor.loss_agg_mode",
        loss_agg_mode,
        f'"{wanted}", the {objective.reduction} of member {objective.name!r} (or another '
        "policy_loss.reduction)",
    )
    if objective.reduction == "constant":
        require(
            config.loss_scale_factor == objective.max_length,
            "actor.loss_scale_factor",
            config.loss_scale_factor,
            f"{objective.max_length}, as policy_loss.max_length",
        )
    plain = {f.name: f.default for f in dataclasses.fields(ActorConfig)}
    for name in _UNUSED:
        require(
            config[name] == plain[name],
            f"actor.{name}",
            config[name],
            f"{plain[name]} (untouched), as {LOSS_MODE} does not read it: set policy_loss.clip_low "
            "and clip_high, dual_clip, gate_positive and gate_negative",
        )
    return objective


def _denominators(config: ActorConfig, objective: ObjectiveConfig) -> Denominators:
    """Counts of the whole minibatch over all ranks."""
    counts = config.global_batch_info
    needed = "batch_num_tokens" if objective.reduction == "token_mean" else "global_batch_size"
    if counts.get(needed) is None or counts.get("dp_size") is None:
        raise ConfigError(
            f"global_batch_info: got {counts!r}, expected dp_size and {needed}; without them "
            "micro-batches do not add up to the minibatch (verl's engines supply them)"
        )
    return Denominators(
        sequences=int(counts.get("global_batch_size") or 0),
        tokens=int(counts.get("batch_num_tokens") or 0),
    )


def _own_advantages(values: Tensor, mask: Tensor, objective: ObjectiveConfig) -> Tensor:
    """One advantage for each row (0 for a row without tokens), or those of the tokens as they are.

    NaN stays NaN.
    """
    low, high = _extremes(values, mask)
    rows = mask.any(1)
    varying = (high > low) & rows
    if not bool(varying.any()):
        return torch.where(rows, high, torch.zeros_like(high))
    if objective.has_mean and objective.segments == "response":
        raise ShapeError(
            f"advantages: got different values within {int(varying.sum())} of {len(values)} "
            "responses, expected one per response; use algorithm.adv_estimator=grpo (or rloo, "
            "opo, gpg), not gae or an estimator with a baseline or a KL reward for each token; or "
            "policy_loss.segments=token (turn, where they differ between turns only)"
        )
    return values


def _extremes(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest value of each row's counted tokens."""
    low = values.masked_fill(~mask, torch.inf).amin(1)
    return low, values.masked_fill(~mask, -torch.inf).amax(1)


def _split_weights(advantages: Tensor, weights: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted advantages of the rows that have one weight; token weights, 1 in those rows."""
    low, high = _extremes(weights, mask)
    alike = (low == high) & mask.any(1)
    rows = torch.where(alike, high, torch.ones_like(high))
    own = rows if advantages.ndim == 1 else rows[:, None]
    return advantages * own, torch.where(alike[:, None], torch.ones_like(weights), weights)


def _tell_bad_rows(
    log_prob: Tensor, old_log_prob: Tensor, mask: Tensor, advantages: Tensor, weights: Tensor | None
) -> None:
    """Name what is not finite; verl then skips the update by its gradient's norm."""
    parts = {"log-prob": log_prob, "old log-prob": old_log_prob, "rollout weight": weights}
    named = [
        f"{name} of response {row}, token {token}"
        for name, values in parts.items()
        if values is not None and bool((bad := ~values.isfinite() & mask).any())
        for row, token in [bad.nonzero()[0].tolist()]
    ]
    counted = mask if advantages.ndim == 2 else mask.any(1)
    places = (~advantages.isfinite() & counted).nonzero().tolist()
    named += [f"advantage of response {place[0]}" for place in places[:1]]
    reason = ", ".join(named) or "all inputs are finite, their product is not"
    logger.warning("%s: the loss of a micro-batch is not finite: %s", LOSS_MODE, reason)


@torch.no_grad()
def _metrics(
    log_prob: Tensor,
    old_log_prob: Tensor,
    mask: Tensor,
    advantages: Tensor,
    objective: ObjectiveConfig,
) -> dict[str, float]:
    """`METRICS` by one transfer; 0 where no token counts, as verl wants every rank's every key."""
    measured = objective_metrics(log_prob, old_log_prob, mask, advantages, objective)
    zero = log_prob.new_tensor(0.0)
    values = torch.stack([measured.get(name, zero).to(log_prob.dtype) for name in METRICS.values()])
    return dict(zip(METRICS, values.tolist()))
