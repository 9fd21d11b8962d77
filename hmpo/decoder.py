"""A fast decoder for Llama- and Qwen-shaped models, over the weights that they have now.

The prompts are read by the model itself, once each. Every later token goes through the plain
tensor code below: query, key and value in one product, keys and values in buffers that double when
full. The prompt's keys and values are kept once per prompt and attended
by all responses to it in one product. The responses' own lie head-major, (heads, rows, tokens, d),
so that the queries of a group are adjacent there and need no copy.

The copies of the projections are made anew for each rollout: nothing can go stale.

A model is recognised exactly, module by module (`why_not_fast`); any other takes the path through
its modules. Both paths make the same tokens in float32, up to ties within rounding.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

FAMILIES = {
    "LlamaForCausalLM": "Llama",
    "MistralForCausalLM": "Mistral",
    "Qwen2ForCausalLM": "Qwen2",
    "Qwen3ForCausalLM": "Qwen3",
}
"""Classes of transformers that are recognised, and the prefix of their modules' names."""
PARTS = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
PLAIN = (nn.Linear, nn.Embedding, nn.ModuleList, nn.SiLU)
ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings that depend on the position alone, not on the length of the sequence."""
ATTENTION = ("sdpa", "eager")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
GROWTH = 64
"""Tokens that the buffers hold at first."""


def why_not_fast(policy: nn.Module, width: int) -> str | None:
    """Why the fast decoder cannot serve `policy`, or None where it can.

    Args:
        policy: any module.
        width: longest sequence, prompt and response, in tokens.

    Returns:
        A short reason that names what was found.
    """
    kind = type(policy)
    known = sys.modules.get(kind.__module__)
    prefix = FAMILIES.get(kind.__name__)
    if prefix is None or not kind.__module__.startswith("transformers.models."):
        return f"{kind.__name__} is not one of {', '.join(FAMILIES)}"
    parts = {vars(known).get(prefix + part) for part in PARTS} | set(PLAIN)
    for name, module in policy.named_modules():
        where = name or "the model"
        if type(module) not in parts and not _is_silu(module):
            return f"{where} is a {type(module).__name__}"
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            return f"{where} has a hook or a forward method of its own"
    return _unfit_weights(policy) or _unfit_config(policy, width)


def _is_silu(module: nn.Module) -> bool:
    """Whether this is the activation, under either of its names."""
    kind = type(module)
    return kind.__name__ == "SiLUActivation" and kind.__module__ == "transformers.activations"


def _unfit_weights(policy: nn.Module) -> str | None:
    dtypes = {parameter.dtype for parameter in policy.parameters()}
    devices = {parameter.device for parameter in policy.parameters()}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES) or len(devices) != 1:
        return f"weights of {sorted(map(str, dtypes))} on {sorted(map(str, devices))}"
    for name, parameter in policy.named_parameters():
        if type(parameter) is not nn.Parameter:
            return f"{name} is a {type(parameter).__name__}"
    if torch.is_autocast_enabled(next(iter(devices)).type):
        return "autocast is on"
    return None


def _unfit_config(policy: Any, width: int) -> str | None:
    config = policy.config
    if config.hidden_act != "silu":
        return f"hidden_act is {config.hidden_act}"
    if config._attn_implementation not in ATTENTION:
        return f"attention is {config._attn_implementation}"
    rope = (config.rope_parameters or {}).get("rope_type")
    if rope not in ROPE:
        return f"rope_type is {rope}"
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    window = config.sliding_window if config.model_type == "mistral" else None
    if set(layers) != {"full_attention"} or (window is not None and window <= width):
        return f"a sliding window of {config.sliding_window} tokens is in reach"
    if policy.model.embed_tokens.max_norm is not None:
        return "embed_tokens has max_norm"
    return None


@dataclass(frozen=True)
class _Projection:
    """One or more linear layers with the same input as one product.

    The weight is copied so that its outputs are adjacent: the product of few rows with a matrix
    lying so is a third faster in MKL than with the transposed one that linear layers hold.
    """

    weight: Float[Tensor, "I O"]
    bias: Float[Tensor, " O"] | None

    @classmethod
    def of(cls, *layers: nn.Linear) -> "_Projection":
        weight = layers[0].weight if len(layers) == 1 else torch.cat([m.weight for m in layers])
        weight = weight.t().contiguous()
        if all(layer.bias is None for layer in layers):
            return cls(weight, None)
        biases: list[Tensor] = [
            m.weight.new_zeros(len(m.weight)) if m.bias is None else m.bias for m in layers
        ]
        return cls(weight, torch.cat(biases))

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return x.mm(self.weight)
        return torch.addmm(self.bias, x, self.weight)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """`residual` plus the projection of `x`, in the memory of `residual`."""
        residual.addmm_(x, self.weight)
        return residual if self.bias is None else residual.add_(self.bias)


@dataclass
class _Layer:
    """Weights of one layer, and its keys and values.

    Keys and values: of the prompts (heads, prompts, P, d), of the rows (heads, rows, capacity, d).
    """

    module: Any
    qkv: _Projection
    out: _Projection
    gate: _Projection
    up: _Projection
    down: _Projection
    prompt: tuple[Tensor, Tensor]
    own: tuple[Tensor, Tensor]


class FastDecoder:
    """Next-token logits of a recognised model; the same interface as the module path."""

    def __init__(
        self,
        policy: Any,
        logits: Float[Tensor, "B V"],
        cache: Any,
        mask: Tensor,
        group_size: int,
        max_length: int,
    ) -> None:
        """Start from the model's own pass over the prompts.

        Args:
            policy: the model, see `why_not_fast`.
            logits: of the token after each prompt.
            cache: the model's keys and values of the prompts.
            mask: (B, P), True on prompt tokens, left-padded.
            group_size: responses per prompt.
            max_length: longest response.
        """
        core = policy.model
        self.embedding, self.norm, self.head = core.embed_tokens, core.norm, policy.lm_head
        attention = core.layers[0].self_attn
        self.size, self.scale = attention.head_dim, attention.scaling
        self.repeat = attention.num_key_value_groups
        self.heads = attention.k_proj.out_features // self.size
        prompts, width = mask.shape
        everywhere = torch.arange(width + max_length, device=mask.device)[None]
        self.cos, self.sin = (x[0] for x in core.rotary_emb(self.embedding.weight, everywhere))
        self.sin_low = -self.sin[:, : self.size // 2]
        self.sin_high = self.sin[:, self.size // 2 :]
        self.bias = None
        if not bool(mask.all()):
            empty = torch.zeros(mask.shape, dtype=logits.dtype, device=mask.device)
            self.bias = empty.masked_fill_(~mask, -torch.inf)
        self.logits = logits.repeat_interleave(group_size, 0)
        self.position = mask.sum(1).repeat_interleave(group_size) - 1
        self.prompt_of = torch.arange(prompts, device=mask.device).repeat_interleave(group_size)
        self.slots: Tensor | None = None
        self.made = 0
        self.layers = [
            self._layer(module, stored, len(self.prompt_of), min(GROWTH, max_length))
            for module, stored in zip(core.layers, cache.layers)
        ]

    def _layer(self, module: Any, stored: Any, rows: int, capacity: int) -> _Layer:
        attention, mlp = module.self_attn, module.mlp
        shape = (self.heads, rows, capacity, self.size)
        return _Layer(
            module=module,
            qkv=_Projection.of(attention.q_proj, attention.k_proj, attention.v_proj),
            out=_Projection.of(attention.o_proj),
            gate=_Projection.of(mlp.gate_proj),
            up=_Projection.of(mlp.up_proj),
            down=_Projection.of(mlp.down_proj),
            prompt=_both(lambda x: x.transpose(0, 1).contiguous(), (stored.keys, stored.values)),
            own=(stored.keys.new_empty(shape), stored.keys.new_empty(shape)),
        )

    def advance(self, token: Int[Tensor, " N"], keep: Int[Tensor, " K"] | None) -> None:
        """Read `token`, after dropping all rows but `keep`."""
        if keep is not None:
            token = token[keep]
            self._select(keep)
        if self.made == self.layers[0].own[0].shape[2]:
            for layer in self.layers:
                layer.own = _both(_doubled, layer.own)
        self.position = self.position + 1
        turn = [x[self.position][:, None] for x in (self.cos, self.sin_low, self.sin_high)]
        x = functional.embedding(token, self.embedding.weight)
        for layer in self.layers:
            h = _normalised(layer.module.input_layernorm, x)
            x = layer.out.add_to(x, self._attend(layer, layer.qkv(h), turn))
            h = _normalised(layer.module.post_attention_layernorm, x)
            x = layer.down.add_to(x, functional.silu(layer.gate(h)).mul_(layer.up(h)))
        self.made += 1
        self.logits = self.head(_normalised(self.norm, x))

    def _attend(self, layer: _Layer, qkv: Tensor, turn: list[Tensor]) -> Tensor:
        """What the heads read: the prompt's values and the row's own, under one softmax."""
        rows, heads, size = len(qkv), self.heads, self.size
        q, k, v = qkv.view(rows, -1, size).split([heads * self.repeat, heads, heads], dim=1)
        attention = layer.module.self_attn
        if "q_norm" in attention._modules:
            q, k = _normalised(attention.q_norm, q), _normalised(attention.k_norm, k)
        keys, values = layer.own
        keys[:, :, self.made] = _rotated(k, turn).transpose(0, 1)
        values[:, :, self.made] = v.transpose(0, 1)
        keys, values = (x[:, :, : self.made + 1].flatten(0, 1) for x in (keys, values))
        query = q.new_empty(heads, rows, self.repeat, size)
        turned = _rotated(q, turn).view(rows, heads, self.repeat, size).transpose(0, 1)
        torch.mul(turned, self.scale, out=query)
        own = query.flatten(0, 1).bmm(keys.transpose(1, 2)).view(heads, rows, self.repeat, -1)
        scores = torch.cat([self._prompt_scores(layer, query), own], dim=-1)
        high = torch.float64 if scores.dtype == torch.float64 else torch.float32
        share = scores.softmax(-1, dtype=high).to(scores.dtype)
        width = share.shape[-1] - keys.shape[1]
        read = share[..., width:].flatten(0, 1).bmm(values).view(query.shape)
        read += self._prompt_values(layer, share[..., :width])
        return read.transpose(0, 1).reshape(rows, -1)

    def _prompt_scores(self, layer: _Layer, query: Tensor) -> Float[Tensor, "H N R P"]:
        """Scores of the prompt's tokens, of all responses to one prompt in one product."""
        keys = layer.prompt[0]
        grouped = self._grouped(query).bmm(keys.flatten(0, 1).transpose(1, 2))
        scores = grouped.view(*keys.shape[:2], -1, keys.shape[2])
        if self.bias is not None:
            scores += self.bias[None, :, None]
        return self._rows(scores)

    def _prompt_values(self, layer: _Layer, share: Tensor) -> Float[Tensor, "H N R D"]:
        values = layer.prompt[1]
        read = self._grouped(share).bmm(values.flatten(0, 1))
        return self._rows(read.view(*values.shape[:2], -1, self.size))

    def _grouped(self, x: Float[Tensor, "H N R X"]) -> Float[Tensor, "HB S X"]:
        """Rows of one prompt as rows of one matrix; groups of unequal size are filled up."""
        prompts = self.layers[0].prompt[0].shape[1]
        if self.slots is not None:
            wide = x.new_zeros(x.shape[0], prompts * self.group, *x.shape[2:])
            x = wide.index_copy_(1, self.slots, x)
        return x.unflatten(1, (prompts, -1)).flatten(2, 3).flatten(0, 1)

    def _rows(self, x: Float[Tensor, "H B S X"]) -> Float[Tensor, "H N R X"]:
        """`_grouped` undone."""
        x = x.unflatten(2, (-1, self.repeat)).flatten(1, 2)
        return x if self.slots is None else x.index_select(1, self.slots)

    def _select(self, keep: Int[Tensor, " K"]) -> None:
        """Drop all rows but `keep`, and prompts without rows."""
        self.position, prompt_of = self.position[keep], self.prompt_of[keep]
        alive, prompt_of, counts = prompt_of.unique(return_inverse=True, return_counts=True)
        for layer in self.layers:
            layer.own = _both(lambda x: _kept(x, keep, self.made), layer.own)
            if len(alive) < layer.prompt[0].shape[1]:
                layer.prompt = _both(lambda x: x.index_select(1, alive), layer.prompt)
        if self.bias is not None:
            self.bias = self.bias[alive]
        self.prompt_of, self.group = prompt_of, int(counts.max())
        before = counts.cumsum(0) - counts
        place = torch.arange(len(keep), device=keep.device) - before[prompt_of]
        even = len(keep) == len(alive) * self.group
        self.slots = None if even else prompt_of * self.group + place


