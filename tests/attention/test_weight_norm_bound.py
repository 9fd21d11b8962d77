"""The bound from weights: above every logit that any input can make, used only where allowed."""

import logging

import pytest
import torch

from hmpo.attention.sites import find_sites, hidden_sites
from hmpo.attention.weight_norm_bound import weight_norm_bound
from hmpo.optim import LogitTracker, MuonClip, MuonClipConfig, QKClip
from tests.attention.families import FAMILIES, family
from tests.optim.test_qk_clip import parameters
from tests.optim.tiny import batch, values

BOUNDED = [kind for kind in FAMILIES if not kind.startswith("deepseek")]


def bound_of(model):
    (site,) = [*find_sites(model)[0], *hidden_sites(model)]
    return weight_norm_bound(model, site)


def hide(model):
    """Make the model's attention one that nobody can read."""
    model.config._attn_implementation = "my_own"
    return model


@pytest.mark.parametrize("kind", BOUNDED)
def test_fallback_bound_is_upper_bound(kind):
    for seed in range(6):
        model = family(kind, seed=seed)
        bound = bound_of(model)
        for batch_seed in range(4):
            ids, mask = batch(rows=4, length=16, padding="left", seed=batch_seed)
            assert (values(model, ids, mask)[0].double() <= bound).all()


@pytest.mark.parametrize("kind", ["llama", "olmo2", "qwen3", "gemma3"])
def test_bound_is_nearly_reached_by_the_worst_input(kind):
    # One key and one query of the greatest length, in the same direction: nothing smaller is sound.
    model = family(kind)
    module = model.model.layers[0].self_attn
    with torch.no_grad():
        for norm in (getattr(module, "q_norm", None), getattr(module, "k_norm", None)):
            if norm is not None:
                norm.weight.fill_(2.0)
        for name in ("q_proj", "k_proj"):
            getattr(module, name).weight.zero_()[:8, 0] = 1.0
        if kind == "llama":
            model.model.layers[0].input_layernorm.weight.fill_(1.0)
        for row in model.model.embed_tokens.weight:
            row.zero_()[0] = 50.0
        bound = bound_of(model)
    ids = torch.full((1, 1), 3)
    reached = values(model, ids)[0].double()
    torch.testing.assert_close(reached[0], bound[0], rtol=1e-3, atol=0)


def test_bound_counts_what_rotary_embedding_multiplies_in():
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 16,
    }
    plain, stretched = family("llama"), family("llama", rope_parameters=yarn)
    factor = stretched.model.rotary_emb.attention_scaling
    assert factor > 1.2
    torch.testing.assert_close(bound_of(stretched), bound_of(plain) * factor**2)


def test_there_is_no_bound_where_none_is_sound():
    assert "DeepseekV3Attention" in bound_of(family("deepseek_v3"))
    model = family("llama")
    model.model.layers[0].input_layernorm = torch.nn.Identity()
    assert "input has no bound" in bound_of(model)


def test_fallback_acts_only_on_layers_nobody_can_read(caplog):
    model = family("qwen2")
    ids, mask = batch()
    tau = float(values(model, ids, mask).min()) / 2
    with LogitTracker(model, tau=tau) as tracker:  # can be read, was not: nothing is known
        old = parameters(model)
        stats = QKClip(tracker, tau=tau, fallback=True).apply()
        assert stats.fallbacks == () and stats.unread_heads == 4
        assert all(torch.equal(p, old[name]) for name, p in model.named_parameters())
    hide(model)
    with LogitTracker(model, tau=tau) as tracker, caplog.at_level(logging.WARNING):
        assert QKClip(tracker, tau=tau).apply().fallbacks == ()
        assert all(torch.equal(p, old[name]) for name, p in model.named_parameters())
        clip = QKClip(tracker, tau=tau, fallback=True)
        stats = clip.apply()
        assert stats.fallbacks == ("model.layers.0.self_attn",)
        assert clip.apply().fallbacks == ()  # the bound is at tau now
    assert caplog.text.count("clipped by a bound from its weights") == 1
    assert (bound_of(model) <= tau * (1 + 1e-5)).all()
    model.config._attn_implementation = "sdpa"
    assert (values(model, ids, mask) <= tau).all()


def test_fallback_below_tau_changes_nothing():
    model = hide(family("phi3"))
    old = parameters(model)
    with LogitTracker(model, tau=1e9) as tracker:
        stats = QKClip(tracker, tau=1e9, fallback=True).apply()
    assert stats.fallbacks == ()
    assert all(torch.equal(p, old[name]) for name, p in model.named_parameters())


def test_fallback_is_a_setting_of_the_optimizer():
    model = hide(family("gpt2"))
    for allowed in (False, True):
        config = MuonClipConfig(max_qk_score=1.0, weight_norm_fallback=allowed)
        optimizer = MuonClip(torch.optim.SGD(model.parameters(), lr=0.0), config)
        optimizer.attach(model)
        optimizer.step()
        assert len(optimizer.last_stats.fallbacks) == int(allowed)
        optimizer.detach()
