"""The tiers between a bound and the naive maximum, each against `tests.oracles`."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from hmpo.attention import lse, readings
from hmpo.attention.gain_bound import gain_bound
from hmpo.attention.logits import AttentionCall, logit_bound, unmasked_bound
from hmpo.attention.lse import call_with_lse, kernel_error, lse_bound, rows_of
from hmpo.attention.readings import Budget, Reading
from hmpo.attention.search import max_by_lse
from hmpo.attention.tap import listen
from hmpo.attention.tracker import LogitTracker
from tests.attention.test_logits import causal_mask
from tests.optim.tiny import SIZES, attentions, batch, loss_of, make
from tests.oracles.attention_logits import max_logits


def with_lse(query, key, mask, scale=1.0):
    """The call as the CPU's fused kernel sees it, with the kernel's log-sum-exp."""
    share = query.shape[1] // key.shape[1]
    query = query.requires_grad_()
    full = key.repeat_interleave(share, 1)
    _, raw = call_with_lse(
        lambda: (
            scaled_dot_product_attention(
                query, full, full, mask, is_causal=mask is None, scale=scale
            ),
        )
    )
    lse = rows_of(raw, *query.shape[:3])
    return AttentionCall(
        query=query.detach(), key=key, mask=mask, causal=True, scale=scale, lse=lse
    )


@st.composite
def calls(draw):
    """A call of the kernel, and each head's largest logit."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    groups, share = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    spread = draw(st.sampled_from([0.0, 0.1, 3.0, 30.0]))
    key = torch.randn(rows, groups, length, 4, generator=generator)
    query = torch.randn(rows, groups * share, length, 4, generator=generator) * spread
    form = draw(st.sampled_from(["random", "tied", "aligned", "opposite"]))
    if form == "tied":
        query, key = query[:, :, :1].expand_as(query), key[:, :, :1].expand_as(key)
    elif form != "random":
        sign = spread if form == "aligned" else -spread
        query = key.repeat_interleave(share, 1) * sign
    keep = torch.ones(rows, length, dtype=torch.bool)
    if draw(st.booleans()):
        keep = torch.rand(rows, length, generator=generator) > 0.3
    mask = None if keep.all() else causal_mask(keep)
    call = with_lse(query.contiguous(), key.contiguous(), mask, 0.5)
    return call, max_logits(call.query, call.key, keep, call.scale), keep


def slack_of(call):
    return unmasked_bound(call) * kernel_error(call.query.shape[-1])


@given(calls())
def test_max_is_at_most_lse_is_at_most_max_plus_log_n(made):
    call, truth, keep = made
    assert call.lse is not None
    slack = slack_of(call)
    rows = keep[:, None] if call.mask is not None else None
    bound = lse_bound(call.lse, rows, slack).double()
    assert (bound >= truth).all()
    visible = keep.sum(1).max().clamp_min(1)
    assert (bound <= truth + math.log(visible) + 2 * slack + 1e-6)[truth.isfinite()].all()


@given(calls())
def test_unmasked_bound_is_never_below_the_masked_one(made):
    call, truth, _ = made
    assert (unmasked_bound(call) >= logit_bound(call) * (1 - 1e-6)).all()
    assert (unmasked_bound(call).double() >= truth).all()


@given(calls(), st.sampled_from([1, 8, 1 << 16]), st.sampled_from([0.0, math.inf]))
def test_branch_and_bound_equals_the_loops(made, block, share):
    """With and without all heads' best rows at once; NaN and infinity have their own test."""
    from hmpo.attention import search

    call, truth, _ = made
    heads = torch.arange(call.query.shape[1]).flip(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "BLOCK_SCORES", block)
        patch.setattr(search, "BLOCK_KEYS", min(block, 16))
        patch.setattr(search, "GATHER_SHARE", share)
        found, computed = max_by_lse(call, heads, slack_of(call))
    size = float(unmasked_bound(call).max().clamp_min(1e-30))
    assert_close(found.double(), truth.flip(0), rtol=0, atol=2e-6 * size)
    assert computed <= call.query.shape[:3].numel()