def _normalised(norm: Any, x: Tensor) -> Tensor:
    """RMSNorm, which the models take in float32 whatever their weights are."""
    if x.dtype == torch.float32:
        return functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    return norm.weight * wide.to(x.dtype)


def _rotated(x: Float[Tensor, "N H D"], turn: list[Tensor]) -> Float[Tensor, "N H D"]:
    """Rotary embedding: (a, b) -> (a cos - b sin, b cos + a sin) for the halves of a head."""
    cos, sin_low, sin_high = turn
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin_low)
    out[..., half:].addcmul_(x[..., :half], sin_high)
    return out


def _both(change: Callable[[Tensor], Tensor], pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A change of keys and values alike."""
    return change(pair[0]), change(pair[1])


def _doubled(x: Float[Tensor, "H N T D"]) -> Float[Tensor, "H N T2 D"]:
    """The same buffer with room for as many tokens again."""
    wide = x.new_empty(*x.shape[:2], 2 * x.shape[2], x.shape[3])
    wide[:, :, : x.shape[2]] = x
    return wide


def _kept(x: Tensor, keep: Tensor, made: int) -> Tensor:
    """The rows `keep` of a buffer, whose first `made` tokens are written."""
    fewer = x.new_empty(x.shape[0], len(keep), *x.shape[2:])
    fewer[:, :, :made] = x[:, :, :made].index_select(1, keep)
    return fewer
