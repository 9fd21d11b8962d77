"""Small models and helpers that several tests share."""

import types

import torch
from torch import nn


class TinyCausal(nn.Module):
    """A causal language model without an attention mask: a gated recurrence over tokens."""

    def __init__(self, vocab: int = 17, width: int = 12, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.mix = nn.GRU(width, width, batch_first=True)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, vocab)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.mix(self.embed(ids))[0]))


def tiny_causal(vocab: int = 17, *, seed: int = 0, dropout: float = 0.0) -> TinyCausal:
    torch.manual_seed(seed)
    model = TinyCausal(vocab, dropout=dropout)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # logits with real spread
    return model


def tiny_llama(vocab: int = 40, *, seed: int = 0, spread: float = 0.3, **changes):
    """A random Llama, with logits far enough from uniform to tell errors from noise."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": spread,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    } | changes
    return LlamaForCausalLM(LlamaConfig(**settings))


def padded_prompts(vocab: int = 40, *, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of 3, 6 and 5 tokens, left-padded to 6."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (3, 6), generator=generator)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[0, :3] = False
    mask[2, :1] = False
    return ids.masked_fill(~mask, 0), mask


def in_float64(model: nn.Module) -> nn.Module:
    """The model in float64, also where transformers takes RMS norms in float32 whatever comes."""

    def forward(norm, x):
        spread = x.square().mean(-1, keepdim=True)
        eps = getattr(norm, "variance_epsilon", None) or norm.eps
        gain = norm.weight + 1 if type(norm).__name__.startswith("Gemma") else norm.weight
        return gain * x * torch.rsqrt(spread + eps)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(forward, module)
    return model.double()
