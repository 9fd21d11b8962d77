"""The one table of attention families, and the names by which unlisted modules are recognised.

A class needs a row only for what cannot be seen from its children: how a fused projection divides,
and what lies between a norm and the logits. Everything below was read in the source of
transformers' modeling files.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, kw_only=True)
class FusedLayout:
    """Where queries and keys lie in the output of one projection that also gives the values.

    Example: GPT-NeoX with 8 heads of width 64, query, key and value of a head side by side:
    `FusedLayout(projection="query_key_value", heads=8, kv_heads=8, width=64, interleaved=True)`.
    """

    projection: str
    """Name of the child."""
    heads: int
    """Query heads H."""
    kv_heads: int
    """Key heads G."""
    width: int
    """Output features of a head."""
    interleaved: bool = False
    """Whether (q, k, v) follow each other head by head; else all of q, then all of k, then v."""


@dataclass(frozen=True, kw_only=True)
class AttentionFamily:
    """What is known of an attention class beyond the names of its children."""

    layout: Callable[[Any], FusedLayout] | None = None
    """Gives the layout of a module's fused projection; None where it has none."""
    bounded: bool = False
    """Nothing but norm, projection and rotary embedding lies between a layer's input and the
    logits, so that weights bound them: `weight_norm_bound`."""
    normed: bool = False
    """It has `q_norm` and `k_norm`, and nothing but rotary embedding stands between them and the
    attention function, so that their gains bound the logits: `gain_bound`."""


def _phi3(module: Any) -> FusedLayout:
    config = module.config
    return FusedLayout(
        projection="qkv_proj",
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        width=module.head_dim,
    )


def _gpt2(module: Any) -> FusedLayout:
    return FusedLayout(
        projection="c_attn",
        heads=module.num_heads,
        kv_heads=module.num_heads,
        width=module.head_dim,
    )


def _gpt_neox(module: Any) -> FusedLayout:
    heads = module.config.num_attention_heads
    return FusedLayout(
        projection="query_key_value",
        heads=heads,
        kv_heads=heads,
        width=module.head_size,
        interleaved=True,
    )


def _persimmon(module: Any) -> FusedLayout:
    return FusedLayout(
        projection="query_key_value",
        heads=module.num_heads,
        kv_heads=module.num_heads,
        width=module.head_dim,
        interleaved=True,
    )


def _gpt_bigcode(module: Any) -> FusedLayout:
    return FusedLayout(
        projection="c_attn",
        heads=module.num_heads,
        kv_heads=module.kv_heads,
        width=module.head_dim,
        interleaved=not module.multi_query,
    )


FAMILIES: dict[str, AttentionFamily] = {
    "GPT2Attention": AttentionFamily(layout=_gpt2, bounded=True),
    "GPTBigCodeAttention": AttentionFamily(layout=_gpt_bigcode),
    "GPTNeoXAttention": AttentionFamily(layout=_gpt_neox, bounded=True),
    "Gemma2Attention": AttentionFamily(bounded=True),
    "Gemma3Attention": AttentionFamily(bounded=True, normed=True),
    "ImageGPTAttention": AttentionFamily(layout=_gpt2),
    "LlamaAttention": AttentionFamily(bounded=True),
    "MistralAttention": AttentionFamily(bounded=True),
    "Olmo2Attention": AttentionFamily(bounded=True, normed=True),
    "Olmo3Attention": AttentionFamily(normed=True),
    "PersimmonAttention": AttentionFamily(layout=_persimmon),
    "Phi3Attention": AttentionFamily(layout=_phi3, bounded=True),
    "Phi4MultimodalAttention": AttentionFamily(layout=_phi3),
    "Qwen2Attention": AttentionFamily(bounded=True),
    "Qwen3Attention": AttentionFamily(bounded=True, normed=True),
    "Qwen3MoeAttention": AttentionFamily(normed=True),
}
"""By class name, so that no modeling file has to be imported."""
UNLISTED = AttentionFamily()
"""What holds for a class without a row: its children's names are all that is known."""

QUERY_KEY_VALUE = (
    ("q_proj", "k_proj", "v_proj"),
    ("W_q", "W_k", "W_v"),
    ("query", "key", "value"),
)
"""Names of the children whose outputs are the heads of queries, keys and values."""
QUERY_KEY = (*((query, key) for query, key, _ in QUERY_KEY_VALUE), ("q", "k"))
"""Names of the children that make queries and keys, in the order in which they are tried."""
LATENT_WIDTHS = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
"""Attributes of latent attention (MLA) with the widths of a head's parts."""
QK_NORMS = (
    ("q_norm", "k_norm"),
    ("q_layernorm", "k_layernorm"),
    ("query_layernorm", "key_layernorm"),
)
"""Children that normalise queries and keys after the projection, which undoes scaling it."""
INPUT_NORMS = ("input_layernorm", "ln_1")
"""Siblings of an attention module that normalise its input."""
HEAD_WIDTHS = ("head_dim", "attention_head_size", "d_kv", "d_k", "key_value_proj_dim")
"""Attributes, of a module or its config, that give the width of a head."""
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
"""Attributes, of a module or its config, that give the number of query heads."""
CONV1D = "Conv1D"
"""Class of transformers' linear layer with a transposed weight."""


def family_of(module: nn.Module) -> AttentionFamily:
    """The row of a module's class, `UNLISTED` without one."""
    return FAMILIES.get(type(module).__name__, UNLISTED)


def fused_layout(module: nn.Module) -> FusedLayout | None:
    """How the fused projection of an attention module divides; None without such a projection."""
    layout = family_of(module).layout
    return None if layout is None else layout(module)


def latent_query(children: dict[str, nn.Module]) -> str:
    """Name of the child that makes the queries of latent attention."""
    return "q_b_proj" if "q_b_proj" in children else "q_proj"
