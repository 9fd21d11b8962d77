"""What a policy takes of a machine's memory, from its configuration alone.

The model is made on torch's "meta" device, where tensors have shapes and no memory: its parameters
are counted, and one forward pass there shows which tensors autograd keeps for the backward pass,
whatever the architecture. No weight is read.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from hmpo.config import PolicyConfig
from hmpo.errors import ModelError
from hmpo.models.hub import no_hub
from hmpo.models.loading import _with_lora
from hmpo.models.policy import unwrap
from hmpo.models.precision import stored_precision, training_dtype
from hmpo.models.quiet import quiet_transformers
from hmpo.models.source import whole_policy

logger = logging.getLogger(__name__)

FLOAT = 4
"""Bytes of a float32."""
FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4: half a byte, a byte of scale for 64 weights, four for 256 scales."""


def meta_policy(config: PolicyConfig) -> nn.Module:
    """The policy that a configuration names, without memory, its adapters included.

    Raises:
        ModelError: there is no such policy, or its configuration makes no model.
        MissingDependencyError: LoRA without peft.
    """
    folder = whole_policy(config.path, config.revision)
    attention = "eager" if config.attention == "eager" else "sdpa"
    try:
        with no_hub(), quiet_transformers(), torch.device("meta"):
            settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            dtype = training_dtype(config, stored_precision(folder))
            model = _made(settings, attention, dtype)
            if config.lora_rank > 0:
                model = _with_lora(model, config, folder)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        text = " ".join(str(error).split())[:300]
        raise ModelError(f"policy {config.path!r}: no model can be made of it ({text})") from error
    return model.eval()  # as the log-probs of an update are taken: without dropout


def _made(settings: Any, attention: str, dtype: torch.dtype) -> nn.Module:
    options = {"trust_remote_code": False, "dtype": dtype}
    try:
        return AutoModelForCausalLM.from_config(settings, attn_implementation=attention, **options)
    except ValueError:  # it has no sdpa
        return AutoModelForCausalLM.from_config(settings, attn_implementation="eager", **options)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, those that share memory counted once."""
    held = {_key(tensor): tensor for tensor in tensors}
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def weight_bytes(model: nn.Module, config: PolicyConfig) -> int:
    """Bytes of all weights and buffers as a run holds them, frozen matrices in 4 bits where asked.

    Args:
        model: as `meta_policy` makes it.
        config: the policy.
    """
    whole = bytes_of([*model.parameters(), *model.buffers()])
    if config.quantize == "none":
        return whole
    core: Any = unwrap(model)
    head = core.get_output_embeddings()
    linear = [m.weight for m in core.modules() if isinstance(m, nn.Linear) and m is not head]
    frozen = [weight for weight in linear if not weight.requires_grad]
    return whole - bytes_of(frozen) + round(FOUR_BITS * sum(w.numel() for w in frozen))


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a forward pass holds for its backward pass.

    Example: `Kept(bytes=2**30, measured=True)`.
    """

    bytes: int
    measured: bool
    """Whether the pass was made on the meta device; else the bytes are a rule of thumb."""


def kept_by_forward(model: nn.Module, rows: int, length: int) -> Kept:
    """Bytes that autograd keeps of one pass over rows of tokens, without logits.

    Args:
        model: on the meta device; what trains there is what has a gradient.
        rows: of the batch.
        length: tokens of each.
    """
    owned = {_key(t) for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _key(tensor) not in owned:
            kept[_key(tensor)] = tensor
        return tensor

    core: Any = unwrap(model)
    ids = torch.zeros(rows, length, dtype=torch.int64, device="meta")
    # A whole mask is taken as it is; of any other, transformers would look at the values.
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool, device="meta")
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), _FusedAttention():
            core.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    except Exception as error:  # a model may look at values, and there are none
        logger.info("%s ran no pass without memory: %s", type(core).__name__, error)
        return Kept(bytes=_rule_of_thumb(core, rows * length), measured=False)
    return Kept(bytes=sum(t.untyped_storage().nbytes() for t in kept.values()), measured=True)


def _rule_of_thumb(core: Any, tokens: int) -> int:
    """Of a plain decoder: 8 hidden and 4 inner vectors for each layer and token, and its heads."""
    shape = core.config.get_text_config()
    hidden = int(getattr(shape, "hidden_size", 0))
    inner = int(getattr(shape, "intermediate_size", None) or 4 * hidden)
    layers = int(getattr(shape, "num_hidden_layers", 1))
    return FLOAT * tokens * layers * (10 * hidden + 4 * inner)


class _FusedAttention(TorchFunctionMode):
    """Attention as a fused kernel keeps it: queries, keys, values, result, and a sum for each row.

    On the meta device torch would take the path that holds all scores.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return func(*args, **kwargs or {})


class _Attention(torch.autograd.Function):
    """Keeps what a fused kernel keeps, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """A result of the right shape."""
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1]))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Not asked for."""
        raise NotImplementedError


def key_value_bytes(model: nn.Module) -> int:
    """Bytes of keys and values of one token, over all layers that attend."""
    shape: Any = unwrap(model)
    shape = shape.config.get_text_config()
    heads = getattr(shape, "num_attention_heads", None) or 1
    hidden = getattr(shape, "hidden_size", 0)
    size = getattr(shape, "head_dim", None) or hidden // heads
    key_heads = getattr(shape, "num_key_value_heads", None) or heads
    kinds = getattr(shape, "layer_types", None)
    layers = int(getattr(shape, "num_hidden_layers", 0))
    if kinds:
        layers = sum("attention" in kind and "linear" not in kind for kind in kinds)
    return 2 * layers * int(key_heads) * int(size) * next(model.parameters()).element_size()
