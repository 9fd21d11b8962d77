"""A packed sequence in attention: ordinary batches, block by block.

The layout of `hmpo.attention.packing` travels as a keyword of the model's forward pass down to the
attention function, so gradient checkpointing, which calls a layer again in the backward pass, finds
it there. A call with a layout becomes one call for each of its blocks, with an ordinary mask; any
other call passes through. So whatever the model's own function does (scaling, soft caps, sinks,
grouped heads) is done, and whoever listens to the calls below gets batches.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hmpo.attention.packing import Block, Packed

PACKED = "hmpo_packed"
"""Keyword that carries the layout."""


def unpacking(function: Callable[..., Any], *, eager: bool) -> Callable[..., Any]:
    """An attention function that splits a packed call into calls of its blocks.

    Args:
        function: for ordinary batches, with the signature that models call.
        eager: it adds its mask to the logits and is not causal without one.
    """

    def attention(
        module: nn.Module,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        *args: Any,
        **options: Any,
    ) -> Any:
        packed = options.pop(PACKED, None)
        if packed is None:
            return function(module, query, key, value, attention_mask, *args, **options)
        packed.readers.add(id(module))
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        return packed_attention(
            functools.partial(function, module),
            packed,
            query=query,
            key=key,
            value=value,
            options=options,
            additive=eager,
            causal=bool(causal) and not eager,
        )

    return attention


def packed_attention(
    function: Callable[..., tuple[Any, ...]],
    packed: Packed,
    *,
    query: Float[Tensor, "1 H N D"],
    key: Float[Tensor, "1 G N D"],
    value: Float[Tensor, "1 G N E"],
    options: dict[str, Any],
    additive: bool,
    causal: bool,
) -> tuple[Float[Tensor, "1 N H E"], None]:
    """Attention of a packed sequence, by an attention function for ordinary batches.

    Args:
        function: (query, key, value, mask, **options) -> (output (R, Q, H, E), ...).
        packed: the layout.
        query: of all tokens.
        key: of all tokens, not repeated over query heads.
        value: of all tokens, likewise.
        options: keywords handed on.
        additive: the function adds its mask to the logits, else it takes True for visible.
        causal: without a mask the function is causal.
    """
    sides = [x[0].transpose(0, 1).flatten(1) for x in (query, key, value)]
    queries = _TokensToBlocks.apply(packed, False, sides[0])
    keys = _TokensToBlocks.apply(packed, True, sides[1])
    values = _TokensToBlocks.apply(packed, True, sides[2])
    outputs = []
    for i, block in enumerate(packed.blocks):
        rows, width = block.own.shape
        q, k, v = (
            x[i].view(rows, -1, *full.shape[1::2]).transpose(1, 2)
            for x, full in ((queries, query), (keys, key), (values, value))
        )
        mask: Tensor | None = _additive_mask(packed, i, query.dtype) if additive else block.mask
        if causal and len(block.mask) == 1 and not block.prefix and width > 1:
            mask = None
        outputs.append(function(q, k, v, mask, **options)[0].flatten(0, 1).flatten(1))
    heads, wide = query.shape[1], value.shape[3]
    return _BlocksToTokens.apply(packed, *outputs).view(1, -1, heads, wide), None


def _additive_mask(packed: Packed, index: int, dtype: torch.dtype) -> Tensor:
    """The mask of a block as numbers to add to the logits."""
    if (index, dtype) not in packed.additive:
        mask = packed.blocks[index].mask
        zero = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        packed.additive[index, dtype] = zero.masked_fill_(~mask, torch.finfo(dtype).min)
    return packed.additive[index, dtype]


class _TokensToBlocks(torch.autograd.Function):
    """(N, C) tokens -> for each block (R * Q, C), or with prefix (R * (K + Q), C)."""

    @staticmethod
    def forward(ctx, packed, prefix, tokens):  # type: ignore[override]
        ctx.packed, ctx.prefix = packed, prefix
        return tuple(
            tokens.index_select(0, (block.keys if prefix else block.own).flatten())
            for block in packed.blocks
        )

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[override]
        packed, parts, total = ctx.packed, [], None
        for block, gradient in zip(packed.blocks, gradients):
            if ctx.prefix and block.prompts is not None:
                whole = gradient.view(*block.keys.shape, -1)
                if total is None:  # summed over rows in float32 at least
                    dtype = torch.promote_types(gradient.dtype, torch.float32)
                    shape = (*packed.prompt_shape, whole.shape[2])
                    total = torch.zeros(shape, dtype=dtype, device=whole.device)
                _add_rows(total[:, : block.prefix], block, whole[:, : block.prefix])
                gradient = whole[:, block.prefix :].flatten(0, 1)
            parts.append(gradient.index_select(0, block.back))
        tokens = torch.cat(parts)
        if total is not None:
            first = total.flatten(0, 1).index_select(0, packed.prompt_slots)
            tokens[: len(first)] += first.to(tokens.dtype)
        return None, None, tokens


def _add_rows(total: Tensor, block: Block, rows: Tensor) -> None:
    """Add each row to its prompt's."""
    if total.device.type != "cpu":
        assert block.prompts is not None, "rows that follow prompts"
        total.index_add_(0, block.prompts, rows.to(total.dtype))
        return
    for prompt, row in zip(block.owners, rows):  # a third of the time of index_add_ on a CPU
        total[prompt] += row


class _BlocksToTokens(torch.autograd.Function):
    """For each block (R * Q, C) -> (N, C), without the repeated slots."""

    @staticmethod
    def forward(ctx, packed, *outputs):  # type: ignore[override]
        ctx.packed = packed
        parts = zip(outputs, packed.blocks)
        return torch.cat([output.index_select(0, block.back) for output, block in parts])

    @staticmethod
    def backward(ctx, tokens):  # type: ignore[override]
        gradients = []
        for block in ctx.packed.blocks:
            part = tokens[block.start : block.stop]
            slots = part.new_zeros(block.own.numel(), part.shape[1])
            gradients.append(slots.index_copy_(0, block.back, part))
        return None, *gradients


def pick(packed: Packed, tokens: Float[Tensor, "N C"]) -> Float[Tensor, "n C"]:
    """The rows of `tokens` that predict the response tokens, in order of the responses' rows."""
    return _Pick.apply(packed, tokens)


class _Pick(torch.autograd.Function):
    """`pick`; the gradients of a prompt's last token are summed over its rows."""

    @staticmethod
    def forward(ctx, packed, tokens):  # type: ignore[override]
        ctx.packed, ctx.shape = packed, tokens.shape
        return tokens.index_select(0, packed.predictors)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        packed = ctx.packed
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        tokens = gradient.new_zeros(ctx.shape)
        tokens.index_copy_(0, packed.predictors, gradient)  # a shared token holds any of its rows
        shared = packed.predictors[packed.shared]
        total = torch.zeros(
            packed.prompt_tokens, gradient.shape[1], dtype=dtype, device=gradient.device
        )
        total.index_add_(0, shared, gradient[packed.shared].to(dtype))
        tokens[shared] = total[shared].to(tokens.dtype)
        return None, tokens
