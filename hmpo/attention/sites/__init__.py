"""Attention sites: where a model attends, and which weights make its logits.

One builder per family of attention module turns a module into an `AttentionSite`, or says why it
cannot, or passes. What a class needs beyond the names of its children is a row of `FAMILIES`.
"""

from collections.abc import Callable

from torch import nn

from hmpo.attention.interface import uses_interface
from hmpo.attention.sites.fused import fused_projection
from hmpo.attention.sites.latent import latent_attention
from hmpo.attention.sites.plain import plain_attention
from hmpo.attention.sites.rows import HeadRows, Scope
from hmpo.attention.sites.separate import separate_projections
from hmpo.attention.sites.site import AttentionSite, ClipTarget

__all__ = ["AttentionSite", "ClipTarget", "HeadRows", "Scope", "find_sites", "hidden_sites"]

BUILDERS: tuple[Callable[[str, nn.Module], AttentionSite | str | None], ...] = (
    latent_attention,
    fused_projection,
    separate_projections,
)


def find_sites(model: nn.Module) -> tuple[list[AttentionSite], list[str]]:
    """All sites that can be read, and the attention that cannot be, as "name: reason"."""
    results = _scan(model)
    sites = [s for _, s in results if isinstance(s, AttentionSite) and not s.hidden]
    reasons = [(n, s.hidden if isinstance(s, AttentionSite) else s) for n, s in results]
    return sites, [f"{name}: {reason}" for name, reason in reasons if reason]


def hidden_sites(model: nn.Module) -> list[AttentionSite]:
    """Sites whose weights are known and whose logits cannot be read."""
    return [s for _, s in _scan(model) if isinstance(s, AttentionSite) and s.hidden]


def _scan(model: nn.Module) -> list[tuple[str, AttentionSite | str]]:
    """Every attention module by name: its site, or why it has none."""
    results: dict[str, AttentionSite | str] = {}
    for name, module in model.named_modules():
        if uses_interface(module):
            built = (build(name, module) for build in BUILDERS)
            site = next((s for s in built if s is not None), None)
            unknown = f"{type(module).__name__} has no q_proj and k_proj, nor a fused projection"
            results[name] = unknown if site is None else site
        else:
            site = plain_attention(name, module, getattr(model, "config", None))
            if site is not None:
                results[name] = site
    for name, module in model.named_modules():
        inner = any(found == name or found.startswith(f"{name}.") for found in results)
        if not inner and is_called_attention(module):
            results[name] = (
                f"{type(module).__name__} attends outside the shared attention functions, and "
                "which of its weights make queries and keys is not known"
            )
    kinds = dict(model.named_modules())
    order = [name for name in kinds if name in results]
    return [(name or type(model).__name__, results[name]) for name in order]


def is_called_attention(module: nn.Module) -> bool:
    """Whether a module's class says that it attends, and no part of it does."""
    return _says_so(module) and not any(
        _says_so(part) for name, part in module.named_modules() if name
    )


def _says_so(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    owns = any(True for _ in module.parameters())
    return owns and ("attention" in name or name.endswith("attn"))
