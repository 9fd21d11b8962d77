"""Tiny random models and their tokenizer; the same numbers in every library."""

from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hmpo.models.tiny import character_tokenizer

VOCABULARY = 16
END, OTHER_END, PAD = 2, 5, 0


def tokenizer() -> PreTrainedTokenizerBase:
    """One token a character."""
    return character_tokenizer("0123456789>\n")


def llama(seed: int = 0, spread: float = 0.3, **changes: Any) -> LlamaForCausalLM:
    """Two layers, rotary positions, an untied head."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": spread,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": END,
        "pad_token_id": PAD,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


def qwen_tied(seed: int = 0) -> Qwen2ForCausalLM:
    """One matrix for embedding and head."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return Qwen2ForCausalLM(config)


def gpt2(seed: int = 0, dropout: float = 0.1) -> GPT2LMHeadModel:
    """Learnt absolute positions, and GPT-2's own dropout."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=128,
        initializer_range=0.3,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=1,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return GPT2LMHeadModel(config)


def decided(favour: float) -> LlamaForCausalLM:
    """A model that gives the end token a logit of 16 x `favour` everywhere, the others 0."""
    model = llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[END] = favour
    return model


def adapted() -> Any:
    """A Llama under LoRA adapters that have been trained before: their B is not 0."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return model
