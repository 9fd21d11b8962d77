"""Which objectives a recorded rollout is looked at under: exponents, clips, named members."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hmpo.config.members import BY_NAME
from hmpo.config.objective import ExponentConfig, ObjectiveConfig
from hmpo.config.weight import WeightConfig
from hmpo.errors import require
from hmpo.objective.in_force import ObjectiveInForce

EXPONENTS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
CLIP = 0.4
"""Half-width (nat) of the token clip that all exponents share: GMPO's and HMPO's."""
Kind = Literal["exponent", "clipped", "member", "own"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One objective.

    Example: `Variant(name="p = -1", kind="exponent", objective=..., p=-1.0)`.
    """

    name: str
    kind: Kind
    """An exponent without clip, one with the common clip, a named member, or the run's own."""
    objective: ObjectiveConfig
    exponent: float | None = None
    """Overrides the exponents of the objective, where they come from a schedule or the like."""
    p: float | None = None
    """The exponent in words; None where there is none, or one for each response or sign."""


def plain(p: float, clip: float | None = None) -> ObjectiveConfig:
    """The power mean of exponent `p`, all responses alike, with a token clip (nat) or without."""
    if clip is None:
        return ObjectiveConfig(name="plain", p=p, clip_level="none")
    return ObjectiveConfig(name="plain", p=p, clip_low=clip, clip_high=clip)


def exponent_variants(exponents: Sequence[float], clip: float | None) -> list[Variant]:
    """One for each exponent.

    Raises:
        ConfigError: fewer than two that differ.
    """
    require(len({*exponents}) > 1, "exponents", tuple(exponents), "at least two that differ")
    kind: Kind = "exponent" if clip is None else "clipped"
    return [
        Variant(name=f"p = {p:g}", kind=kind, objective=plain(p, clip), p=p)
        for p in sorted({*map(float, exponents)})
    ]


def member_variants(rewards: Float[Tensor, " N"] | None) -> list[Variant]:
    """The named members; one whose exponent follows a schedule stands here with both ends.

    Args:
        rewards: total rewards, which a reward-adaptive exponent takes note of; None, and rewards
            that it is not made for (`rewards_fit`), leave it as it is before any reward.
    """
    return [v for name, make in BY_NAME.items() for v in _member(name, make(), rewards)]


def rewards_fit(rewards: Float[Tensor, " N"]) -> bool:
    """Whether the mean of the finite rewards is in [0, 1], as a reward-adaptive p expects."""
    known = rewards[rewards.isfinite()]
    return bool(len(known)) and 0 <= float(known.mean()) <= 1


def own_variant(
    objective: ObjectiveConfig, exponent: Float[Tensor, ""] | None, name: str = "this run"
) -> Variant:
    """The objective of a run as it stands at an update, without a KL term."""
    objective = dataclasses.replace(objective, kl_coef=0.0, entropy_coef=0.0, entropy_target=None)
    p = None if exponent is None else float(exponent)
    return Variant(
        name=name, kind="own", objective=objective, exponent=p, p=_exponent(objective, p)
    )


def without_limits(variant: Variant) -> Variant:
    """The same mean and weights of responses, with no clip and no gate.

    What has no mean to differentiate (CISPO, REINFORCE) becomes p = 1, whose gradient that of
    ratios as constant weights is.
    """
    objective = dataclasses.replace(
        variant.objective,
        gate="clip",
        weight=WeightConfig(),
        proximal_coef=0.0,
        clip_level="none",
        clip_width="absolute",
        clip_center="one",
        clip_share=None,
        token_clamp=None,
        dual_clip=None,
        exponent=ExponentConfig(),
    )
    return dataclasses.replace(variant, objective=objective)


def alike(variant: Variant) -> Variant:
    """The same mean and limits, with all responses weighing the same."""
    objective = dataclasses.replace(variant.objective, reduction="sequence_mean", max_length=None)
    return dataclasses.replace(variant, objective=objective)


def _member(name: str, objective: ObjectiveConfig, rewards: Tensor | None) -> list[Variant]:
    """A member; with a scheduled exponent as it begins and as it ends."""
    in_force = ObjectiveInForce(objective, torch.device("cpu"), 2)
    if rewards is not None and rewards_fit(rewards):
        in_force.observe(rewards[rewards.isfinite()])
    found = []
    for update, suffix in ((0, ""), (1, ", end")):
        if suffix and objective.exponent.kind != "linear":
            break
        config, exponent = in_force.at(update)
        p = None if exponent is None else float(exponent)
        shown = _exponent(config, p)
        found.append(
            Variant(name=name + suffix, kind="member", objective=config, exponent=p, p=shown)
        )
    return found


def _exponent(objective: ObjectiveConfig, p: float | None) -> float | None:
    """The one exponent of all responses, if there is one."""
    if objective.mean != "power" or not objective.has_mean:
        return None
    if p is not None:
        return p
    if objective.exponent.kind == "matched":
        return None
    both = objective.exponent_for(positive=True), objective.exponent_for(positive=False)
    return both[0] if both[0] == both[1] else None