@given(calls(), st.sampled_from(["auto", "lse", "exact", "bound"]), st.floats(1e-2, 1e3))
def test_no_tier_passes_a_head_over_the_threshold(made, source, tau):
    call, truth, _ = made
    cheap, readings.CHEAP_SCORES = readings.CHEAP_SCORES, 0
    try:
        reading = Reading(call.query.shape[1], tau, source, Budget(0), None)
        reading.record(call)
    finally:
        readings.CHEAP_SCORES = cheap
    value = torch.maximum(reading.exact, reading.bound).double()
    exact = ~(reading.exact < reading.bound)
    rounding = 2e-6 * unmasked_bound(call).double()  # of a float32 dot product
    assert (value >= truth - torch.where(exact, rounding, 0.0)).all()
    assert not ((value <= tau) & (truth - rounding > tau)).any()
    if source in ("auto", "exact"):  # what is over the threshold is known exactly
        assert exact[(value > tau)].all()
        assert_close(value[exact], truth[exact], rtol=0, atol=float(rounding.max()) + 1e-30)
    assert sum(reading.tiers.values()) == len(truth)


def test_branch_and_bound_computes_few_rows_where_attention_is_peaked():
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 256, 16) * 8, torch.randn(2, 2, 256, 16)
    call = with_lse(query, key, None)
    _, peaked = max_by_lse(call, torch.arange(2), slack_of(call))
    flat = with_lse(query * 1e-3, key, None)
    _, all_rows = max_by_lse(flat, torch.arange(2), slack_of(flat))
    assert peaked <= 2 * 16
    assert all_rows > 4 * peaked


@pytest.mark.parametrize("share", [0.0, math.inf])
def test_nan_and_infinity_survive_branch_and_bound(monkeypatch, share):
    from hmpo.attention import search

    monkeypatch.setattr(search, "GATHER_SHARE", share)
    query, key = torch.randn(1, 3, 20, 4), torch.randn(1, 3, 20, 4)
    query[0, 0, 11, 2] = torch.nan
    query[0, 1, 7, 1], key[0, 1, :, 1] = torch.inf, 1.0
    call = with_lse(query, key, None)
    found, _ = max_by_lse(call, torch.arange(3), slack_of(call))
    assert found.isnan().tolist() == [True, False, False]
    assert found[1] == torch.inf and found[2].isfinite()


@pytest.mark.parametrize("heads", [None, 2])
def test_lse_of_another_layout_is_not_used(heads):
    raw = torch.zeros(2, 4, 8, 1)
    assert rows_of(raw, 2, 4, 8).shape == (2, 4, 8)
    assert rows_of(raw[..., 0], 2, 4, 5).shape == (2, 4, 5)  # padded rows
    assert rows_of(raw, 2, 5, 8) is None and rows_of(None, 2, 4, 8) is None
    assert rows_of(raw[..., 0], 2, 4, 9) is None


def recorded(model, run):
    """Every call that the first layer's listener gets."""
    calls = []
    end = listen(attentions(model)[0], calls.append)
    run()
    end()
    return calls


def test_kernels_lse_arrives_and_is_the_log_sum_exp():
    model = make()
    ids, mask = batch(padding="left")
    (call,) = recorded(model, lambda: model(input_ids=ids, attention_mask=mask))
    scores = call.query @ call.key.repeat_interleave(2, 1).mT * call.scale
    truth = scores.masked_fill(~call.mask, -torch.inf).logsumexp(-1)
    rows = mask.bool()[:, None].expand_as(truth)
    assert_close(call.lse[rows], truth[rows], rtol=1e-5, atol=1e-5)


def test_a_kernel_that_gives_no_lse_is_passed_over(monkeypatch):
    """Without a gradient some CUDA kernels give None where others give an empty tensor."""

    def kernel():
        return torch.ones(2), None

    monkeypatch.setattr(lse, "KERNELS", (kernel,))
    with lse._CatchLse() as caught:
        assert caught.__torch_dispatch__(kernel, ())[1] is None
    assert caught.outputs == []


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_lse_arrives_through_hooks_on_saved_tensors():
    # There the graph must not be asked: unpacking would recompute the layer, or copy.
    model = make().train()
    ids, _ = batch()
    (plain,) = recorded(model, lambda: model(input_ids=ids))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = recorded(model, lambda: loss_of(model, ids).backward())
    assert again and all(torch.equal(call.lse, plain.lse) for call in again)
    model, unpacked = make(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpacked.append):
        (hooked,) = recorded(model, lambda: model(input_ids=ids))
    assert torch.equal(hooked.lse, plain.lse) and not unpacked


def test_eager_attention_and_additive_masks_give_no_lse():
    model = make(attention="eager")
    ids, _ = batch()
    (call,) = recorded(model, lambda: model(input_ids=ids))
    assert call.lse is None


