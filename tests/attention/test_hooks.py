"""Attention outside the shared attention functions."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from hmpo.attention import readings
from hmpo.optim import LogitTracker, MuonClipConfig, qk_clip_stats, with_qk_clip
from tests.attention.apart import run_apart
from tests.optim.tiny import middle
from tests.oracles.attention_logits import max_logits

NAMES = [("q_proj", "k_proj"), ("W_q", "W_k"), ("query", "key"), ("q", "k")]


class Attention(nn.Module):
    """Someone's own attention: a mask, no rotary embedding."""

    def __init__(self, names=("q", "k"), keys_first=False, kv_heads=4, **hints):
        super().__init__()
        self.names, self.keys_first = names, keys_first
        self.add_module(names[0], nn.Linear(16, 16))
        self.add_module(names[1], nn.Linear(16, 4 * kv_heads))
        self.out = nn.Linear(16, 16)
        self.kv_heads = kv_heads
        for name, value in (hints or {"num_heads": 4}).items():
            setattr(self, name, value)

    def forward(self, x):
        sides = {}
        for name in self.names[::-1] if self.keys_first else self.names:
            sides[name] = getattr(self, name)(x)
        q, k = (sides[n].unflatten(-1, (-1, 4)).transpose(1, 2) for n in self.names)
        k = k.repeat_interleave(4 // self.kv_heads, 1)
        y = scaled_dot_product_attention(q, k, k, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def visible_pairs(module, x):
    """The logits that the module's softmax sees."""
    return all_pairs(module, x, causal=True)


def all_pairs(module, x, causal=False):
    """Every pair's logit by the loops of the oracle."""
    query, key = (
        getattr(module, name)(x).unflatten(-1, (-1, 4)).transpose(1, 2) for name in module.names
    )
    keep = torch.ones(x.shape[:2], dtype=torch.bool)
    return max_logits(query.detach(), key.detach(), keep, 0.5, causal=causal)


@pytest.fixture
def x():
    return torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("keys_first", [False, True])
@pytest.mark.parametrize("names", NAMES)
def test_plain_modules_are_read_where_they_attend(names, keys_first, x):
    torch.manual_seed(0)
    model = nn.Sequential(Attention(names, keys_first), Attention(names, keys_first))
    with LogitTracker(model) as tracker:
        model(x)
        found = tracker.consume()
        with torch.no_grad():
            model(x)
        assert all((r.value == -torch.inf).all() for r in tracker.consume().values())
    assert list(found) == tracker.projected == ["0", "1"]
    assert found["0"].exact.all()
    assert_close(found["0"].value.double(), visible_pairs(model[0], x), rtol=1e-5, atol=0)
    inner = visible_pairs(model[1], model[0](x).detach())
    assert_close(found["1"].value.double(), inner, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hints", [{"head_dim": 4}, {"num_heads": 4}, {"n_head": 4}])
def test_head_width_is_taken_from_hints(hints, x):
    model = Attention(kv_heads=2, **hints)
    with LogitTracker(model) as tracker:
        model(x)
        (reading,) = tracker.consume().values()
    assert tracker.sites[0].kv_heads == 2
    assert_close(reading.value.double(), visible_pairs(model, x), rtol=1e-5, atol=0)


def test_head_width_is_taken_from_the_models_config(x):
    class Config:
        num_attention_heads = 4

    model = nn.Sequential(Attention(hidden=1))
    model.config = Config()
    with LogitTracker(model) as tracker:
        assert tracker.sites[0].heads == 4


def test_module_without_a_hint_is_named(caplog):
    model = nn.Sequential(Attention(hidden=1))
    with caplog.at_level(logging.WARNING), LogitTracker(model) as tracker:
        assert not tracker.sites
    assert "set head_dim or num_heads" in tracker.unread[0] and tracker.unread[0] in caplog.text


def test_projected_bound_covers_a_rotation(monkeypatch, x):
    # Cauchy-Schwarz on the projections holds after any rotation, so it may certify.
    monkeypatch.setattr(readings, "CHEAP_SCORES", 0)
    model = Attention()
    with LogitTracker(model, tau=1e6) as tracker:
        model(x)
        (reading,) = tracker.consume().values()
    assert tracker.tiers == {"norms": 4}
    query, key = (getattr(model, n)(x).unflatten(-1, (-1, 4)).norm(dim=-1) for n in model.names)
    longest = (query.amax(1) * key.amax(1)).amax(0) * 0.5
    assert (reading.value >= longest * (1 - 1e-6)).all()


def test_plain_module_is_clipped(x):
    torch.manual_seed(0)
    model = Attention()
    before = visible_pairs(model, x)
    tau = middle(before)
    optimizer = with_qk_clip(
        torch.optim.SGD(model.parameters(), lr=0.0), model, MuonClipConfig(max_qk_score=tau)
    )
    model(x).sum().backward()
    optimizer.step()
    assert_close(visible_pairs(model, x), before.clamp_max(tau), rtol=1e-4, atol=0)


COMPILED = """
    import torch
    from hmpo.optim import LogitTracker
    from tests.attention.test_hooks import Attention, all_pairs

    torch.manual_seed(0)
    x, model = torch.randn(2, 7, 16), Attention()
    with LogitTracker(model) as tracker:
        torch.compile(model, backend="eager", fullgraph=True)(x)
        (reading,) = tracker.consume().values()
    assert torch.allclose(reading.value.double(), all_pairs(model, x), rtol=1e-5), reading
"""


def test_plain_module_compiles_without_a_graph_break():
    run_apart(COMPILED)


def test_copies_and_pickles_are_not_recorded(x):
    model = Attention()
    with LogitTracker(model) as tracker:
        copy.deepcopy(model)(x)
        pickle.loads(pickle.dumps(model))(x)
        (reading,) = tracker.consume().values()
    assert (reading.value == -torch.inf).all()
    assert not model.q._forward_hooks and not model.k._forward_hooks


def multihead_max(module, query, key, hidden):
    """Largest visible logit per head; `hidden` (B, H, Q, K)."""
    wide = module.embed_dim
    if module.in_proj_weight is None:
        weights = module.q_proj_weight, module.k_proj_weight
    else:
        weights = module.in_proj_weight[:wide], module.in_proj_weight[wide : 2 * wide]
    bias = module.in_proj_bias
    bias = torch.zeros(3 * wide) if bias is None else bias
    q = (query @ weights[0].T + bias[:wide]).unflatten(-1, (4, -1)).transpose(1, 2)
    k = (key @ weights[1].T + bias[wide : 2 * wide]).unflatten(-1, (4, -1)).transpose(1, 2)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return scores.masked_fill(hidden, -torch.inf).amax((0, 2, 3)).detach()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masks", ["none", "causal", "float", "padding", "both"])
def test_fused_qkv_monitored(masks, bias, batch_first, x):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 4, bias=bias, batch_first=batch_first)
    if bias:
        nn.init.normal_(module.in_proj_bias)
    given = x if batch_first else x.transpose(0, 1)
    hidden, options = torch.zeros(2, 4, 7, 7, dtype=torch.bool), {}
    if masks in ("causal", "both", "float"):
        future = torch.ones(7, 7).triu(1).bool()
        hidden |= future
        filled = torch.zeros(7, 7).masked_fill(future, -torch.inf)
        options["attn_mask"] = filled if masks == "float" else future
    if masks in ("padding", "both"):
        padding = torch.zeros(2, 7, dtype=torch.bool)
        padding[1, 4:] = True
        hidden |= padding[:, None, None] | padding[:, None, :, None]
        options["key_padding_mask"] = padding
    plain = module(given, given, given, **options)[0]
    with LogitTracker(module, source="exact") as tracker:
        tracked = module(given, given, given, **options)[0]
        (reading,) = tracker.consume().values()
    assert torch.equal(plain, tracked) and not tracker.projected
    assert reading.exact.all()
    assert_close(reading.value, multihead_max(module, x, x, hidden), rtol=1e-5, atol=0)


def test_cross_attention_keeps_every_query():
    # The keys' padding says nothing about the queries of another sequence.
    module = nn.MultiheadAttention(16, 4, kdim=12, vdim=12, batch_first=True)
    query, key = torch.randn(2, 5, 16), torch.randn(2, 5, 12)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[:, 1:] = True
    with LogitTracker(module, source="exact") as tracker:
        module(query, key, key, key_padding_mask=padding)
        (reading,) = tracker.consume().values()
    hidden = padding[:, None, None].expand(2, 4, 5, 5)
    assert_close(reading.value, multihead_max(module, query, key, hidden), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kdim", [16, 12])
def test_multihead_attention_is_clipped(kdim):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 4, kdim=kdim, vdim=kdim, batch_first=True)
    nn.init.normal_(module.in_proj_bias)
    query, key = torch.randn(2, 5, 16) * 3, torch.randn(2, 5, kdim) * 3
    none = torch.zeros(2, 4, 5, 5, dtype=torch.bool)
    before = multihead_max(module, query, key, none)
    values = module.in_proj_bias.detach()[32:].clone()
    tau = middle(before)
    optimizer = with_qk_clip(
        torch.optim.SGD(module.parameters(), lr=0.0), module, MuonClipConfig(max_qk_score=tau)
    )
    module(query, key, key)[0].sum().backward()
    optimizer.step()
    after = multihead_max(module, query, key, none)
    assert_close(after, before.clamp_max(tau), rtol=1e-4, atol=0)
    assert torch.equal(module.in_proj_bias.detach()[32:], values)


def test_multihead_attention_with_keys_of_its_own_is_named():
    module = nn.MultiheadAttention(16, 4, add_bias_kv=True)
    with LogitTracker(module) as tracker:
        assert not tracker.sites and "add_bias_kv" in tracker.unread[0]


def test_layers_of_torch_transformers_are_found(x):
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    with LogitTracker(model) as tracker:
        model(x).sum().backward()
        found = tracker.consume()
    assert [*found] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert all(r.value.isfinite().all() for r in found.values())


def test_gptj_is_read_after_its_rotation():
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(vocab_size=32, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=32)
    model = GPTJForCausalLM(config)
    ids = torch.randint(0, 32, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    with LogitTracker(model) as tracker:
        true = softmax_maxima(model, ids, mask)
        found = tracker.consume()
    assert len(found) == 2 and tracker.projected == [*found]
    for reading, wanted in zip(found.values(), true, strict=True):
        assert reading.exact.all()
        assert_close(reading.value, wanted, rtol=1e-6, atol=0)


def softmax_maxima(model, ids, mask):
    """What a spy on torch's softmax sees of real tokens, for each call, in float64."""
    maxima = []
    softmax = nn.functional.softmax

    def spy(x, dim=None, **options):
        real = mask.bool()[:, None, :, None] & mask.bool()[:, None, None, :]
        seen = real & torch.ones(x.shape[-2:], dtype=torch.bool).tril()
        maxima.append(x.detach().masked_fill(~seen, -torch.inf).amax((0, 2, 3)))
        return softmax(x, dim, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "softmax", spy)
        model(input_ids=ids, attention_mask=mask)
    return maxima


@pytest.mark.parametrize("padding", [False, True])
def test_gpt_neos_logits_are_those_its_softmax_sees_and_are_clipped(padding):
    # It has no scaling: by head_dim ** -0.5 they were read 8 times too low.
    config = GPTNeoConfig(
        vocab_size=61,
        hidden_size=128,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        intermediate_size=64,
        max_position_embeddings=32,
        attention_dropout=0.0,
        embed_dropout=0.0,
        resid_dropout=0.0,
    )
    torch.manual_seed(0)
    model = GPTNeoForCausalLM(config)
    for layer in model.transformer.h:
        with torch.no_grad():
            layer.attn.attention.q_proj.weight.mul_(20)
            layer.attn.attention.k_proj.weight.mul_(20)
    ids, mask = torch.randint(3, 61, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 1 - int(padding)
    model(input_ids=ids, attention_mask=mask)
    settings = MuonClipConfig(max_qk_score=40.0)
    optimizer = with_qk_clip(torch.optim.SGD(model.parameters(), lr=0.0), model, settings)
    attention = model.transformer.h[0].attn.attention
    before = None
    for _ in range(2):
        seen = softmax_maxima(model, ids, mask)
        optimizer.step()
        stats = qk_clip_stats(optimizer)
        if before is None:
            before = seen[0]
            assert float(before.max()) > 40
            assert_close(
                torch.tensor(next(iter(stats.max_by_head.values()))), before, rtol=1e-6, atol=0
            )
    assert float(seen[0].max()) <= 40 * (1 + 1e-4)
    assert attention.q_proj.weight.isfinite().all()


class LinearAttention(Attention):
    """Queries and keys by name, but no softmax of their product; one over features."""

    def forward(self, x):
        q, k = (
            getattr(self, n)(x).unflatten(-1, (-1, 4)).transpose(1, 2).softmax(-1)
            for n in self.names
        )
        return self.out((q @ (k.mT @ k)).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("tokens", [7, 4, 2])
def test_linear_attention_is_left_alone_and_reported(tokens, x, caplog):
    # Also where the sequence is as long as a head is wide, or shorter.
    torch.manual_seed(0)
    model = nn.Sequential(LinearAttention(("q_proj", "k_proj")))
    optimizer = with_qk_clip(
        torch.optim.SGD(model.parameters(), lr=0.0), model, MuonClipConfig(max_qk_score=1e-3)
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for length in (tokens, 7):
        model(x[:, :length]).sum().backward()
        optimizer.step()
    stats = qk_clip_stats(optimizer)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert stats.clipped_heads == stats.missed_heads == 0
    (line,) = stats.unclippable
    assert line.startswith("0: its forward pass computes no softmax") and line in caplog.text


def test_a_watched_plain_module_is_put_back(x):
    model = Attention()
    wanted = model(x)
    with LogitTracker(model) as tracker:
        assert torch.equal(model(x), wanted) and "forward" in vars(model)
        tracker.consume()
    assert "forward" not in vars(model) and torch.equal(model(x), wanted)
