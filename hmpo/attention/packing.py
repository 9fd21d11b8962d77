"""Prompts and responses as one sequence without padding, in which a prompt stands once.

Rows with the same prompt share one copy of it. The model sees one row of tokens,

    all distinct prompts, then all responses that are not empty,

with the positions that the tokens have in their own row. What is done token by token (embedding,
projections, MLP, norms) needs no padding; only attention looks at rows, and it gets them block by
block, rows of like length together:

    prompt block     queries and keys (R, Q), causal
    response block   queries (R, Q), keys (R, K + Q): the row's prompt, then the row itself

A slot beyond the end of a row repeats the row's last token, sees what that token sees, and is
seen by none. So it changes no output that is used, gets a gradient of exactly zero, and shows a
reader of the logits nothing that the row does not hold. The gradients of a shared prompt are
summed over its rows.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

CALL_COST = 1 << 15
"""Query-key pairs that cost as much time as one more call of an attention function."""
ALIKE = 0.75
"""A part is not cut off as long as its rows cost more than this share of the dearest."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Block:
    """Rows that go through the attention function together.

    Example: two responses of 3 and 2 tokens after one prompt of 4, as tokens 4 to 8 of the packed
    sequence: `start` 4, `stop` 9, `keys` (2, 7), prefix 4, `own` [[4, 5, 6], [7, 8, 8]],
    `back` [0, 1, 2, 3, 4].
    """

    start: int
    stop: int
    """Its tokens are `start` to `stop` - 1 of the packed sequence."""
    own: Int[Tensor, "R Q"]
    """Tokens of each row, its last one again beyond its end."""
    back: Int[Tensor, " n"]
    """Of the flattened slots of `own`, those that are no repetition."""
    keys: Int[Tensor, "R J"]
    """What each row attends to: the tokens of its prompt, then `own`."""
    prompts: Int[Tensor, " R"] | None
    """Which prompt each row follows; None for a block of prompts."""
    owners: tuple[int, ...]
    """The same on the host."""
    mask: Bool[Tensor, "r 1 Q J"]
    """True on what is seen; r is R or 1."""

    @property
    def prefix(self) -> int:
        """Slots before a row's own tokens."""
        return self.keys.shape[1] - self.own.shape[1]


@dataclass(frozen=True, eq=False, kw_only=True)
class Packed:
    """The packed sequence of some rows, and how attention is to read it."""

    input_ids: Int[Tensor, "1 N"]
    position_ids: Int[Tensor, "1 N"]
    predictors: Int[Tensor, " n"]
    """Of every response token, in order of rows: the token of the packed sequence whose hidden
    state predicts it."""
    shared: Int[Tensor, " s"]
    """Of `predictors`, those that are a prompt's last token, which several rows may share."""
    blocks: tuple[Block, ...]
    """Prompts first, in order of their tokens."""
    prompt_slots: Int[Tensor, " p"]
    """Of the flattened (prompt, position) table, the slots that are tokens, in packed order."""
    prompt_shape: tuple[int, int]
    """Distinct prompts, and tokens of the longest."""
    longest: int
    """Tokens of the longest row."""
    additive: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)
    """Masks of the blocks as numbers to add, made when an attention function wants such."""
    readers: set[int] = field(default_factory=set)
    """Ids of the attention modules that were called with it."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all distinct prompts."""
        return len(self.prompt_slots)


def pack(
    input_ids: Int[Tensor, "N S"], attention_mask: Bool[Tensor, "N S"], response_length: int
) -> Packed | None:
    """The rows as one packed sequence.

    Args:
        input_ids: prompts (left-padded) followed by responses (right-padded).
        attention_mask: True on real tokens.
        response_length: T, the columns that hold the responses.

    Returns:
        None where there is no response token, where a prompt does not end at the responses, or
        where a response has a hole: then a padded slot would predict a token.
    """
    before, mask = attention_mask[:, :-response_length], attention_mask[:, -response_length:]
    regular = before[:, -1].all() & (mask[:, 1:] <= mask[:, :-1]).all() & mask.any()
    if not bool(regular):
        return None
    table, owner = torch.unique(
        input_ids[:, :-response_length].masked_fill(~before, -1), dim=0, return_inverse=True
    )
    prompts, rows = (table >= 0).sum(1).tolist(), mask.sum(1).tolist()
    owners, device = owner.tolist(), input_ids.device
    order = sorted(range(len(prompts)), key=lambda b: (-prompts[b], b))
    rank = torch.tensor(order, device=device).argsort()  # of a prompt in packed order
    table, owner = table[order], rank[owner]
    lengths = torch.tensor([prompts[b] for b in order], device=device)
    starts = lengths.cumsum(0) - lengths
    blocks, start = [], 0
    for part in cut([prompts[b] ** 2 for b in order], CALL_COST):
        blocks.append(_block(start, lengths[part], None))
        start = blocks[-1].stop
    sizes = {i: (prompts[owners[i]], n) for i, n in enumerate(rows) if n}
    groups = _groups(sizes)
    places, counts = torch.zeros_like(owner), mask.sum(1)
    for group in groups:
        members = torch.tensor(group, device=device)
        which = owner[members]
        block = _block(start, counts[members], (which, starts[which], lengths[which]))
        places[members] = block.own[:, 0]
        blocks.append(block)
        start = block.stop
    taken = torch.tensor([i for group in groups for i in group], device=device)
    real, inner = table >= 0, mask[taken]
    positions = (attention_mask.long().cumsum(1) - 1)[:, -response_length:][taken]
    steps = torch.arange(response_length, device=device)
    predictors = places[:, None] + steps - 1
    predictors[:, 0] = (starts + lengths - 1)[owner]
    responses = input_ids[:, -response_length:][taken][inner]
    return Packed(
        input_ids=torch.cat([table[real], responses])[None],
        position_ids=torch.cat([(real.long().cumsum(1) - 1)[real], positions[inner]])[None],
        predictors=predictors[mask],
        shared=(steps == 0).expand_as(mask)[mask].nonzero()[:, 0],
        blocks=tuple(blocks),
        prompt_slots=_slots(lengths, int(lengths[0])),
        prompt_shape=(len(lengths), int(lengths[0])),
        longest=max(p + t for p, t in sizes.values()),
    )


