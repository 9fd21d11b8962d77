"""A packed sequence through a Hugging Face model: attention meets ordinary batches.

The layout of `hmpo.attention.packing` travels as a keyword of the model's forward pass down to the
attention function, so gradient checkpointing, which calls a layer again in the backward pass, finds
it there. The functions that models look up ("sdpa" in the interface object, "eager" in the modeling
file's globals) are wrapped once: a call with a layout becomes one call for each of its blocks, with
an ordinary mask; any other call passes through. So whatever the model's own function does (scaling,
soft caps, sinks, grouped heads) is done, and whoever listens to the calls below gets batches.

Whether a model's layers all attend that way is not taken on trust: `can_pack` compares a small
packed example with the padded one, once for each policy.
"""

import functools
import inspect
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hmpo.attention.packing import Block, Packed, pack
from hmpo.randomness import random_state_kept

logger = logging.getLogger(__name__)

PACKED = "hmpo_packed"
"""Keyword that carries the layout."""
INTERFACE = "ALL_ATTENTION_FUNCTIONS"
EAGER = "eager_attention_forward"
IMPLEMENTATIONS = ("sdpa", "eager")
"""Attention implementations that can be wrapped."""
TOLERANCE = 1024
"""Units of rounding that packed and padded may differ by in the comparison; a wrong pair of
tokens is worth a thousand times as much."""

_split_packed_calls: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()
"""Attention functions that know the keyword."""
_obstacles: weakref.WeakKeyDictionary[nn.Module, dict[str, str]] = weakref.WeakKeyDictionary()
"""By policy and attention implementation: why it cannot be packed, "" where it can."""


def model_inputs(packed: Packed) -> dict[str, Any]:
    """Keywords of a model's forward pass.

    The mask has a shape that no attention function can use, so a call that misses the layout
    fails loudly instead of attending across rows.
    """
    return {
        "input_ids": packed.input_ids,
        "attention_mask": torch.empty(1, 1, 0, 0, dtype=torch.bool, device=packed.input_ids.device),
        "position_ids": packed.position_ids,
        "use_cache": False,
        PACKED: packed,
    }


def unpacking(function: Callable[..., Any], *, eager: bool) -> Callable[..., Any]:
    """An attention function that splits a packed call into calls of its blocks.

    Args:
        function: for ordinary batches, with the signature that models call.
        eager: it adds its mask to the logits and is not causal without one.
    """

    @functools.wraps(function)
    def attention(
        module: nn.Module, query: Any, key: Any, value: Any, mask: Any, *args: Any, **options: Any
    ) -> Any:
        packed = options.pop(PACKED, None)
        if packed is None:
            return function(module, query, key, value, mask, *args, **options)
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

    _split_packed_calls.add(attention)
    return attention


def wrap_attention(policy: nn.Module, name: str) -> None:
    """Wrap the attention functions that `policy` looks up by `unpacking`, each once."""
    for kind in {type(module) for module in policy.modules()}:
        names = getattr(inspect.unwrap(kind.forward), "__globals__", {})
        if INTERFACE not in names:
            continue
        place, entry = (names, EAGER) if name == "eager" else (names[INTERFACE], name)
        if entry in place and place[entry] not in _split_packed_calls:
            place[entry] = unpacking(place[entry], eager=name == "eager")


def can_pack(policy: nn.Module, core: nn.Module) -> bool:
    """Whether packed rows give the hidden states that padded rows give.

    Asked of a small example once for each policy, in evaluation mode and without random numbers;
    the answer is logged. Compiled modules are not packed: each layout would be compiled anew.

    Args:
        policy: what is trained; the answer is kept with it.
        core: the transformers model in it.
    """
    if any(module._compiled_call_impl is not None for module in policy.modules()):
        return False
    config: Any = core.config
    name = config._attn_implementation
    obstacles = _obstacles.setdefault(policy, {})
    if name not in obstacles:
        with random_state_kept():  # a resumed run asks again, where the run it continues did not
            obstacles[name] = _obstacle(core, name)
        outcome = f"not packed: {obstacles[name]}" if obstacles[name] else "packed"
        logger.info("rows of %s are %s", type(core).__name__, outcome)
    if obstacles[name]:
        return False
    wrap_attention(core, name)
    return True


def window(core: nn.Module) -> float:
    """Tokens that every layer can look back on, from the configuration."""
    config: Any = core.config
    limits = (getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size"))
    return min((float(limit) for limit in limits if limit), default=torch.inf)


def _obstacle(core: nn.Module, name: str) -> str:
    """Why the model cannot be packed, or ""."""
    if name not in IMPLEMENTATIONS:
        return f"attention implementation {name!r} is not one of {', '.join(IMPLEMENTATIONS)}"
    if getattr(core, "_supports_attention_backend", False) is not True:
        return "its attention does not go through the shared interface"
    if core.base_model is core:
        return "it has no decoder of its own"
    if window(core) < EXAMPLE.shape[1]:
        return f"its layers look back on {window(core):g} tokens only"
    wrap_attention(core, name)
    try:
        return _difference(core)
    except Exception as error:  # a model may refuse anything; padded rows are always there
        return f"{type(error).__name__}: {error}".splitlines()[0]


EXAMPLE = torch.tensor(
    [[0, 3, 2, 1, 4, 2], [0, 3, 2, 3, 0, 0], [1, 2, 3, 3, 1, 0], [1, 2, 3, 0, 0, 0]]
)
"""Two prompts (3 columns) with two responses each; the first prompt is padded, and so are all
responses but one. One response is empty."""
EXAMPLE_LENGTHS = ((2, 3), (2, 1), (3, 2), (3, 0))


@torch.no_grad()
def _difference(core: Any) -> str:
    """How the hidden states of the example differ, or ""."""
    embeddings = core.get_input_embeddings().weight
    device, width = embeddings.device, EXAMPLE.shape[1]
    mask = torch.tensor([[0] * (3 - p) + [1] * (p + t) + [0] * (3 - t) for p, t in EXAMPLE_LENGTHS])
    ids, mask = (EXAMPLE % len(embeddings)).to(device), mask.bool().to(device)
    packed = pack(ids, mask, width - 3)
    assert packed is not None, "the example is regular"
    with torch.autocast(device.type, enabled=False):
        states = core.base_model(**model_inputs(packed)).last_hidden_state[0]
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)
        plain = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions}
        padded = core.base_model(**plain, use_cache=False).last_hidden_state
    states = states.index_select(0, packed.predictors)
    padded = padded[:, 2:-1][mask[:, 3:]]
    layers = core.config.num_hidden_layers
    if len(packed.readers) != layers:
        return f"{len(packed.readers)} of {layers} layers attend through the shared interface"
    error = float((states - padded).abs().max() / padded.abs().max())
    limit = min(0.1, TOLERANCE * torch.finfo(padded.dtype).eps)
    return "" if error <= limit else f"hidden states differ by {error:.2g} of the largest"


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