def normed(kind, **changes):
    from transformers import (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        Olmo2Config,
        Olmo2ForCausalLM,
    )

    if kind == "qwen3":
        return make("qwen3", **changes)
    config, model_class = {
        "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
        "olmo2": (Olmo2Config, Olmo2ForCausalLM),
    }[kind]
    extra = {"head_dim": 8, "query_pre_attn_scalar": 8} if kind == "gemma3" else {}
    torch.manual_seed(0)
    config = config(**SIZES | extra | changes, attn_implementation="sdpa", pad_token_id=0)
    return model_class(config).float()


def spread_gains(model):
    """Gains of random size and sign, as training would leave them."""
    with torch.no_grad():
        for layer in attentions(model):
            for norm in (layer.q_norm, layer.k_norm):
                norm.weight.normal_(std=2.0)


@pytest.mark.parametrize("yarn", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "olmo2"])
def test_gain_bound_holds_for_any_input(kind, yarn):
    changes = {}
    if yarn and kind == "qwen3":
        scaling = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4}
        changes = {"rope_parameters": scaling | {"original_max_position_embeddings": 8}}
    model = normed(kind, **changes)
    spread_gains(model)
    ids, _ = batch(length=12)
    with LogitTracker(model, source="exact") as tracker:
        model(input_ids=ids)
        truth = tracker.consume()
    for layer, reading in zip(attentions(model), truth.values(), strict=True):
        bound = gain_bound(model, layer, 4)(torch.float32)
        assert bound.shape == (4,) and (bound >= reading.value).all()


def test_gain_bound_is_reached():
    model = make("qwen3", num_hidden_layers=1)
    layer = attentions(model)[0]
    with torch.no_grad():
        for norm in (layer.q_norm, layer.k_norm):
            norm.weight.fill_(3.0)
        layer.q_proj.weight.copy_(layer.k_proj.weight.repeat_interleave(2, 0)[:32])
    layer.q_proj.weight.data = (
        layer.k_proj.weight.data.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    )
    ids, _ = batch()
    bound = gain_bound(model, layer, 4)(torch.float32)
    with LogitTracker(model, source="exact") as tracker:
        model(input_ids=ids)
        (reading,) = tracker.consume().values()
    assert_close(reading.value, bound, rtol=1e-3, atol=0)  # a token's query is its own key
    assert (reading.value <= bound).all()


def test_qk_norm_layers_are_settled_by_weights_alone(monkeypatch):
    monkeypatch.setattr(readings, "CHEAP_SCORES", 0)
    monkeypatch.setattr(readings, "logit_bound", None)  # no activation may be looked at
    monkeypatch.setattr(readings, "unmasked_bound", None)
    model = make("qwen3")
    ids, _ = batch()
    with LogitTracker(model) as tracker:
        model(input_ids=ids)
        found = tracker.consume()
    assert tracker.tiers == {"weights": 8}
    assert all(not r.exact.any() and (r.value <= 100).all() for r in found.values())


def test_layers_without_norm_or_with_unknown_norm_have_no_gain_bound():
    model = make("llama")
    assert gain_bound(model, attentions(model)[0], 4) is None
    model = make("qwen3")
    layer = attentions(model)[0]
    layer.q_norm = torch.nn.LayerNorm(8)
    assert gain_bound(model, layer, 4) is None


def test_accelerator_settles_by_weights_without_asking(monkeypatch):
    monkeypatch.setattr(readings, "host_reads_are_free", lambda device: False)
    model = make("qwen3")
    ids, _ = batch()
    layer = attentions(model)[0]
    with LogitTracker(model) as tracker:
        model(input_ids=ids)
        tracker.consume()
        assert tracker.tiers == {"weights": 8}
        with torch.no_grad():
            layer.q_norm.weight.mul_(100)
        model(input_ids=ids)
        found = list(tracker.consume().values())
        assert not found[0].exact.any() and (found[0].value > 100).all()  # told, not hidden
        model(input_ids=ids)
        again = list(tracker.consume().values())
        assert tracker.tiers["weights"] == 4  # the grown layer is read from activations now
        assert (again[0].value <= found[0].value).all()


def test_tiers_are_counted(monkeypatch):
    monkeypatch.setattr(readings, "CHEAP_SCORES", 0)
    model = make()
    ids, _ = batch()
    for source, tau, expected in (
        ("bound", 1.0, {"norms": 8}),
        ("lse", 1.0, {"lse": 8}),
        ("exact", 1.0, {"exact": 8}),
        ("auto", 1e6, {"lse": 8}),
        ("auto", 1e-6, {"exact": 8}),
    ):
        with LogitTracker(model, tau, source) as tracker:
            model(input_ids=ids)
            tracker.consume()
            assert tracker.tiers == expected
            assert tracker.seconds > 0
            tracker.consume()
            assert not tracker.tiers and tracker.seconds == 0
