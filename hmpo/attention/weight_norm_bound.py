"""An upper bound of attention logits from weights alone, for layers nobody can read.

A layer's input is the output of a norm, so its length is bounded: sqrt(d) before the gain. With a
head's projection W, the norm's gain g and bias b, the projection's bias c and d inputs,
|q| <= sqrt(d) * |W diag(g)|_2 + |W b + c|, the same holds for k, and a logit is at most
scale * |q| * |k|. Where queries and keys are normalised themselves, |q| <= sqrt(n) * max|g| over
the n values normalised together. Rotary embedding keeps lengths but for its `attention_scaling`.

Sound, and loose: real inputs do not point along the largest singular direction of both sides. A
clip by this bound shrinks healthy layers; that is why it is never on by itself.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hmpo.attention.sites import AttentionSite, ClipTarget, HeadRows
from hmpo.attention.sites.families import INPUT_NORMS, family_of
from hmpo.attention.sites.norms import find_norms, gain_offset

ROUNDING = 1.0 + 1e-5


@torch.no_grad()
def weight_norm_bound(model: nn.Module, site: AttentionSite) -> Float[Tensor, " H"] | str:
    """Upper bound of each query head's largest logit for any input, or why there is none.

    Float64. The bound is of logits before any soft cap.
    """
    module, target = site.module(), site.target("all")
    if module is None or isinstance(target, str):
        return "the module no longer exists" if isinstance(target, ClipTarget) else target
    if not family_of(module).bounded or not target.key:
        return f"no bound is known for {type(module).__name__}"
    norms = find_norms(module)
    if isinstance(norms, str):
        return norms
    lengths = []
    for side, norm in zip((target.query, target.key), norms, strict=True):
        length = _projected(model, site, side) if norm is None else _normalised(side)
        if isinstance(length, str):
            return length
        lengths.append(length)
    query = lengths[0].expand(site.heads)
    key = lengths[1].expand(site.kv_heads).repeat_interleave(site.heads // site.kv_heads)
    return query * key * (_scale(model, module) * ROUNDING)


def _normalised(side: tuple[HeadRows, ...]) -> Float[Tensor, " heads"]:
    gain, *bias = side
    count = gain.parameter.shape[-1]
    length = math.sqrt(count) * (_blocks(gain) + gain.offset).abs().amax((1, 2))
    return length + sum(_blocks(piece).flatten(1).norm(dim=1) for piece in bias)


def _projected(
    model: nn.Module, site: AttentionSite, side: tuple[HeadRows, ...]
) -> Float[Tensor, " heads"] | str:
    matrices = [piece for piece in side if piece.parameter.ndim == 2]
    biases = [piece for piece in side if piece.parameter.ndim == 1]
    if len(matrices) != 1 or len(biases) > 1:
        return "no bound is known for adapters"
    parent = model.get_submodule(site.name.rpartition(".")[0])
    norm = next((n for n in map(dict(parent.named_children()).get, INPUT_NORMS) if n), None)
    own = {} if norm is None else dict(norm.named_parameters())
    if norm is None or "weight" not in own or isinstance(gain_offset(norm, "it"), str):
        return f"the layer's input has no bound: none of {', '.join(INPUT_NORMS)} is a known norm"
    gain = own["weight"].double() + float(gain_offset(norm, "it"))
    weight = _blocks(matrices[0])
    shift = weight @ own["bias"].double() if "bias" in own else weight.new_zeros(weight.shape[:2])
    for piece in biases:
        shift = shift + _blocks(piece)[..., 0]
    spectral = torch.linalg.matrix_norm(weight * gain, ord=2)
    return math.sqrt(len(gain)) * spectral + shift.norm(dim=1)


def _blocks(piece: HeadRows) -> Float[Tensor, "heads length width"]:
    """A parameter's rows by head, in float64; width 1 for vectors."""
    whole = piece.parameter.detach()
    rows = whole.movedim(piece.axis, 0).double().reshape(whole.shape[piece.axis], -1)
    heads = torch.arange(piece.heads, device=rows.device)[:, None] * piece.stride
    return rows[piece.start + heads + torch.arange(piece.length, device=rows.device)]


def _scale(model: nn.Module, module: nn.Module) -> float:
    """The module's own factor, times what rotary embeddings multiply queries and keys by."""
    own = getattr(module, "scaling", None)
    width = getattr(module, "head_dim", None)
    scale = float(own) if isinstance(own, float) else float(width) ** -0.5  # type: ignore[arg-type]
    stretch = [
        value
        for child in model.modules()
        for name, value in vars(child).items()
        if name.endswith("attention_scaling") and isinstance(value, float | int)
    ]
    return scale * max(1.0, *stretch, 1.0) ** 2