def cut(costs: list[int], call: int) -> list[slice]:
    """Cut rows, dearest first, into parts that cost their rows times their first row's cost.

    Args:
        costs: of each row if it is the dearest of its part, from the highest to the lowest.
        call: cost of one more part.
    """
    parts, begin = [], 0
    for i, cost in enumerate(costs):
        saved = (len(costs) - i) * (costs[begin] - cost)
        if cost <= ALIKE * costs[begin] and saved >= call:
            parts.append(slice(begin, i))
            begin = i
    return [*parts, slice(begin, len(costs))]


def _groups(sizes: dict[int, tuple[int, int]]) -> list[list[int]]:
    """Response rows by block: prompts of like length, then responses of like length.

    Args:
        sizes: by row (tokens of its prompt, tokens of its response).
    """
    widest = max(prefix for prefix, _ in sizes.values())
    wasted = sum((widest - prefix) * length for prefix, length in sizes.values())
    order = sorted(sizes, key=lambda i: (-sizes[i][0], i))
    parts = [slice(0, len(order))]
    if wasted > CALL_COST:
        longest = max(length for _, length in sizes.values())
        parts = cut([sizes[i][0] * longest for i in order], CALL_COST)
    groups = []
    for part in parts:
        rows = sorted(order[part], key=lambda i: (-sizes[i][1], i))
        wide = max(sizes[i][0] for i in rows)
        costs = [sizes[i][1] * (wide + sizes[i][1]) for i in rows]
        groups += [rows[inner] for inner in cut(costs, CALL_COST)]
    return groups


def _block(start: int, lengths: Tensor, prompts: tuple[Tensor, Tensor, Tensor] | None) -> Block:
    """A block of rows whose tokens follow each other from `start` on.

    Args:
        start: first token.
        lengths: (R,) tokens of each row.
        prompts: (R,) number, first token and length of each row's prompt.
    """
    width = int(lengths.max())
    steps = torch.arange(width, device=lengths.device)
    starts = start + lengths.cumsum(0) - lengths
    own = starts[:, None] + torch.minimum(steps, lengths[:, None] - 1)
    mask = (steps <= steps[:, None])[None, None]
    if int(lengths.min()) < width:  # slots beyond the end see what the last token sees
        mask = mask & (steps < lengths[:, None])[:, None, None]
    keys, which = own, None
    if prompts is not None:
        which, first, tokens = prompts
        before = torch.arange(int(tokens.max()), device=lengths.device)
        keys = torch.cat([first[:, None] + torch.minimum(before, tokens[:, None] - 1), own], 1)
        real = before < tokens[:, None]
        rows = 1 if len(mask) == 1 and bool(real.all()) else len(real)
        real = real[:rows, None, None].expand(-1, 1, width, -1)
        mask = torch.cat([real, mask.expand(rows, -1, -1, -1)], 3)
    return Block(
        start=start,
        stop=start + int(lengths.sum()),
        own=own,
        back=_slots(lengths, width),
        keys=keys,
        prompts=which,
        owners=() if which is None else tuple(which.tolist()),
        mask=mask,
    )


def _slots(lengths: Tensor, width: int) -> Tensor:
    """Of a flattened (rows, width) table, the slots within the rows' lengths."""
    steps = torch.arange(width, device=lengths.device)
    return (steps < lengths[:, None]).flatten().nonzero()[:, 0]
