"""What a rollout has to learn from, and which tokens an update learned from most."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hmpo.types import Batch, Metrics, Rollout

BEFORE = 8
"""Tokens shown before each of the heaviest."""
HEAVIEST = 5
"""Tokens shown of an update."""


def signal_metrics(batch: Batch, alive: Sequence[bool]) -> Metrics:
    """What there is to learn from.

    The effective number of prompts is exp(-sum_q s_q log s_q), s_q the share of sum |A| that the
    responses to prompt q have: the number of prompts where all have the same, 1 where one has all,
    0 where none has any (Hill, 1973, Ecology 54, 427-432, the number of order 1). Where tokens have
    advantages of their own, a response's is their mean, and its |A| that of theirs.

    Args:
        batch: that is trained on.
        alive: of each group that was drawn, whether its accuracies differ.
    """
    rollout, lengths = batch.rollout, batch.rollout.lengths.cpu()
    tokens = batch.advantages.double().cpu()
    tokens = tokens[:, None] if tokens.ndim == 1 else tokens
    tokens = tokens * (rollout.response_mask & batch.valid[:, None]).cpu()
    own = lengths.clamp(min=1)
    advantages, size = tokens.sum(1) / own, tokens.abs().sum(1) / own
    size = size.reshape(-1, rollout.group_size).sum(1)
    shares = size[size > 0] / size.sum()
    spread = math.exp(float(-(shares * shares.log()).sum())) if len(shares) else 0.0
    return {
        "signal/dead_frac": 1 - sum(alive) / len(alive),
        "signal/duplicate_frac": duplicates(rollout) / len(advantages),
        "signal/prompts_eff": spread,
        "signal/positive_frac": _share((advantages > 0).sum(), (advantages != 0).sum()),
        "signal/positive_tokens_frac": _share((tokens > 0).sum(), (tokens != 0).sum()),
    }


def duplicates(rollout: Rollout) -> int:
    """Responses that an earlier one of their group has, token by token."""
    ids = rollout.response_ids.masked_fill(~rollout.real_mask, -1).cpu()
    groups = ids.reshape(-1, rollout.group_size, ids.shape[1])
    return sum(rollout.group_size - len(group.unique(dim=0)) for group in groups)


def heaviest(
    batch: Batch,
    weights: Float[Tensor, "M T"],
    tokenizer: Any,
    count: int = HEAVIEST,
) -> list[dict[str, Any]]:
    """The response tokens that a minibatch's gradient comes from most.

    Args:
        batch: the minibatch.
        weights: what multiplies the gradient of each token's log-prob in that of minus the loss,
            w A over the denominator: above 0 makes the token more likely.
        tokenizer: decodes them; None shows ids.
        count: of them, at most; those of weight 0 are none.

    Returns:
        `text` of the token and what stands `before` it, `weight`, the `share` that it has of
        sum |w A|, and the `reward` of its response; the heaviest first, the first in the minibatch
        of equals.
    """
    flat = weights.detach().double().masked_fill(~batch.rollout.response_mask, 0).cpu().flatten()
    whole = float(flat.abs().sum())
    order = flat.abs().argsort(descending=True, stable=True)[:count].tolist()
    found = []
    for place in order if whole > 0 else ():
        row, at = divmod(place, weights.shape[1])
        if flat[place] == 0:
            break
        ids = torch.cat([_real(batch.rollout, row), batch.rollout.response_ids[row, : at + 1]])
        found.append(
            {
                "text": _shown(tokenizer, ids[-1:]),
                "before": _shown(tokenizer, ids[-1 - BEFORE : -1]),
                "weight": float(flat[place]),
                "share": float(flat[place].abs()) / whole,
                "reward": float(batch.rewards[row]),
            }
        )
    return found


def place_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Where in a run an update's record lies."""
    return {name: record[name] for name in ("step", "rollout", "minibatch", "epoch_in_rollout")}


def _real(rollout: Rollout, row: int) -> Int[Tensor, " P"]:
    """A prompt without its padding."""
    return rollout.prompt_ids[row][rollout.prompt_mask[row]]


def _shown(tokenizer: Any, ids: Int[Tensor, " n"]) -> str:
    """Tokens as text, or as ids."""
    found = ids.tolist()
    return " ".join(map(str, found)) if tokenizer is None else tokenizer.decode(found)


def _share(part: Tensor, whole: Tensor) -> float:
    """A share; NaN of nothing."""
    return float(part) / float(whole) if whole else math.nan
