"""Rows of a minibatch or a rollout, shared out to ranks and joined again."""

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hmpo.errors import require
from hmpo.randomness import keyed_generator
from hmpo.ranks.shard import shards_of
from hmpo.ranks.world import Ranks
from hmpo.sampling.options import SamplingOptions
from hmpo.types import Rollout

ALONE = Ranks()
"""One process: all rows are its own, and joining them puts them into order."""


def rows_of_rank(
    rollout: Rollout, ranks: Ranks, idle: Bool[Tensor, " M"] | None = None
) -> Int[Tensor, " m"]:
    """This rank's rows, rising: whole prompts where there are enough of them.

    Args:
        rollout: all rows.
        ranks: that share them, by what they cost: tokens.
        idle: rows that go forward only, at a third of what another costs; None for none.
    """
    device = rollout.response_ids.device
    if ranks.alone:
        return torch.arange(len(rollout.response_ids), device=device)
    tokens = rollout.prompt_mask.sum(1) + rollout.extents
    costs = (3 * tokens if idle is None else torch.where(idle, tokens, 3 * tokens)).tolist()
    numbers = prompt_numbers(rollout).tolist()
    pieces = [[row] for row in range(len(numbers))]
    if len(set(numbers)) >= 2 * ranks.size:  # fewer would leave ranks of unequal load
        groups: dict[int, list[int]] = {}
        for row, number in enumerate(numbers):
            groups.setdefault(number, []).append(row)
        pieces = list(groups.values())
    own = ranks.own([sum(costs[row] for row in piece) for piece in pieces])
    rows = sorted(row for piece in own for row in pieces[piece])
    return torch.tensor(rows, dtype=torch.int64, device=device)


def prompt_numbers(rollout: Rollout) -> Int[Tensor, " M"]:
    """A number for each row, equal for rows of equal prompts."""
    prompts = rollout.prompt_ids.masked_fill(~rollout.prompt_mask, -1)
    return prompts.unique(dim=0, return_inverse=True)[1]


def joined(
    values: Sequence[Tensor],
    rows: Sequence[Tensor],
    rollout: Rollout,
    ranks: Ranks,
) -> Float[Tensor, "M T"]:
    """All ranks' values in the order of the rows.

    Args:
        values: (m, T) of each of this rank's parts; no part where it has no rows.
        rows: (m,) of each part.
        rollout: all rows.
        ranks: that share them.
    """
    old = rollout.old_logprobs
    none = torch.arange(0, device=old.device)
    own = torch.cat(list(values)) if values else old[:0]
    return ranks.join(own, torch.cat(list(rows)) if rows else none, len(old))


def joined_rollout(
    part: Rollout | None,
    prompts: Sequence[int],
    asked: tuple[Int[Tensor, "B P"], Bool[Tensor, "B P"]],
    group_size: int,
    options: SamplingOptions,
    ranks: Ranks,
) -> Rollout:
    """The responses to all prompts, from those that each rank has sampled to its own.

    Args:
        part: of this rank; None where it has no prompt.
        prompts: the numbers of its prompts.
        asked: ids and mask of all prompts.
        group_size: G, responses per prompt.
        options: how responses were drawn.
        ranks: that share the prompts.
    """
    ids, mask = (x.repeat_interleave(group_size, 0) for x in asked)
    if part is None:
        floats = torch.zeros(0, 1, device=ids.device)  # of the dtype of those that have rows
        flags = torch.zeros(0, 1, dtype=torch.bool, device=ids.device)
        part = Rollout(
            prompt_ids=ids[:0], prompt_mask=mask[:0], response_ids=ids[:0, :1],
            response_mask=flags, old_logprobs=floats, sampling_logprobs=floats,
            finished=flags[:, 0], group_size=group_size, fast=True,
        )  # fmt: skip
    rows = [prompt * group_size + g for prompt in prompts for g in range(group_size)]
    places = torch.tensor(rows, dtype=torch.int64, device=ids.device)
    fills = {
        "response_ids": options.pad_token,
        "response_mask": 0,
        "old_logprobs": 0,
        "sampling_logprobs": 0,
        "finished": 0,
    }
    found = {
        name: ranks.join(getattr(part, name), places, len(ids), fill=fill)
        for name, fill in fills.items()
    }
    fast = not ranks.any(not part.fast)
    return Rollout(prompt_ids=ids, prompt_mask=mask, group_size=group_size, fast=fast, **found)


def refuse_different(ranks: Ranks, policy: nn.Module, config: object) -> None:
    """Refuse ranks that do not begin with the same settings and weights.

    Raises:
        RankError: one line that names the rank.
    """
    if ranks.alone:
        return
    ranks.agree("configuration", repr(config))
    if shards_of(policy) is None:
        agree_on_weights(ranks, policy)


def agree_on_weights(ranks: Ranks, policy: nn.Module) -> None:
    """Refuse ranks whose policies differ in their weights.

    Raises:
        RankError: one line that names the rank.
    """
    digest = hashlib.sha256()
    for parameter in policy.parameters():  # bytes, as processors differ in how they sum
        digest.update(parameter.detach().flatten().view(torch.uint8).cpu().numpy().tobytes())
    ranks.agree("policy", digest.digest())


def minibatch_rows(
    rows: int, minibatches: int, *, seed: int, rollout: int, epoch: int
) -> list[Int[Tensor, " M"]]:
    """A random partition of a rollout's rows into `minibatches` parts of nearly equal size.

    Args:
        rows: N, responses of the rollout.
        minibatches: parts, at most N.
        seed: of the run.
        rollout: index of the rollout.
        epoch: pass over the rollout.
    """
    require(1 <= minibatches <= rows, "minibatches", minibatches, f"1 to {rows}")
    generator = keyed_generator(seed, f"minibatch-{epoch}", rollout)
    return list(torch.randperm(rows, generator=generator).tensor_split(minibatches))
