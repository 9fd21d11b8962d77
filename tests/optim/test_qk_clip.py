import copy
import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmpo.attention.tracker import MaxLogits
from hmpo.errors import ConfigError
from hmpo.optim import LogitTracker, QKClip
from hmpo.optim.qk_clip import gammas, head_factors
from tests.optim.tiny import KINDS, attentions, batch, halfway, make, middle, values


def clip_once(model, ids, mask=None, tau=100.0, **options):
    with LogitTracker(model, tau=tau) as tracker:
        model(input_ids=ids, attention_mask=mask)
        return QKClip(tracker, tau=tau, **options).apply()


def fake_readings(tracker, rows):
    """Make the next consume() of `tracker` return these values, layer by layer."""
    names = [site.name for site in tracker.sites]
    tracker.consume = lambda: {
        name: MaxLogits(torch.tensor(row), torch.ones(len(row), dtype=torch.bool))
        for name, row in zip(names, rows, strict=True)
    }


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("gqa", ["balanced", "query"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_clip_then_rerun_gives_min_of_value_and_tau(kind, kv_heads, gqa):
    model = make(kind, num_key_value_heads=kv_heads, num_hidden_layers=1)
    ids, mask = batch(padding="left")
    before = values(model, ids, mask)
    tau = middle(before)
    stats = clip_once(model, ids, mask, tau=tau, gqa=gqa)
    expected = before.clamp_max(tau)
    torch.testing.assert_close(values(model, ids, mask), expected, rtol=1e-4, atol=0)
    assert stats.clipped_heads == int((before > tau).sum()) > 0
    # Read from another forward pass, which may take other kernels: equal but for rounding.
    assert stats.max_logit == pytest.approx(float(before.max()), rel=1e-5)
    assert stats.min_scale == pytest.approx(tau / float(before.max()), rel=1e-5)
    assert stats.heads == 4 and stats.clip_rate == stats.clipped_heads / 4


def test_only_offending_head_scaled():
    model = make("qwen2", num_key_value_heads=4, num_hidden_layers=1)
    ids, _ = batch()
    before, old = values(model, ids), parameters(model)
    top = int(before[0].argmax())
    tau = halfway(before[0], 1)
    clip_once(model, ids, tau=tau)
    rows = torch.zeros(4, dtype=torch.bool).index_fill(0, torch.tensor(top), True)
    rows = rows.repeat_interleave(8)
    gamma = tau / float(before[0, top])
    for name, new in parameters(model).items():
        if "q_proj" in name or "k_proj" in name:
            assert torch.equal(new[~rows], old[name][~rows])
            torch.testing.assert_close(new[rows], old[name][rows] * gamma**0.5)
        else:
            assert torch.equal(new, old[name])


@pytest.mark.parametrize("gqa", ["balanced", "query"])
def test_group_without_offender_unchanged_bit_for_bit(gqa):
    model = make("qwen2", num_hidden_layers=1)
    old = parameters(model)
    with LogitTracker(model) as tracker:
        fake_readings(tracker, [[150.0, 20.0, 100.0, -3.0]])
        QKClip(tracker, gqa=gqa).apply()
    for name, new in parameters(model).items():
        rows = {"q_proj": 16, "k_proj": 8}.get(name.split(".")[-2], 0)
        assert torch.equal(new[rows:], old[name][rows:])
        if rows == 16:
            assert not torch.equal(new[:8], old[name][:8])
        if rows == 8:
            assert torch.equal(new, old[name]) == (gqa == "query")


def test_bias_scaled():
    # With large biases the logit falls to tau only if the bias rows shrink with the weight rows.
    model = make("qwen2", num_hidden_layers=1)
    with torch.no_grad():
        attentions(model)[0].q_proj.bias.mul_(20)
        attentions(model)[0].k_proj.bias.mul_(20)
    ids, _ = batch()
    bias = attentions(model)[0].q_proj.bias.detach().clone()
    before = values(model, ids)
    tau = float(before.max()) / 3
    clip_once(model, ids, tau=tau)
    assert not torch.equal(attentions(model)[0].q_proj.bias, bias)
    torch.testing.assert_close(values(model, ids), before.clamp_max(tau), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_rescale_when_scores_are_low(kind):
    model = make(kind, gain=1.0)
    ids, _ = batch()
    assert float(values(model, ids).max()) < 100
    old = parameters(model)
    stats = clip_once(model, ids)
    assert all(torch.equal(new, old[name]) for name, new in parameters(model).items())
    assert stats.clipped_heads == 0 and stats.min_scale == 1.0


@pytest.mark.parametrize(
    "row",
    [
        [-5.0, -math.inf, math.nan, 0.0],
        [math.inf, math.nan, 100.0, -math.inf],
        [-math.inf] * 4,
    ],
)
def test_odd_readings_never_scale(row):
    model = make("qwen2", num_hidden_layers=1)
    old = parameters(model)
    with LogitTracker(model) as tracker:
        fake_readings(tracker, [row])
        stats = QKClip(tracker).apply()
    assert all(torch.equal(new, old[name]) for name, new in parameters(model).items())
    assert stats.nonfinite == sum(math.isnan(v) or v == math.inf for v in row)
    assert stats.unread_heads == row.count(-math.inf)
    assert stats.negative == sum(-math.inf < v < 0 for v in row)
    finite = [v for v in row if math.isfinite(v)]
    if finite:
        assert stats.max_logit == max(finite)
    else:
        assert math.isnan(stats.max_logit) and stats.max_by_layer == {}


def test_odd_readings_do_not_stop_their_neighbours():
    model = make("llama", num_hidden_layers=1)
    old = parameters(model)["model.layers.0.self_attn.q_proj.weight"]
    with LogitTracker(model) as tracker:
        fake_readings(tracker, [[math.nan, 150.0, 400.0, -7.0]])
        stats = QKClip(tracker, gqa="query").apply()
    new = attentions(model)[0].q_proj.weight
    assert stats.clipped_heads == 2 and stats.nonfinite == 1 and stats.min_scale == 0.25
    assert torch.equal(new[:8], old[:8]) and torch.equal(new[24:], old[24:])
    torch.testing.assert_close(new[8:16], old[8:16] * (2 / 3))
    torch.testing.assert_close(new[16:24], old[16:24] / 4)


def test_a_head_at_tau_or_under_it_has_factor_one_exactly():
    tau = torch.rand(1000, generator=torch.Generator().manual_seed(0)).double() * 4
    for limit in tau.tolist():
        value = torch.tensor([limit, limit / 2, -1.0, torch.nan, torch.inf], dtype=torch.float64)
        assert gammas(value, limit).tolist() == [1.0] * 5


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.floats(0, 1),
    st.sampled_from(["balanced", "query", "group"]),
    st.integers(0, 2**31),
)
def test_factors_multiply_to_gamma(groups, share, alpha, gqa, seed):
    generator = torch.Generator().manual_seed(seed)
    value = torch.rand(groups * share, generator=generator, dtype=torch.float64) * 300
    gamma = gammas(value, 100.0)
    query, key = head_factors(gamma, groups, alpha, gqa)
    wanted = gamma
    if gqa == "group":
        wanted = gamma.view(groups, share).min(1).values.repeat_interleave(share)
    torch.testing.assert_close(query * key.repeat_interleave(share), wanted)
    idle = (gamma.view(groups, share) == 1).all(1)
    assert (key[idle] == 1).all() and (query.view(groups, share)[idle] == 1).all()
    if gqa == "query":
        assert (key == 1).all()
    elif share == 1:
        torch.testing.assert_close(query, gamma**alpha)
        torch.testing.assert_close(key, gamma ** (1 - alpha))


def test_balanced_factors_by_hand():
    gamma = torch.tensor([0.5, 1.0, 0.25], dtype=torch.float64)
    query, key = head_factors(gamma, 1, 0.5, "balanced")
    c = (0.5 * 0.25) ** (1 / 4)
    torch.testing.assert_close(key, torch.tensor([c], dtype=torch.float64))
    torch.testing.assert_close(query, gamma / c)


def test_bfloat16_weights_are_rounded_once():
    model = make("llama", num_hidden_layers=1, num_key_value_heads=4, dtype=torch.bfloat16)
    old = attentions(model)[0].q_proj.weight.detach().clone()
    with LogitTracker(model) as tracker:
        fake_readings(tracker, [[100.5] * 4])
        QKClip(tracker).apply()
    factor = torch.tensor((100 / 100.5) ** 0.5, dtype=torch.float32)
    assert torch.equal(attentions(model)[0].q_proj.weight, (old.float() * factor).bfloat16())
    assert not torch.equal(attentions(model)[0].q_proj.weight, old)


def test_tied_projections_are_scaled_once():
    model = make("llama")
    first, second = attentions(model)
    second.q_proj.weight, second.k_proj.weight = first.q_proj.weight, first.k_proj.weight
    old = copy.deepcopy(model)
    with LogitTracker(model) as tracker:
        fake_readings(tracker, [[200.0, 50.0, 10.0, 10.0], [50.0, 400.0, 10.0, 10.0]])
        QKClip(tracker).apply()
    alone = old
    with LogitTracker(alone) as tracker:
        fake_readings(tracker, [[200.0, 400.0, 10.0, 10.0], [0.0] * 4])
        QKClip(tracker).apply()
    for a, b in zip(attentions(model), attentions(alone), strict=True):
        assert torch.equal(a.q_proj.weight, b.q_proj.weight)
        assert torch.equal(a.k_proj.weight, b.k_proj.weight)


def test_shared_keys_take_the_smaller_factor():
    model = make("llama")
    first, second = attentions(model)
    second.k_proj.weight = first.k_proj.weight
    old = first.k_proj.weight.detach().clone()
    with LogitTracker(model) as tracker:
        fake_readings(tracker, [[200.0] * 4, [50.0] * 4])
        QKClip(tracker).apply()
    torch.testing.assert_close(first.k_proj.weight, old * 0.5 ** (2 / 3))


def test_frozen_projection_is_reported(caplog):
    model = make("llama", num_hidden_layers=1)
    attentions(model)[0].k_proj.weight.requires_grad_(False)
    old = parameters(model)
    with LogitTracker(model) as tracker, caplog.at_level(logging.WARNING):
        fake_readings(tracker, [[150.0, 1.0, 1.0, 1.0]])
        stats = QKClip(tracker).apply()
    assert stats.unclippable == ("model.layers.0.self_attn: k_proj.weight is frozen",)
    assert stats.missed_heads == 1 and stats.clipped_heads == 0 and stats.min_scale == 1.0
    assert "k_proj.weight is frozen" in caplog.text
    assert all(torch.equal(new, old[name]) for name, new in parameters(model).items())


def test_qk_norm_is_clipped_by_its_gains_and_reported_where_they_are_frozen():
    model = make("qwen3", num_hidden_layers=1)
    with torch.no_grad():
        attentions(model)[0].q_norm.weight.fill_(100.0)
    ids, _ = batch()
    attentions(model)[0].q_norm.weight.requires_grad_(False)
    old = parameters(model)
    stats = clip_once(model, ids)
    assert stats.max_logit > 100 and stats.missed_heads > 0 and stats.clipped_heads == 0
    assert stats.unclippable == ("model.layers.0.self_attn: the q norm.weight is frozen",)
    assert all(torch.equal(new, old[name]) for name, new in parameters(model).items())
    attentions(model)[0].q_norm.weight.requires_grad_(True)
    stats = clip_once(model, ids)
    assert stats.missed_heads == 0 and stats.clipped_heads > 0
    assert float(values(model, ids).max()) == pytest.approx(100.0, rel=1e-4)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(parameters(model)[name], old[name])


def test_unreadable_attention_is_unclippable():
    model = make("llama")
    model.config._attn_implementation = "flex_attention"
    with LogitTracker(model) as tracker:
        stats = QKClip(tracker).apply()
    assert len(stats.unclippable) == 2 and stats.heads == 0 and stats.clip_rate == 0.0


def test_foreign_projection_is_reported():
    model = make("llama", num_hidden_layers=1)
    layer = attentions(model)[0]
    layer.q_proj = torch.nn.Sequential(layer.q_proj)
    layer.q_proj.out_features = 32
    with LogitTracker(model) as tracker:
        stats = QKClip(tracker).apply()
    assert "q_proj is a Sequential" in stats.unclippable[0]


def test_replaced_parameters_are_found():
    model = make("llama", num_hidden_layers=1)
    with LogitTracker(model) as tracker:
        old = parameters(model)
        model.load_state_dict(parameters(model), assign=True, strict=False)
        fake_readings(tracker, [[200.0] * 4])
        QKClip(tracker, gqa="query").apply()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(attentions(model)[0].q_proj.weight, old[name] / 2)


def test_settings_are_checked():
    with LogitTracker(make("llama"), tau=50.0) as tracker:
        with pytest.raises(ConfigError, match="tracker's tau"):
            QKClip(tracker, tau=20.0)
        with pytest.raises(ConfigError, match="alpha"):
            QKClip(tracker, alpha=1.5)
        with pytest.raises(ConfigError, match="gqa"):
            QKClip(tracker, gqa="min")
