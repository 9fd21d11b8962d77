"""The weights of a recognised model as the fast decoder reads them, and its smallest steps.

They are copied anew for each rollout, so that nothing can go stale: the layers that share an input
as one matrix, with adjacent outputs, which makes the product of few rows a third faster. Products
are written into memory that every step uses again (`Scratch`): a fresh tensor costs a page fault
every 4 KiB, which is a tenth to a quarter of a product.

The two halves of a head of queries or keys lie interleaved there, so that rotary embedding is one
complex product; scores do not change when queries and keys are permuted alike. The scale of the
scores rides on the queries' rotation.

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
        self._last: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of this shape with what was left there."""
        last = self._last.get(name)
        if last is not None and last.shape == shape:
            return last
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or len(flat) < size:
            flat = self._flat[name] = self._like.new_empty(size, dtype=dtype)
        last = self._last[name] = flat[:size].view(shape)
        return last


@dataclass(frozen=True)
class Norm:
    """RMSNorm, through the mean square as in the models: rounded otherwise it is less like them."""

    weight: Float[Tensor, " n"]
    epsilon: float
    least: Float[Tensor, ""]
    """`epsilon`: the mean is taken and this added in one operation."""
    paired: bool
    """Whether what comes are interleaved heads."""

    @classmethod
    def of(cls, module: Any, size: int | None = None) -> "Norm":
        """The norm of a module; of interleaved heads where their size is given."""
        weight, epsilon = module.weight, module.variance_epsilon
        if size is not None:
            weight = _interleaved(weight, size)
        return cls(weight, epsilon, weight.new_tensor(epsilon), size is not None)

    def __call__(self, x: Float[Tensor, "*n I"], out: Float[Tensor, "*n I"]) -> Tensor:
        """The norm of `x`, in `out`, which is other memory."""
        if x.dtype == torch.float32:
            squares = torch.mul(x, x, out=out).sum(-1, keepdim=True)
            scale = torch.add(self.least, squares, alpha=1 / x.shape[-1]).rsqrt_()
            return torch.mul(x, scale, out=out).mul_(self.weight)
        # The models take it in float32 whatever their weights are.
        wide = x.float()
        squares = wide.square()
        if self.paired:  # in the order of the models: in float64 the tokens' log-probs show it
            squares = squares.unflatten(-1, (-1, 2)).mT.flatten(-2)
        scale = torch.rsqrt(squares.mean(-1, keepdim=True) + self.epsilon)
        return torch.mul((wide * scale).to(x.dtype), self.weight, out=out)


@dataclass(frozen=True)
class FusedLinear:
    """One or more linear layers with the same input as one product."""

    weight: Float[Tensor, "I O"]
    bias: Float[Tensor, " O"] | None

    @classmethod
    def of(
        cls,
        *layers: nn.Linear,
        dtype: torch.dtype,
        transposed: bool,
        rotated: tuple[int, int] = (0, 0),
    ) -> "FusedLinear":
        """Copy the weights as they are now, in `dtype`.

        Args:
            layers: with inputs of one size.
            dtype: of the copy, and of the states that it will meet.
            transposed: whether to pay for adjacent outputs. One layer that needs neither this nor
                another dtype is not copied.
            rotated: how many of the layers, from the first, are heads to be rotated, of which size.
        """
        count, size = rotated
        stored: list[Tensor] = [layer.weight for layer in layers]
        stored[:count] = [_interleaved(x, size) for x in stored[:count]]
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
        biases[:count] = [_interleaved(x, size) for x in biases[:count]]
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

    attention_norm: Norm
    qkv: FusedLinear
    q_norm: Norm | None
    k_norm: Norm | None
    out: FusedLinear
    mlp_norm: Norm
    gate: FusedLinear
    up: FusedLinear
    down: FusedLinear

    def mlp(self, x: Tensor, compute: torch.dtype, scratch: Scratch) -> Tensor:
        """The residual stream after the gated layers, in the memory of `x`."""
        h = normalised(self.mlp_norm, x, scratch, compute)
        shape = (len(x), self.gate.outputs)
        gate = self.gate(h, scratch("gate", *shape, dtype=compute))
        up = self.up(h, scratch("up", *shape, dtype=compute))
        return self.down.add_to(x, functional.silu(gate, inplace=True).mul_(up), scratch)


