"""QK-norm: queries or keys normalised after their projection, so that only gains set their size."""

import copy
import inspect
import weakref

import torch
from torch import Tensor, nn

from hmpo.attention.sites.families import QK_NORMS
from hmpo.attention.sites.projections import HeadSlices, why_fixed
from hmpo.attention.sites.rows import HeadRows, Scope
from hmpo.attention.sites.site import AttentionSite, ClipTarget

_offsets: "weakref.WeakKeyDictionary[nn.Module, float | str]" = weakref.WeakKeyDictionary()


def find_norms(module: nn.Module) -> tuple[nn.Module | None, nn.Module | None] | str:
    """The norms of queries and keys, None for a side without; or why they are not understood."""
    children = {
        name: child
        for name, child in module.named_children()
        if "norm" in name and not isinstance(child, nn.Identity)
    }
    known = {name: pair for pair in QK_NORMS for name in pair}
    for name in children.keys() - known.keys():
        if name.startswith(("q", "k")):
            return f"{name} normalises queries or keys in a way that is not known"
    pairs = {known[name] for name in children if name in known}
    if len(pairs) > 1:
        return f"norms {sorted(children)} are more than one pair"
    query, key = next(iter(pairs), QK_NORMS[0])
    return children.get(query), children.get(key)


def norm_rows(
    norm: nn.Module, name: str, heads: int, width: int, scope: Scope
) -> tuple[list[HeadRows], bool] | str:
    """Rows of a norm's gain (and bias), and whether each head has its own.

    A gain of one head's width is shared by all heads; one of all heads' width, or of shape
    (heads, width), has a part for each.
    """
    own = dict(norm.named_parameters())
    gain = own.get("weight")
    if gain is None or not own.keys() <= {"weight", "bias"}:
        return f"{name} has parameters {sorted(own)}, expected a gain called weight"
    shape = tuple(gain.shape)
    slices = {
        (width,): HeadSlices(heads=1, length=width),
        (heads, width): HeadSlices(heads=heads, length=1),
        (heads * width,): HeadSlices(heads=heads, length=width),
    }
    if shape not in slices:
        return f"{name} has a gain of shape {shape}, expected one of {[*slices]}"
    offset = gain_offset(norm, name)
    if isinstance(offset, str):
        return offset
    rows = [
        slices[shape].rows(parameter, offset=offset if label == "weight" else 0.0)
        for label, parameter in own.items()
    ]
    for label, piece in zip(own, rows, strict=True):
        if (fault := why_fixed(piece, f"{name}.{label}", scope)) is not None:
            return fault
    return rows, shape != (width,) or heads == 1


def gain_target(
    site: AttentionSite,
    norms: tuple[nn.Module | None, nn.Module | None],
    width: int,
    scope: Scope,
    *,
    alone: bool = False,
) -> ClipTarget | str:
    """The gains of a site's norms, or why they cannot be scaled.

    Args:
        site: says how many heads there are.
        norms: of queries and keys, as `find_norms` gives them.
        width: of a head.
        scope: which parameters may be scaled, see `Scope`.
        alone: whether only the queries may be scaled.
    """
    if scope == "adapters":
        return "a norm after the projections undoes what an adapter scales"
    sides, own, plus_one = [], [], False
    for norm, side, heads in zip(norms, "qk", (site.heads, site.kv_heads), strict=True):
        if side == "k" and alone:
            continue
        if norm is None:
            return f"only one of queries and keys is normalised ({side} is not)"
        result = norm_rows(norm, f"the {side} norm", heads, width, scope)
        if isinstance(result, str):
            return result
        rows, of_each_head = result
        sides.append(tuple(rows))
        own.append(of_each_head)
        plus_one = plus_one or rows[0].offset != 0
    per_head = all(own)
    if not per_head and any(rows[0].heads > 1 for rows in sides):
        return "one norm is shared by all heads and the other is not"
    what = "gains of the q norm" if alone else "gains of the q and k norms"
    form = f"{what}, as 1 + w" if plus_one else what
    how = f"{form}, {'head by head' if per_head else 'the layer as a whole'}"
    return ClipTarget(query=sides[0], key=() if alone else sides[1], how=how, per_head=per_head)


def gain_offset(norm: nn.Module, name: str) -> float | str:
    """0 if the norm multiplies by its weight w, 1 if by 1 + w, or why it does neither.

    Found by asking the norm itself: its output at w = 0, 1 and 2 on a fixed input.
    """
    if norm not in _offsets:
        _offsets[norm] = _probe(norm)
    offset = _offsets[norm]
    return f"{name} {offset}" if isinstance(offset, str) else offset


def _probe(norm: nn.Module) -> float | str:
    needed = [
        p
        for p in inspect.signature(norm.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(needed) != 1:
        return f"takes {len(needed)} inputs, expected one"
    weight = dict(norm.named_parameters(recurse=False))["weight"]
    x = torch.linspace(-1.0, 2.0, weight.numel()).view(1, *weight.shape)
    zero, one, two = (output_at(norm, gain, x) for gain in (0.0, 1.0, 2.0))
    unit = one - zero
    for offset in (0.0, 1.0):
        if _close(zero, offset * unit) and _close(two, (offset + 2) * unit):
            return offset
    return "is not linear in its gain"


@torch.no_grad()
def output_at(norm: nn.Module, gain: float, x: Tensor) -> Tensor:
    """What the norm makes of `x` with every gain set to `gain`, float32.

    A copy with whole weights is asked: no hooks run, and sharded weights stay where they are.
    """
    probe = copy.copy(norm)
    values = {
        name: torch.full(p.shape, gain if name == "weight" else 0.0, dtype=p.dtype, device=p.device)
        for name, p in norm.named_parameters(recurse=False)
    }
    probe.__dict__["_parameters"] = values
    return probe.forward(x.to(values["weight"])).float()


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(torch.isclose(a, b, rtol=0.02, atol=1e-3).all())
