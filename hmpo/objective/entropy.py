"""An entropy bonus: how much the entropy at each token weighs in the loss, fixed or adaptive.

    loss = ... - c sum_i omega_i mean_t H_it

with H_it the entropy of the policy at token t of response i (nat), and omega_i the weight of the
response by `objective.reduction`, as for the KL term; verl reduces its bonus in the same way. With
a target entropy c is adapted after each update as in Skywork-OR1 (arXiv 2505.22312): up by
`entropy_coef_delta` if the entropy of that update, as the token mean, is at or below
`entropy_target`, else down, within [0, `entropy_coef_max`]; an update whose predecessor was above
the target has no bonus, nor has the first.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hmpo.config.objective import ObjectiveConfig
from hmpo.errors import ConfigError
from hmpo.objective.masking import without_padding
from hmpo.objective.terms import row_weights
from hmpo.types import Denominators, Tokens


def entropy_weights(
    mask: Bool[Tensor, "N T"],
    config: ObjectiveConfig,
    denominators: Denominators | None,
    dtype: torch.dtype,
) -> Float[Tensor, "N T"]:
    """What the entropy at each token takes off the loss: c omega_i / L_i, and 0 on padding.

    Args:
        mask: True on tokens that count.
        config: the member, whose `entropy_coef` is c.
        denominators: counts over the whole minibatch, if these rows are a part of it.
        dtype: of the weights.
    """
    blank = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    rows = Tokens(logprobs=blank, old_logprobs=blank, mask=mask, advantages=blank[:, 0])
    omega = row_weights(rows, config, denominators, dtype)
    share = config.entropy_coef * omega / rows.lengths.clamp(min=1)
    return share.unsqueeze(1) * mask


def entropy_bonus(
    entropy: Float[Tensor, "N T"] | None,
    mask: Bool[Tensor, "N T"],
    config: ObjectiveConfig,
    denominators: Denominators | None,
) -> Float[Tensor, ""]:
    """What the bonus takes off the loss.

    Args:
        entropy: at each token (nat); carries the gradient.
        mask: True on tokens that count.
        config: the member.
        denominators: counts over the whole minibatch, if these rows are a part of it.

    Raises:
        ConfigError: the entropy is not given.
    """
    if entropy is None:
        raise ConfigError(
            "entropy: got None, expected the entropy (N, T) of the policy with entropy_coef = "
            f"{config.entropy_coef}"
        )
    entropy = without_padding(entropy, mask)
    return (entropy_weights(mask, config, denominators, entropy.dtype) * entropy).sum()


class EntropyCoefficient:
    """The coefficient c at the update to come.

    Args:
        config: the member; without `entropy_target` c is its `entropy_coef` for good.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        self.settings = config
        self.held = config.entropy_coef
        """c, whether or not it acts on this update."""
        self.last = math.inf
        """Entropy of the last update that was applied (nat)."""

    @property
    def adaptive(self) -> bool:
        """Whether c follows the entropy."""
        return self.settings.entropy_target is not None

    @property
    def value(self) -> float:
        """The coefficient at the update to come."""
        target = self.settings.entropy_target
        return self.held if target is None or self.last <= target else 0.0

    def follow(self, entropy: float) -> None:
        """Take note of the entropy (nat) of an update that was applied."""
        settings, target = self.settings, self.settings.entropy_target
        if target is None or not math.isfinite(entropy):
            return
        step = settings.entropy_coef_delta if entropy <= target else -settings.entropy_coef_delta
        self.held = min(max(0.0, self.held + step), settings.entropy_coef_max)
        self.last = entropy

    def state_dict(self) -> dict[str, Any]:
        """What was adapted; empty where nothing is."""
        return {"entropy": {"held": self.held, "last": self.last}} if self.adaptive else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        if self.adaptive:
            self.held, self.last = state["entropy"]["held"], state["entropy"]["last"]
