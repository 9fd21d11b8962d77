"""A tiny model of every causal-LM family of the installed transformers, from its configuration.

A configuration's fields that name a size get the size below; what a family needs beyond that
stands in `OVERRIDES`. Weights are drawn wide enough that logits differ, so that errors show.
"""

import dataclasses
from typing import Any

import torch
from torch import nn

VOCABULARY = 61
WIDTH = 32
LAYERS = 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "image_size": 32,
    "patch_size": 16,
    "hidden_size": WIDTH,
    "d_model": WIDTH,
    "n_embd": WIDTH,
    "embedding_size": WIDTH,
    "word_embed_proj_dim": WIDTH,
    "emb_dim": WIDTH,
    "attention_hidden_size": WIDTH,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "d_ff": 48,
    "d_inner": 48,
    "n_inner": 48,
    "dff": 48,
    "dim_ff": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "num_layers": LAYERS,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "num_encoder_layers": LAYERS,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "n_head_kv": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "head_dim": 8,
    "swa_head_dim": 8,
    "d_head": 8,
    "d_kv": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "max_seq_len": 64,
    "sliding_window": 64,
    "attention_window_size": 64,
    "rotary_dim": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 1,
    "time_step_rank": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "lru_width": WIDTH,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "initializer_range": 0.15,
    "is_decoder": True,
}
"""Values of fields, wherever a configuration has them."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "blt_local_decoder": {"hidden_size_global": WIDTH},
    "blt_local_encoder": {"hidden_size_global": WIDTH},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 64},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"], "is_decoder": True},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"num_heads": 8},
    "moshi": {"audio_vocab_size": 32},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 2,
        "make_ngram_vocab_size_divisible_by": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 1,
    },
    "recurrent_gemma": {"block_types": ("recurrent", "attention")},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8},
}
"""By model type: fields that the sizes leave wrong or have no value for."""


def families() -> dict[str, type]:
    """Configuration class by model type, of everything that `AutoModelForCausalLM` makes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = {}
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            found[name] = CONFIG_MAPPING[name]
        except (KeyError, ImportError, AttributeError):
            continue
    return found


def tiny_config(kind: type, changes: dict[str, Any] | None = None) -> Any:
    """A configuration of a class, small throughout, its parts' as well."""
    parts: dict[str, Any] = dict(getattr(kind, "sub_configs", {}))
    changes = {**OVERRIDES.get(getattr(kind, "model_type", ""), {}), **(changes or {})}
    fields = {field.name for field in dataclasses.fields(kind)}
    given = {name: value for name, value in SIZES.items() if name in fields - set(parts)}
    for name, part in parts.items():
        if part.__name__ == "AutoConfig":  # of any class; the default says which
            part = type(getattr(kind(), name, None))
        if name in changes or not getattr(part, "model_type", ""):
            continue
        given[name] = tiny_config(part).to_dict()
    if "kv_lora_rank" in fields and "num_key_value_heads" in given:
        given["num_key_value_heads"] = given["num_attention_heads"]
    config = kind(**given | changes)
    if "layer_types" in fields and "layer_types" not in changes:
        types = list(config.layer_types or ())
        if types and all("linear" in t or "mamba" in t or "recurrent" in t for t in types):
            config = kind(**given | changes | {"layer_types": [*types[:-1], "full_attention"]})
    return config


def build(
    name: str,
    *,
    tied: bool | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    vocabulary: int | None = None,
) -> nn.Module:
    """A tiny model of a family, in training mode, weights drawn.

    Args:
        name: the model type.
        tied: whether the embedding is the projection; None leaves it to the family.
        dtype: of the weights; None is float64, or float32 where that serves only.
        seed: of the weights.
        vocabulary: tokens; None is `VOCABULARY`.
    """
    from transformers import AutoModelForCausalLM

    sizes = {} if vocabulary is None else {"vocab_size": vocabulary}
    config = tiny_config(families()[name], sizes)
    if tied is not None:
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            part.tie_word_embeddings = tied
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    if name == "xmod":  # its adapters are by language
        model.set_default_language("en_XX")
    model.set_experts_implementation("eager")  # grouped products have no float64
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.2)
        for parameter in model.parameters():
            if parameter.ndim == 1 and not bool(parameter.any()):
                nn.init.normal_(parameter, std=0.1)
    if dtype is None:
        dtype = torch.float64 if is_finite_in_float64(model.double()) else torch.float32
    return model.to(dtype).train()


@torch.no_grad()
def is_finite_in_float64(model: nn.Module) -> bool:
    """Whether padding leaves real tokens finite.

    transformers masks by the least number of the model's dtype and takes some softmax in float32,
    where that of float64 is -inf: then a row of padding is NaN.
    """
    ids = torch.tensor([[0, 0, 5, 9, 3], [7, 11, 4, 8, 6]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    try:
        out = model.eval()(input_ids=ids, attention_mask=mask, use_cache=False)
    except Exception:  # what float32 cannot do either stands in the cells
        return False
    return bool(out.logits[mask.bool()].isfinite().all())