class DecoderWeights:
    """A recognised model (`hmpo.sampling.decoder.why_not_fast`) with the weights of this moment."""

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
        self.embedding = core.embed_tokens.weight
        attention = core.layers[0].self_attn
        self.size = attention.head_dim
        self.repeat = attention.num_key_value_groups
        self.heads = attention.k_proj.out_features // self.size
        kind = {
            "dtype": dtype,
            "transposed": self.embedding.device.type == "cpu" and products >= WORTH,
        }
        self.layers = [_layer(module, kind, self.size) for module in core.layers]
        self.norm = Norm.of(core.norm)
        self.head = FusedLinear.of(policy.lm_head, **kind)
        everywhere = torch.arange(width, device=self.embedding.device)[None]
        cos, sin = (x[0] for x in core.rotary_emb(self.embedding, everywhere))
        half = self.size // 2
        real = torch.float64 if dtype == torch.float64 else torch.float32
        turn = torch.complex(cos[:, :half].to(real), sin[:, :half].to(real))
        scaled = turn * attention.scaling
        self._turns = torch.stack([scaled, turn, torch.ones_like(turn)], 1)[:, :, None]

    def turn(self, position: Int[Tensor, " n"]) -> Tensor:
        """How queries, keys and values are rotated at these positions, (n, 3, 1, d / 2).

        Queries are scaled too; values stay as they are.
        """
        return self._turns[position]

    def queries_keys_values(
        self, layer: Layer, x: Tensor, scratch: Scratch
    ) -> Float[Tensor, "n A d"]:
        """What the residual stream `x` asks, and is asked for, before rotation.

        The heads of the queries, then of the keys, then of the values.
        """
        h = normalised(layer.attention_norm, x, scratch, self.dtype)
        qkv = layer.qkv(h, scratch("qkv", len(x), layer.qkv.outputs, dtype=self.dtype))
        heads = qkv.view(len(x), -1, self.size)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k, _ = self.parts(heads)
            q.copy_(layer.q_norm(q, torch.empty_like(q)))
            k.copy_(layer.k_norm(k, torch.empty_like(k)))
        return heads

    def parts(self, heads: Float[Tensor, "n A d"]) -> tuple[Tensor, ...]:
        """Queries, keys and values apart."""
        return heads.split([self.heads * self.repeat, self.heads, self.heads], dim=1)

    def logits(self, x: Float[Tensor, "n I"], scratch: Scratch) -> Float[Tensor, "n V"]:
        """Of the next token, float32 or better."""
        h = normalised(self.norm, x, scratch, self.dtype)
        out = self.head(h, scratch("logits", len(x), self.head.outputs, dtype=self.dtype))
        if self.dtype != torch.bfloat16:
            return out
        return scratch("wide", *out.shape, dtype=torch.float32).copy_(out)


def _layer(module: Any, kind: dict[str, Any], size: int) -> Layer:
    attention, mlp = module.self_attn, module.mlp
    q_norm, k_norm = (attention._modules.get(name) for name in ("q_norm", "k_norm"))
    inputs = attention.q_proj, attention.k_proj, attention.v_proj
    return Layer(
        attention_norm=Norm.of(module.input_layernorm),
        qkv=FusedLinear.of(*inputs, **kind, rotated=(2, size)),
        q_norm=None if q_norm is None else Norm.of(q_norm, size),
        k_norm=None if k_norm is None else Norm.of(k_norm, size),
        out=FusedLinear.of(attention.o_proj, **kind),
        mlp_norm=Norm.of(module.post_attention_layernorm),
        gate=FusedLinear.of(mlp.gate_proj, **kind),
        up=FusedLinear.of(mlp.up_proj, **kind),
        down=FusedLinear.of(mlp.down_proj, **kind),
    )


def _interleaved(x: Tensor, size: int) -> Tensor:
    """Outputs (a, b), the halves of each head of `size`, as a0 b0 a1 b1 .."""
    return x.unflatten(0, (-1, 2, size // 2)).transpose(1, 2).flatten(0, 2)


def _transpose(source: Float[Tensor, "O I"], target: Float[Tensor, "I O"]) -> None:
    """Copy a matrix into its transposed place, tile by tile."""
    for i in range(0, source.shape[0], TILE):
        for j in range(0, source.shape[1], TILE):
            target[j : j + TILE, i : i + TILE] = source[i : i + TILE, j : j + TILE].t()


def normalised(norm: Norm, x: Tensor, scratch: Scratch, dtype: torch.dtype) -> Tensor:
    """RMSNorm of the residual stream, in `dtype`, in memory of the step."""
    out = norm(x, scratch("normalised", *x.shape, dtype=x.dtype))
    return out if dtype == x.dtype else scratch("narrow", *x.shape, dtype=dtype).copy_(out)


def as_pairs(x: Float[Tensor, "*n d"]) -> Tensor:
    """Neighbours as the parts of complex numbers, where there are such of this dtype."""
    return x if x.dtype == torch.bfloat16 else x.view(x.dtype.to_complex())


def rotate(x: Tensor, turn: Tensor, out: Tensor) -> None:
    """Rotary embedding (and what else `DecoderWeights.turn` does) of interleaved heads.

    Args:
        x: queries, keys or values, `as_pairs`.
        turn: complex, of one more or as many dimensions, broadcast against the heads.
        out: where to put it, `as_pairs`, of any strides.
    """
    if x.is_complex():
        torch.mul(x, turn, out=out)
    else:
        wide = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        out.copy_(torch.view_as_real(wide * turn).flatten(-2))
