"""Upper bounds of attention logits from the gains of QK-norm alone.

An RMS-normalised vector of width n has norm at most sqrt(n), so queries are at most
sqrt(n) max|g_q| long whatever the inputs, keys likewise, and |logit| <= scale n max|g_q| max|g_k|.
Rotary embedding keeps norms, but for the factor that long-context variants multiply in.
"""

import weakref
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hmpo.attention.sites.families import family_of
from hmpo.attention.sites.norms import output_at


@dataclass(frozen=True, eq=False, kw_only=True)
class GainBound:
    """The bound of one attention module, made anew from its weights at every call."""

    module: "weakref.ref[nn.Module]"
    rotaries: tuple["weakref.ref[nn.Module]", ...]
    heads: int
    offset: float
    """What the norm adds to its weight: gain = weight + offset."""
    scale: float

    @torch.no_grad()
    def __call__(self, dtype: torch.dtype) -> Float[Tensor, " H"] | None:
        """The bound of each head for queries and keys rounded to `dtype`.

        None without module, and where weights are shards: whole ones would have to be gathered.
        In a forward pass of FSDP2 they are whole.
        """
        module = self.module()
        norms = () if module is None else _norms(module)
        if module is None or any(isinstance(p, DTensor) for n in norms for p in n.parameters()):
            return None
        query, key = (_longest(norm, self.offset, module) for norm in norms)
        factor = max([1.0, *(_rotary_factor(r) for ref in self.rotaries if (r := ref()))])
        query, key = (g.repeat_interleave(self.heads // len(g)) for g in (query, key))
        width = int(module.head_dim)  # type: ignore[arg-type]
        rounding = 16 * torch.finfo(dtype).eps + (width + 8) * torch.finfo(torch.float32).eps
        return query * key * (self.scale * factor**2 * (1.0 + rounding))


def gain_bound(model: nn.Module, module: nn.Module, heads: int) -> GainBound | None:
    """The bound of one attention module, or None where weights say nothing."""
    if not family_of(module).normed:
        return None
    norms = _norms(module)
    offsets = {_offset(norm) for norm in norms}
    rotaries = tuple(
        weakref.ref(m) for m in model.modules() if any("attention_scaling" in n for n in vars(m))
    )
    offset = offsets.pop()
    if offsets or offset is None or not rotaries:
        return None
    scale = float(module.scaling)  # type: ignore[arg-type]
    return GainBound(
        module=weakref.ref(module), rotaries=rotaries, heads=heads, offset=offset, scale=scale
    )


def _norms(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    children = dict(module.named_children())
    return children["q_norm"], children["k_norm"]


def _offset(norm: nn.Module) -> float | None:
    """0 or 1, as the norm multiplies by its weight or by 1 + weight; None if by neither.

    Asked of the norm itself, with an input of alternating sign: its mean is 0 and its RMS 1.
    """
    weight = dict(norm.named_parameters()).get("weight")
    if weight is None or weight.ndim != 1 or len(weight) % 2 or len(list(norm.parameters())) > 1:
        return None
    signs = torch.ones(len(weight), device=weight.device)
    signs[1::2] = -1
    gain = output_at(norm, 0.5, signs) * signs
    near = 8 * torch.finfo(weight.dtype).eps + 1e-4
    for offset in (0.0, 1.0):
        if torch.allclose(gain, torch.full_like(gain, 0.5 + offset), rtol=near, atol=near):
            return offset
    return None


def _longest(norm: nn.Module, offset: float, module: nn.Module) -> Float[Tensor, " h"]:
    """Longest vector that leaves the norm: one entry, or one per head of a full-width norm."""
    weight = dict(norm.named_parameters())["weight"].float()
    heads = len(weight) // int(module.head_dim)  # type: ignore[arg-type]
    gain = (weight + offset).abs().view(heads, -1).amax(1)
    return gain * len(weight) ** 0.5


def _rotary_factor(rotary: nn.Module) -> float:
    """Largest factor that a rotary embedding multiplies into queries and keys."""
    factors = [v for name, v in vars(rotary).items() if "attention_scaling" in name]
    return max([1.0, *(abs(float(v)) for v in factors)])
