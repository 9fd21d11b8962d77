import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmpo.attention import logits
from hmpo.attention.logits import AttentionCall, exact_max, logit_bound
from tests.oracles.attention_logits import max_logits


def causal_mask(keep):
    """(B,1,S,S) bool as transformers makes it: causal and key kept."""
    length = keep.shape[1]
    return torch.ones(length, length).tril().bool()[None, None] & keep[:, None, None, :]


def additive(mask, dtype=torch.float32):
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


@st.composite
def calls(draw):
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    groups, share = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rows, length, width = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 9))
    spread = draw(st.sampled_from([0.0, 0.1, 3.0, 30.0]))
    aligned = draw(st.booleans())  # q parallel to k: the bound is tight
    key = torch.randn(rows, groups, length, width, generator=generator) * spread
    query = torch.randn(rows, groups * share, length, width, generator=generator) * spread
    if aligned:
        query = key.repeat_interleave(share, 1) * draw(st.sampled_from([-1.0, 0.5, 1.0, 7.3]))
    keep = torch.rand(rows, length, generator=generator) > 0.3
    form = draw(st.sampled_from(["none", "bool", "float"]))
    if form == "none":
        keep = torch.ones_like(keep)
    mask = {
        "none": None,
        "bool": causal_mask(keep),
        "float": additive(causal_mask(keep)),
    }[form]
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    call = AttentionCall(
        query=query.to(dtype), key=key.to(dtype), mask=mask, causal=True, scale=width**-0.5
    )
    return call, max_logits(call.query, call.key, keep, call.scale)


@given(calls(), st.floats(1e-3, 1e3))
def test_certificate_never_passes_a_violating_head(made, tau):
    call, truth = made
    bound = logit_bound(call).double()
    assert (bound >= truth).all()
    assert not ((bound <= tau) & (truth > tau)).any()
    assert torch.equal(bound == -torch.inf, truth == -torch.inf)


@given(calls(), st.sampled_from([1, 40, 1 << 22]), st.booleans())
def test_exact_max_equals_the_loops(made, block, subset):
    call, truth = made
    heads = torch.arange(call.query.shape[1])[::2] if subset else None
    whole = logits.BLOCK_ELEMENTS
    logits.BLOCK_ELEMENTS = block
    try:
        found = exact_max(call, heads).double()
    finally:
        logits.BLOCK_ELEMENTS = whole
    truth = truth if heads is None else truth[heads]
    # Error of a float32 dot product: relative to |q||k|, not to a sum that may cancel.
    size = logit_bound(call).double().max().clamp_min(1e-30)
    torch.testing.assert_close(found, truth, rtol=0, atol=2e-6 * float(size))


def test_mask_per_head_and_broadcast_batch():
    query, key = torch.randn(2, 4, 5, 3), torch.randn(2, 2, 5, 3)
    mask = torch.ones(5, 5).tril().bool().expand(1, 4, 5, 5).clone()
    mask[:, 1, :, 0] = False
    mask[:, 1, 0, 0] = True
    call = AttentionCall(query=query, key=key, mask=mask, causal=True, scale=1.0)
    scores = query @ key.repeat_interleave(2, 1).mT
    truth = scores.masked_fill(~mask, -torch.inf).amax((0, 2, 3))
    torch.testing.assert_close(exact_max(call), truth, rtol=1e-6, atol=1e-6)
    some = torch.tensor([1, 3])
    torch.testing.assert_close(exact_max(call, some), truth[some], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_call_without_mask(causal):
    query, key = torch.randn(1, 2, 6, 3), torch.randn(1, 2, 6, 3)
    keep = torch.ones(1, 6, dtype=torch.bool)
    call = AttentionCall(query=query, key=key, mask=None, causal=causal, scale=0.5)
    truth = max_logits(query, key, keep, 0.5, causal=causal)
    torch.testing.assert_close(exact_max(call).double(), truth, rtol=1e-5, atol=1e-6)


def test_cached_keys_before_the_queries():
    query, key = torch.randn(1, 2, 2, 3), torch.randn(1, 2, 6, 3)
    mask = torch.ones(6, 6).tril().bool()[None, None, -2:]
    call = AttentionCall(query=query, key=key, mask=mask, causal=True, scale=1.0)
    truth = (query @ key.mT).masked_fill(~mask, -torch.inf).amax((0, 2, 3))
    torch.testing.assert_close(exact_max(call), truth)


@pytest.mark.parametrize("additive_mask", [True, False])
def test_all_padding_gives_minus_infinity_even_with_nan(additive_mask):
    query = torch.full((1, 2, 3, 4), torch.nan)
    mask = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    mask = additive(mask) if additive_mask else mask
    call = AttentionCall(query=query, key=query, mask=mask, causal=True, scale=1.0)
    assert (exact_max(call) == -torch.inf).all()
    assert (logit_bound(call) == -torch.inf).all()


def test_exact_memory_is_bounded():
    # 64 heads of 512 x 512 scores would be 16 blocks; no block may exceed the limit.
    biggest = 0
    original = torch.Tensor.amax

    def amax(self, *args, **kwargs):
        nonlocal biggest
        biggest = max(biggest, self.numel())
        return original(self, *args, **kwargs)

    query = torch.randn(4, 64, 512, 4)
    torch.Tensor.amax = amax
    try:
        exact_max(AttentionCall(query=query, key=query, mask=None, causal=True, scale=1.0))
    finally:
        torch.Tensor.amax = original
    assert 0 < biggest <= logits.BLOCK_ELEMENTS


def test_padding_does_not_loosen_the_bound():
    query, key = torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2)
    query[:, :, 0], key[:, :, 0] = 100.0, 100.0
    mask = causal_mask(torch.tensor([[False, True, True, True]]))
    call = AttentionCall(query=query, key=key, mask=mask, causal=True, scale=1.0)
    assert float(logit_bound(call)) == pytest.approx(2.0, rel=1e-5)
    only_rows = AttentionCall(
        query=query, key=torch.ones_like(key), mask=mask, causal=True, scale=1.0
    )
    assert float(logit_bound(only_rows)) == pytest.approx(2.0, rel=1e-5)
