"""Whether a Hugging Face model may be given packed rows, and how they are given to it.

Its attention modules split packed calls (`hmpo.attention.packed`) as long as a layout lives: until
the last backward pass that may ask for a layer again is over. Whether the layers all attend that
way is not taken on trust: `can_pack` compares a small packed example with the padded one, once for
each policy. Nobody who listens hears that.
"""

import logging
import weakref
from typing import Any

import torch
from torch import nn

from hmpo.attention.interface import (
    IMPLEMENTATIONS,
    intercept,
    registered_function,
    uses_interface,
)
from hmpo.attention.packed import PACKED
from hmpo.attention.packing import Packed, pack
from hmpo.attention.tap import attend, not_recorded
from hmpo.randomness import random_state_kept

logger = logging.getLogger(__name__)

TOLERANCE = 1024
"""Units of rounding that packed and padded may differ by in the comparison; a wrong pair of
tokens is worth a thousand times as much."""

_obstacles: weakref.WeakKeyDictionary[nn.Module, dict[Any, str]] = weakref.WeakKeyDictionary()
"""By policy, and by the attention it uses: why it cannot be packed, "" where it can."""


def model_inputs(core: nn.Module, packed: Packed) -> dict[str, Any]:
    """Keywords of a model's forward pass.

    The mask has a shape that no attention function can use, so a call that misses the layout
    fails loudly instead of attending across rows.

    Args:
        core: the transformers model that gets them, straight or through its wrappers. Its
            attention splits packed calls until the layout is gone.
        packed: the rows.
    """
    for module in core.modules():
        if uses_interface(module):
            weakref.finalize(packed, intercept(module, attend))
    return {
        "input_ids": packed.input_ids,
        "attention_mask": torch.empty(1, 1, 0, 0, dtype=torch.bool, device=packed.input_ids.device),
        "position_ids": packed.position_ids,
        "use_cache": False,
        PACKED: packed,
    }


def can_pack(policy: nn.Module, core: nn.Module) -> bool:
    """Whether packed rows give the hidden states that padded rows give.

    Asked of a small example once for each policy, in evaluation mode and without random numbers;
    the answer is logged. Compiled modules are not packed: each layout would be compiled anew.

    Args:
        policy: what is trained; the answer is kept with it.
        core: the transformers model in it.
    """
    return not packing_obstacle(policy, core)


def packing_obstacle(policy: nn.Module, core: nn.Module) -> str:
    """Why `can_pack` says no, in a line; "" where it says yes. Arguments as there."""
    if any(module._compiled_call_impl is not None for module in policy.modules()):
        return "it is compiled"
    config: Any = core.config
    name = config._attn_implementation
    kind = (name, next(map(registered_function, filter(uses_interface, core.modules())), None))
    obstacles = _obstacles.setdefault(policy, {})
    if kind not in obstacles:
        # A resumed run asks again, where the run that it continues did not.
        with random_state_kept(), not_recorded():
            obstacles[kind] = _obstacle(core, name)
        outcome = f"not packed: {obstacles[kind]}" if obstacles[kind] else "packed"
        logger.info("rows of %s are %s", type(core).__name__, outcome)
    return obstacles[kind]


def window(core: nn.Module) -> float:
    """Tokens that every layer can look back on, from the configuration."""
    whole: Any = core.config
    parts = (whole, whole.get_text_config())  # one and the same but where there are images
    keys = ("sliding_window", "attention_chunk_size")
    limits = (getattr(config, key, None) for config in parts for key in keys)
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
        states = core.base_model(**model_inputs(core, packed)).last_hidden_state[0]
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)
        plain = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions}
        padded = core.base_model(**plain, use_cache=False).last_hidden_state
    states = states.index_select(0, packed.predictors)
    padded = padded[:, 2:-1][mask[:, 3:]]
    layers = core.config.get_text_config().num_hidden_layers
    if len(packed.readers) != layers:
        return f"{len(packed.readers)} of {layers} layers attend through the shared interface"
    error = float((states - padded).abs().max() / padded.abs().max())
    limit = min(0.1, TOLERANCE * torch.finfo(padded.dtype).eps)
    return "" if error <= limit else f"hidden states differ by {error:.2g} of the largest"
