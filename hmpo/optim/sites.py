"""Attention sites: where a model attends, and which weights make its logits.

One builder per family of attention module turns a module into an `AttentionSite`, or passes.
A new family is one more function in `BUILDERS`.
"""

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hmpo.optim.attention_tap import IMPLEMENTATIONS, INTERFACE

NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm")
"""Children that normalise queries or keys after the projection, which undoes any scaling of it."""


@dataclass(frozen=True, eq=False)
class HeadRows:
    """A parameter whose axis 0 is `heads` equal blocks of rows, one per head."""

    parameter: nn.Parameter
    heads: int

    @torch.no_grad()
    def scale(self, factors: Float[Tensor, " heads"]) -> None:
        """Multiply each head's block by its factor, in float32 or better; 1 changes no bit."""
        weight = self.parameter
        rows = factors.repeat_interleave(weight.shape[0] // self.heads)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        rows = rows.to(device=weight.device, dtype=dtype)
        weight.mul_(rows.view(-1, *[1] * (weight.ndim - 1)))


@dataclass(frozen=True, eq=False)
class ClipTarget:
    """The parameters that make one site's queries and keys; logits are linear in both sides."""

    query: tuple[HeadRows, ...]
    key: tuple[HeadRows, ...]


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention module whose logits can be read.

    It holds its module weakly and looks the weights up when asked, so that replaced parameters
    (adapters, `load_state_dict(assign=True)`) are found.
    """

    name: str
    """Qualified module name, for example "model.layers.0.self_attn"."""
    heads: int
    """Query heads H."""
    kv_heads: int
    """Key heads G; query head h reads key head h // (H // G)."""
    module: "weakref.ref[nn.Module]"
    resolve: Callable[[nn.Module], ClipTarget | str]
    """Gives what to scale, or the reason why nothing can be scaled."""

    def target(self) -> ClipTarget | str:
        """What to scale now, or why nothing can be scaled."""
        module = self.module()
        return "the module no longer exists" if module is None else self.resolve(module)


def find_sites(model: nn.Module) -> tuple[list[AttentionSite], list[str]]:
    """All sites of a model, and the attention modules that cannot be read ("name: reason")."""
    sites, unread = [], []
    for name, module in model.named_modules():
        found = next((s for build in BUILDERS if (s := build(name, module)) is not None), None)
        if isinstance(found, AttentionSite):
            sites.append(found)
        elif found is not None:
            unread.append(f"{name or type(module).__name__}: {found}")
    return sites, unread


def separate_projections(name: str, module: nn.Module) -> AttentionSite | str | None:
    """Transformers attention with q_proj and k_proj (Llama, Qwen2, Mistral and their kin)."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if INTERFACE not in getattr(code, "co_names", ()):
        return None
    children = dict(module.named_children())
    if not {"q_proj", "k_proj"} <= children.keys():
        return f"{type(module).__name__} has no q_proj and k_proj"
    width = getattr(module, "head_dim", None)
    if not isinstance(width, int) or width < 1:
        return f"{type(module).__name__} has no head_dim"
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if implementation not in (*IMPLEMENTATIONS, None):
        return (
            f"attention implementation {implementation!r} hides its logits; "
            'load the model with attn_implementation="sdpa"'
        )
    rows = [getattr(children[side], "out_features", None) for side in ("q_proj", "k_proj")]
    whole = [r // width for r in rows if isinstance(r, int) and r % width == 0]
    if len(whole) < 2:
        return f"q_proj and k_proj give {rows} features, expected multiples of {width}"
    heads, kv_heads = whole
    if heads % kv_heads:
        return f"{heads} query heads do not divide into {kv_heads} key heads"
    return AttentionSite(name, heads, kv_heads, weakref.ref(module), _resolve_projections)


BUILDERS: tuple[Callable[[str, nn.Module], AttentionSite | str | None], ...] = (
    separate_projections,
)


def _resolve_projections(module: nn.Module) -> ClipTarget | str:
    children = dict(module.named_children())
    for name in NORMS:
        if name in children and not isinstance(children[name], nn.Identity):
            return f"QK-norm ({name}) undoes any scaling of the projections"
    width = module.head_dim
    assert isinstance(width, int), "checked by `separate_projections`"
    sides = []
    for name in ("q_proj", "k_proj"):
        projection = children[name]
        if not isinstance(projection, nn.Linear):
            return f"{name} is a {type(projection).__name__}, expected nn.Linear"
        own = dict(projection.named_parameters(recurse=False))
        if "weight" not in own or (projection.bias is not None and "bias" not in own):
            return f"{name} computes its weight, expected a plain parameter"
        for label, parameter in own.items():
            if not parameter.requires_grad:
                return f"{name}.{label} is frozen"
            if not parameter.is_floating_point():
                return f"{name}.{label} is {parameter.dtype}, expected floating point"
        heads = projection.out_features // width
        sides.append(tuple(HeadRows(parameter, heads) for parameter in own.values()))
    return ClipTarget(*sides)
