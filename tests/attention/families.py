"""Tiny random models of every family that QK-clip knows, with logits large enough to clip."""

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD_DIM = {"head_dim": 8}
GPT2 = {"vocab_size": 48, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
NEOX = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "first_k_dense_replace": 9,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, SIZES),
    "mistral": (MistralConfig, MistralForCausalLM, SIZES | HEAD_DIM | {"sliding_window": 4}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, SIZES),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, SIZES | HEAD_DIM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, SIZES | HEAD_DIM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, SIZES | HEAD_DIM),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, SIZES),
    "phi3": (Phi3Config, Phi3ForCausalLM, SIZES),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, NEOX),
    "gpt2": (GPT2Config, GPT2LMHeadModel, GPT2),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM, SIZES | MLA | {"q_lora_rank": 12}),
    "deepseek_v3_plain_q": (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        SIZES | MLA | {"q_lora_rank": None, "rope_parameters": YARN},
    ),
}
LAYERWISE = ("qwen3", "gemma3")
"""Families whose heads share one gain, so that a layer is scaled as a whole."""
EAGER = ("gemma2",)
"""Families with a soft cap, which only eager attention has."""
PROJECTIONS = (
    "q_proj",
    "k_proj",
    "qkv_proj",
    "query_key_value",
    "c_attn",
    "q_b_proj",
    "kv_b_proj",
    "kv_a_proj_with_mqa",
)


def family(kind, *, gain=30.0, seed=0, attention=None, **changes):
    """A one-layer float32 model with random gains and biases, in eval mode."""
    torch.manual_seed(seed)
    config, model_class, sizes = FAMILIES[kind]
    attention = attention or ("eager" if kind in EAGER else "sdpa")
    model = model_class(config(**sizes | changes, attn_implementation=attention)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner, label = name.split(".")[-2:]
            if owner in PROJECTIONS and label == "bias":
                parameter.normal_()
            elif owner in PROJECTIONS:
                parameter.mul_(gain)
            elif "norm" in owner:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            if owner in ("q_norm", "k_norm"):
                parameter.mul_(2.0).add_(2.0)
    return model
