"""The weights of a recognised model as the fast decoder reads them, and its smallest steps.

They are copied anew for each rollout, so that nothing can go stale: the layers that share an input
as one matrix, with adjacent outputs, which makes the product of few rows a third faster. Products
are written into memory that every step uses again (`Scratch`): a fresh tensor costs a page fault
every 4 KiB, which is a tenth to a quarter of a product.

The residual stream and the norms keep the dtype of the model, the products that of the copies
(`compute`): the two differ for a bfloat16 copy and under autocast.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

TILE = 128
"""Side of the tiles in which a matrix is transposed; both sides of a tile stay in the cache."""
PAD = 16
"""Columns between two rows of a copy: rows that lie a power of two apart share cache lines."""
WORTH = 256
"""Least rows times steps for which transposed copies pay for themselves."""


class Scratch:
    """Memory by name, used again by each step and grown where it is too small."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._flat: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of this shape with what was left there."""
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or len(flat) < size:
            flat = self._flat[name] = self._like.new_empty(size, dtype=dtype)
        return flat[:size].view(shape)


@dataclass(frozen=True)
class Projection:
    """One or more linear layers with the same input as one product."""

    weight: Float[Tensor, "I O"]
    bias: Float[Tensor, " O"] | None

    @classmethod
    def of(cls, *layers: nn.Linear, dtype: torch.dtype, transposed: bool) -> "Projection":
        """Copy the weights as they are now, in `dtype`.

        Args:
            layers: with inputs of one size.
            dtype: of the copy, and of the states that it will meet.
            transposed: whether to pay for adjacent outputs. One layer that needs neither this nor
                another dtype is not copied.
        """
        stored = [layer.weight for layer in layers]
        if not transposed:
            whole = stored[0] if len(stored) == 1 else torch.cat(stored)
            weight = whole.to(dtype).t()
        else:
            outputs = sum(map(len, stored))
            wide = stored[0].new_empty(stored[0].shape[1], outputs + PAD, dtype=dtype)
            weight = wide[:, :outputs]
            for source, part in zip(stored, weight.split([len(x) for x in stored], dim=1)):
                _transpose(source, part)
        if all(layer.bias is None for layer in layers):
            return cls(weight, None)
        biases: list[Tensor] = [
            m.weight.new_zeros(len(m.weight)) if m.bias is None else m.bias for m in layers
        ]
        return cls(weight, torch.cat(biases).to(dtype))

    @property
    def outputs(self) -> int:
        """O."""
        return self.weight.shape[1]

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        """The projection of `x` (n, I), in `out` (n, O)."""
        torch.mm(x, self.weight, out=out)
        return out if self.bias is None else out.add_(self.bias)

    def add_to(self, residual: Tensor, x: Tensor, scratch: Scratch) -> Tensor:
        """`residual` plus the projection of `x`, in the memory of `residual`."""
        if residual.dtype != x.dtype:
            out = scratch("sum", len(x), self.outputs, dtype=x.dtype)
            return residual.add_(self(x, out))
        residual.addmm_(x, self.weight)
        return residual if self.bias is None else residual.add_(self.bias)


@dataclass(frozen=True)
class Layer:
    """The weights of one layer."""

    attention_norm: Any
    qkv: Projection
    q_norm: Any
    k_norm: Any
    out: Projection
    mlp_norm: Any
    gate: Projection
    up: Projection
    down: Projection

    def mlp(self, x: Tensor, compute: torch.dtype, scratch: Scratch) -> Tensor:
        """The residual stream after the gated layers, in the memory of `x`."""
        h = normalised(self.mlp_norm, x, scratch, compute)
        shape = (len(x), self.gate.outputs)
        gate = self.gate(h, scratch("gate", *shape, dtype=compute))
        up = self.up(h, scratch("up", *shape, dtype=compute))
        return self.down.add_to(x, functional.silu(gate, inplace=True).mul_(up), scratch)


