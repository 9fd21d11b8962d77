"""What is known about one attention module: its heads, and the weights that make its logits."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from hmpo.attention.interface import IMPLEMENTATIONS
from hmpo.attention.sites.rows import HeadRows, Scope


@dataclass(frozen=True, eq=False, kw_only=True)
class ClipTarget:
    """The parameters that make one site's queries and keys; logits are linear in both sides."""

    query: tuple[HeadRows, ...]
    """Rows whose factor is the query's share of a head's gamma."""
    key: tuple[HeadRows, ...]
    """Rows whose factor is the key's share; empty where the keys are read by other layers too."""
    both: tuple[HeadRows, ...] = ()
    """Query rows that meet keys nobody may scale: they take all of gamma."""
    how: str
    """In words, for people: "rows of q and k, head by head"."""
    per_head: bool = True
    """False where all heads share one gain: the layer is scaled as one head."""

    @property
    def rows(self) -> tuple[HeadRows, ...]:
        """All of them."""
        return (*self.query, *self.key, *self.both)


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionSite:
    """One attention module.

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
    resolve: "Callable[[nn.Module, AttentionSite, Scope], ClipTarget | str]"
    """Gives what to scale, or the reason why nothing can be scaled."""
    hidden: str = ""
    """Why its logits cannot be read; "" where they can."""
    tap: str = "interface"
    """Where they are read: "interface", the attention function itself; "multihead",
    `nn.MultiheadAttention` with its masks; "projections", the module's own softmax of what its
    projections give (`hmpo.attention.hooks`)."""

    def target(self, scope: Scope = "trained") -> ClipTarget | str:
        """What to scale now, or why nothing can be scaled.

        Args:
            scope: which parameters may be scaled, see `Scope`. Under "adapters" the rows are those
                of LoRA's B alone: queries and keys are linear in them beside a constant part, and
                a side without LoRA has no rows.
        """
        module = self.module()
        if module is None:
            return "the module no longer exists"
        target = self.resolve(module, self, scope)
        if isinstance(target, ClipTarget) and not target.rows:
            return "neither queries nor keys have a LoRA adapter"
        return target


def hidden_reason(module: nn.Module) -> str:
    """Why the logits of a module that uses the interface cannot be read, or ""."""
    config = getattr(module, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in (*IMPLEMENTATIONS, None):
        return (
            f"attention implementation {implementation!r} hides its logits; "
            'load the model with attn_implementation="sdpa"'
        )
    if implementation == "eager" and getattr(module, "reorder_and_upcast_attn", False):
        return (
            "reorder_and_upcast_attn bypasses the attention functions; "
            'load the model with attn_implementation="sdpa"'
        )
    return ""
