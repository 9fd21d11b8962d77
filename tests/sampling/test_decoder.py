import logging
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hmpo.logprobs.responses import token_logprobs
from hmpo.sampling.decoder import why_not_fast
from hmpo.sampling.responses import sample_responses
from tests.support import padded_prompts, tiny_causal, tiny_llama

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
KINDS = {
    "llama": ("Llama", {}),
    "llama, one key per query": ("Llama", {"num_key_value_heads": 4}),
    "llama, biases, tied": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama, wide heads": ("Llama", {"head_dim": 16}),
    "llama 3 positions": ("Llama", {"rope_parameters": LLAMA3}),
    "yarn positions": ("Llama", {"rope_parameters": YARN}),
    "stretched positions": ("Llama", {"rope_parameters": LINEAR}),
    "llama, eager": ("Llama", {"attn_implementation": "eager"}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, window out of reach": ("Mistral", {"sliding_window": 200}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
}


def build(kind: str, dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    import transformers

    family, settings_ = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **{
            "vocab_size": 40,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.3,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
        }
        | settings_
        | changes
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases are 0 and norms 1 at first: errors would not show
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype)


def pair(model: nn.Module, ids, mask, seed: int = 3, **options):
    """The same rollout by the fast decoder and by the model's modules."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="top_k=")
        return tuple(
            sample_responses(
                model,
                ids,
                mask,
                generator=torch.Generator().manual_seed(seed),
                decoder=decoder,
                **options,
            )
            for decoder in ("auto", "module")
        )


ROUNDING = 5e-5
"""Of log-probs that float32 reaches in two ways. 32 * 2**-24 * sum |x w|, the bound of one product
with the vocabulary's rows, is 1.7e-5; each way takes it once, and two layers' products before."""


def assert_same(fast, slow, tolerance: float) -> None:
    assert fast.fast and not slow.fast
    assert torch.equal(fast.response_ids, slow.response_ids)
    assert torch.equal(fast.response_mask, slow.response_mask)
    assert torch.equal(fast.finished, slow.finished)
    for name in ("old_logprobs", "sampling_logprobs"):
        error = (getattr(fast, name) - getattr(slow, name)).abs().max()
        assert float(error) <= tolerance, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fast_decoder_equals_the_modules(kind: str, dtype: torch.dtype) -> None:
    if "eager" in kind and dtype == torch.float64:
        pytest.skip("transformers' eager attention gives NaN for padded float64 prompts")
    model = build(kind, dtype)
    ids, mask = padded_prompts()
    fast, slow = pair(model, ids, mask, group_size=6, max_length=90, eos_token=2, temperature=0.9)
    assert fast.lengths.max() > 64, "long enough that the buffers grow"
    assert fast.finished.any()
    assert_same(fast, slow, ROUNDING if dtype == torch.float32 else 1e-12)


@settings(max_examples=30)
@given(
    kind=st.sampled_from([kind for kind in KINDS if "eager" not in kind]),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    group=st.integers(1, 5),
    length=st.integers(1, 24),
    ends=st.sampled_from([(10_000,), (2, 7), tuple(range(2, 14))]),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 40]),
    top_p=st.sampled_from([1.0, 0.5, 0.95]),
    seed=st.integers(0, 2**31),
)
def test_fast_decoder_equals_the_modules_at_any_shape(
    kind, lengths, group, length, ends, temperature, top_k, top_p, seed
) -> None:
    width = max(lengths)
    ids = torch.randint(3, 40, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    fast, slow = pair(
        build(kind, torch.float64),
        ids.masked_fill(~mask, 0),
        mask,
        seed,
        group_size=group,
        max_length=length,
        eos_token=ends,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    assert_same(fast, slow, 1e-12)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_bfloat16_weights_give_the_modules_logprobs_to_their_precision(kind: str) -> None:
    ids, mask = padded_prompts()
    model = build(kind, torch.bfloat16, initializer_range=0.05)
    fast, _ = pair(model, ids, mask, max_length=2, eos_token=39)
    assert fast.fast and fast.old_logprobs.dtype == torch.float32
    # Of the same tokens: in bfloat16 another kernel's rounding draws another token now and then.
    width = fast.response_ids.shape[1]
    modules = token_logprobs(model, fast.input_ids, fast.attention_mask, width)
    assert torch.allclose(fast.old_logprobs, modules, rtol=0, atol=0.02)


def test_weights_are_those_of_the_moment() -> None:
    model = tiny_llama()
    ids, mask = padded_prompts()
    before, _ = pair(model, ids, mask, max_length=6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.mul_(0.5)  # leaves the version counter as it was
    after, slow = pair(model, ids, mask, max_length=6)
    assert_same(after, slow, ROUNDING)
    assert not torch.equal(before.old_logprobs, after.old_logprobs)


def test_the_rollout_can_take_part_in_a_backward_pass() -> None:
    model = tiny_llama()
    ids, mask = padded_prompts()
    rollout, _ = pair(model, ids, mask, max_length=6)
    logits = model(input_ids=rollout.input_ids).logits
    ratio = (logits.sum() - rollout.old_logprobs.exp() * logits[..., 0].mean()).sum()
    ratio.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not any(
        value.is_inference() for value in vars(rollout).values() if isinstance(value, torch.Tensor)
    )


class Renamed(nn.Linear):
    """What an adapter library puts in the place of a layer."""


def _hooked(model: nn.Module) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def _replaced(model: nn.Module) -> None:
    model.model.layers[0].self_attn.q_proj = Renamed(32, 32, bias=False)


def _own_forward(model: nn.Module) -> None:
    model.lm_head.forward = lambda x: x


def _mixed(model: nn.Module) -> None:
    model.lm_head.double()


def _flex(model: nn.Module) -> None:
    model.config._attn_implementation = "flex_attention"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hooked, "model.layers.1.mlp has a hook"),
        (_replaced, "model.layers.0.self_attn.q_proj is a Renamed"),
        (_own_forward, "lm_head has a hook or a forward method of its own"),
        (_mixed, "weights of ['torch.float32', 'torch.float64']"),
        (_flex, "attention is flex_attention"),
    ],
)
def test_a_changed_model_is_not_taken_for_a_plain_one(change, reason: str) -> None:
    model = tiny_llama(tie_word_embeddings=False)
    assert why_not_fast(model, 20) is None
    change(model)
    found = why_not_fast(model, 20)
    assert found is not None and reason in found


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("mistral", {"sliding_window": 20}, "sliding window of 20 tokens is in reach"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
            "sliding window of 20",
        ),
        ("llama", {"hidden_act": "gelu"}, "is a GELU"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type is dynamic",
        ),
    ],
)
def test_settings_that_the_decoder_does_not_have_are_named(kind, changes, reason) -> None:
    assert reason in (why_not_fast(build(kind, **changes), 20) or "")


def test_adapters_autocast_and_other_classes_take_the_modules(caplog) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_llama()
    with torch.autocast("cpu", torch.float16):
        assert why_not_fast(model, 20) == "autocast is torch.float16"
    assert "TinyCausal is not one of" in (why_not_fast(tiny_causal(40), 20) or "")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    ids, mask = padded_prompts()
    with caplog.at_level(logging.INFO, "hmpo.sampling.engines"):
        first, second = pair(adapted, ids, mask, max_length=5)
    assert not first.fast
    assert torch.equal(first.response_ids, second.response_ids)
    assert "PeftModel is not one of" in caplog.text
