"""Tiny models of many families, with logits that are far from uniform."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

BASE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
LINEAR = {
    "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}
FAMILIES = {
    "llama": {},
    "gpt2": GPT2,
    "gemma2": {"head_dim": 8},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": GPT2 | {"rotary_dim": 4},
    "qwen3_5_text": LINEAR,
    "lfm2": {
        "layer_types": ["conv", "full_attention"], "block_ff_dim": 48,
        "block_auto_adjust_ff_dim": False,
    },
    "jamba": {
        "mamba_d_state": 8, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
    },
    "granitemoehybrid": {
        "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
        "layer_types": ["mamba", "attention"],
    },
    "nemotron_h": {
        "head_dim": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8,
        "n_groups": 2, "layers_block_type": ["mamba", "attention"],
    },
    "mamba": {"state_size": 8},
    "rwkv": {"attention_hidden_size": 32},
    "recurrent_gemma": {
        "head_dim": 8, "lru_width": 32, "block_types": ("recurrent", "attention"),
    },
    "roberta": {"is_decoder": True},
    "openai-gpt": GPT2,
}  # fmt: skip
"""By model type, what its configuration needs beyond `BASE`."""


def family(kind: str, **changes):
    """A model of this type, every matrix drawn anew."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**BASE | FAMILIES.get(kind, {}) | changes)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model