class DecoderWeights:
    """A recognised model (`hmpo.decoder.why_not_fast`) with the weights of this moment."""

    def __init__(self, policy: Any, dtype: torch.dtype, width: int, products: int) -> None:
        """Copy the projections.

        Args:
            policy: the model.
            dtype: of the products.
            width: longest sequence, in tokens.
            products: rows times steps that are to come.
        """
        core = policy.model
        self.dtype = dtype
        self.embedding, self.norm = core.embed_tokens.weight, core.norm
        attention = core.layers[0].self_attn
        self.size, self.scale = attention.head_dim, attention.scaling
        self.repeat = attention.num_key_value_groups
        self.heads = attention.k_proj.out_features // self.size
        kind = {
            "dtype": dtype,
            "transposed": self.embedding.device.type == "cpu" and products >= WORTH,
        }
        self.layers = [_layer(module, kind) for module in core.layers]
        self.head = Projection.of(policy.lm_head, **kind)
        everywhere = torch.arange(width, device=self.embedding.device)[None]
        cos, sin = (x[0] for x in core.rotary_emb(self.embedding, everywhere))
        half = self.size // 2
        self._turns = cos, -sin[:, :half], sin[:, half:]

    def turn(self, position: Int[Tensor, " n"]) -> list[Tensor]:
        """The rotation of the heads at these positions, for `rotate`."""
        return [x[position][:, None] for x in self._turns]

    def queries_keys_values(
        self, layer: Layer, x: Tensor, scratch: Scratch
    ) -> tuple[Float[Tensor, "n Q d"], Float[Tensor, "n H d"], Float[Tensor, "n H d"]]:
        """What the residual stream `x` asks, and is asked for, before rotation."""
        h = normalised(layer.attention_norm, x, scratch, self.dtype)
        qkv = layer.qkv(h, scratch("qkv", len(x), layer.qkv.outputs, dtype=self.dtype))
        parts = [self.heads * self.repeat, self.heads, self.heads]
        q, k, v = qkv.view(len(x), -1, self.size).split(parts, dim=1)
        if layer.q_norm is None:
            return q, k, v
        return _normalised(layer.q_norm, q), _normalised(layer.k_norm, k), v

    def logits(self, x: Float[Tensor, "n I"], scratch: Scratch) -> Float[Tensor, "n V"]:
        """Of the next token, float32 or better."""
        h = normalised(self.norm, x, scratch, self.dtype)
        out = self.head(h, scratch("logits", len(x), self.head.outputs, dtype=self.dtype))
        if self.dtype != torch.bfloat16:
            return out
        return scratch("wide", *out.shape, dtype=torch.float32).copy_(out)


def _layer(module: Any, kind: dict[str, Any]) -> Layer:
    attention, mlp = module.self_attn, module.mlp
    norms = attention._modules
    return Layer(
        attention_norm=module.input_layernorm,
        qkv=Projection.of(attention.q_proj, attention.k_proj, attention.v_proj, **kind),
        q_norm=norms.get("q_norm"),
        k_norm=norms.get("k_norm"),
        out=Projection.of(attention.o_proj, **kind),
        mlp_norm=module.post_attention_layernorm,
        gate=Projection.of(mlp.gate_proj, **kind),
        up=Projection.of(mlp.up_proj, **kind),
        down=Projection.of(mlp.down_proj, **kind),
    )


def _transpose(source: Float[Tensor, "O I"], target: Float[Tensor, "I O"]) -> None:
    """Copy a matrix into its transposed place, tile by tile."""
    for i in range(0, source.shape[0], TILE):
        for j in range(0, source.shape[1], TILE):
            target[j : j + TILE, i : i + TILE] = source[i : i + TILE, j : j + TILE].t()


def normalised(norm: Any, x: Tensor, scratch: Scratch, dtype: torch.dtype) -> Tensor:
    """RMSNorm of the residual stream, in `dtype`, in memory of the step."""
    if x.dtype != torch.float32:
        return _normalised(norm, x).to(dtype)
    out = torch.mul(x, x, out=scratch("normalised", *x.shape, dtype=x.dtype))
    scale = out.mean(-1, keepdim=True).add_(norm.variance_epsilon).rsqrt_()
    torch.mul(x, scale, out=out).mul_(norm.weight)
    return out if dtype == x.dtype else scratch("narrow", *x.shape, dtype=dtype).copy_(out)


def _normalised(norm: Any, x: Tensor) -> Tensor:
    """RMSNorm, which the models take in float32 whatever their weights are."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    return norm.weight * wide.to(x.dtype)


def rotate(x: Float[Tensor, "n *H d"], turn: list[Tensor], out: Tensor) -> None:
    """Rotary embedding: (a, b) -> (a cos - b sin, b cos + a sin) for the halves of a head.

    Args:
        x: queries or keys.
        turn: cos, -sin for the lower and sin for the upper half, (n, 1.., d or d / 2).
        out: where to put it, of any strides and dtype.
    """
    cos, sin_low, sin_high = turn
    half = x.shape[-1] // 2
    direct = out.dtype == cos.dtype == x.dtype
    wide = out if direct else torch.empty_like(x, dtype=cos.dtype)
    x = x.to(cos.dtype)
    torch.mul(x, cos, out=wide)
    wide[..., :half].addcmul_(x[..., half:], sin_low)
    wide[..., half:].addcmul_(x[..., :half], sin_high)
    if not direct:
        out.copy_(wide)
