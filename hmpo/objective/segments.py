"""Turns as rows of their own, where the mean acts on the ratios of a turn and not of a response.

A turn is an unbroken run of tokens that count: what an environment adds between two turns does not
count. Every turn of a response has its advantage, a mean and a clip of its own, and of the
response's weight omega_i the share of its tokens,

    omega_ik = omega_i L_ik / L_i        sum_k omega_ik = omega_i for every reduction

so `segments` decides what a mean is taken of, never what a response weighs. With p = 1 and no
sequence clip the two are one function; so they are, to the bit, where no response has two turns.
With `segments = "token"` each token is a row: its mean is its ratio for every p, and it may have an
advantage of its own. A segment has one advantage, as its mean is one number.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hmpo.config.objective import ObjectiveConfig
from hmpo.types import Tokens


@dataclass(frozen=True, eq=False, kw_only=True)
class Turns:
    """The turns of N responses, in order, a row each; a response without tokens has an empty one.

    Example: mask [[1, 0, 1, 1], [1, 1, 0, 0]]: `owner` [0, 0, 1], `mask` [[1, 0], [1, 1], [1, 1]],
    `share` [1/3, 2/3, 1].
    """

    mask: Bool[Tensor, "M U"]
    """True on tokens; U is the length of the longest turn."""
    owner: Int[Tensor, " M"]
    """The response that each is of."""
    share: Float[Tensor, " M"]
    """Its tokens over those of the response (float64); exactly 1 for the only turn of a
    response, and for an empty one."""
    response_mask: Bool[Tensor, "N T"]
    """True on the same tokens where they were."""

    def rows(self, values: Float[Tensor, " N"]) -> Float[Tensor, " M"]:
        """One value a response as one a turn."""
        return values[self.owner]

    def tokens(self, values: Float[Tensor, "N T"]) -> Float[Tensor, "M U"]:
        """One value a token, by turn; 0 on padding. Differentiable."""
        return values.new_zeros(self.mask.shape).masked_scatter(
            self.mask, values[self.response_mask]
        )

    def weights(self, omega: Float[Tensor, " N"]) -> Float[Tensor, " M"]:
        """What each turn has of its response's weight in a sum."""
        return omega[self.owner] * self.share.to(omega.dtype)


def turns_of(mask: Bool[Tensor, "N T"], config: ObjectiveConfig) -> Turns | None:
    """The turns, or tokens, if the mean acts on them and a response has more than one.

    Args:
        mask: True on tokens that count.
        config: the member of the family.
    """
    if config.segments == "response" or not config.has_mean:
        return None
    before = torch.nn.functional.pad(mask[:, :-1], (1, 0))
    starts = mask if config.segments == "token" else mask & ~before
    counts = starts.sum(1)
    if not bool((counts > 1).any()):
        return None
    rows = counts.clamp(min=1)
    owner = torch.arange(len(mask), device=mask.device).repeat_interleave(rows)
    number = (rows.cumsum(0) - rows).unsqueeze(1) + starts.cumsum(1) - 1
    lengths = number[mask].bincount(minlength=len(owner))
    steps = torch.arange(int(lengths.max()), device=mask.device)
    share = lengths.double() / mask.sum(1).clamp(min=1).double()[owner]
    return Turns(
        mask=steps < lengths.unsqueeze(1),
        owner=owner,
        share=share.masked_fill(lengths == 0, 1),
        response_mask=mask,
    )


def tokens_by_turn(tokens: Tokens, turns: Turns | None) -> Tokens:
    """Each turn as a row; the same tokens where the mean acts on responses."""
    if turns is None:
        return tokens

    def split(values: Tensor) -> Tensor:
        return turns.rows(values) if values.ndim == 1 else turns.tokens(values)

    names = ("logprobs", "old_logprobs", "advantages", "ref_logprobs", "weights")
    given = {name: getattr(tokens, name) for name in names}
    parts: dict[str, Any] = {k: split(v) for k, v in given.items() if v is not None}
    return dataclasses.replace(tokens, mask=turns.mask, **parts)


def exponent_by_turn(exponent: Tensor | None, turns: Turns | None) -> Tensor | None:
    """An exponent given for each response, for each turn; one for all stays."""
    if turns is None or exponent is None or exponent.ndim == 0:
        return exponent
    return turns.rows(exponent)
