"""Tiny random Hugging Face models whose attention logits are large enough to clip."""

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"head_dim": 8, "sliding_window": None}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
}
KINDS = ("llama", "qwen2", "mistral")


def make(kind="llama", *, attention="sdpa", gain=12.0, seed=0, dtype=torch.float32, **changes):
    """A model with q/k weights times `gain` and random q/k biases, where it has biases."""
    torch.manual_seed(seed)
    config, model_class, extra = CLASSES[kind]
    model = model_class(config(**SIZES | extra | changes, attn_implementation=attention))
    with torch.no_grad():
        for module in model.modules():
            if "q_proj" in dict(module.named_children()):
                for projection in (module.q_proj, module.k_proj):
                    projection.weight.mul_(gain)
                    if projection.bias is not None:
                        projection.bias.normal_()
    return model.to(dtype)


def batch(rows=3, length=10, padding=None, seed=1):
    """Token ids and a mask of 1s, or with 4 tokens of padding on one side in row 1."""
    ids = torch.randint(0, 48, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[1, :4] = 0
    elif padding == "right":
        mask[1, -4:] = 0
    return ids, mask


def loss_of(model, ids, mask=None):
    out = model(input_ids=ids, attention_mask=mask, use_cache=False)
    keep = torch.ones_like(ids) if mask is None else mask
    picked = out.logits.float().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return -(picked * keep[:, 1:]).sum() / keep[:, 1:].sum()


def values(model, ids, mask=None):
    """Exact maxima (layers, heads) of one forward, read by a fresh tracker."""
    from hmpo.optim import LogitTracker

    with LogitTracker(model, source="exact") as tracker:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        return torch.stack([r.value for r in tracker.consume().values()])


def clear_of(tau, found):
    """`tau`, which lies on none of the values: another processor's rounding crosses no threshold.

    Another order of the sums of a layer this small moves a maximum by some 1e-6 of itself; what is
    asked for is a hundred times that.
    """
    gap = float((found.double() - tau).abs().min())
    assert gap > 1e-4 * abs(tau), f"{tau} lies within {gap} of one of {found.tolist()}"
    return tau


def halfway(found, above):
    """A threshold with that many values above it, halfway between two of them."""
    ordered = found.detach().double().flatten().sort(descending=True).values
    return clear_of(float(ordered[above - 1 : above + 1].mean()), found)


def middle(found):
    """A threshold that half of the values exceed."""
    return halfway(found, found.numel() // 2)


def attentions(model):
    return [m for m in model.modules() if "q_proj" in dict(m.named_children())]
