"""Clip, run the same batch again: every head is at min(S, tau), and nothing else has moved."""

import pytest
import torch

from hmpo.optim import LogitTracker, QKClip
from tests.attention.families import FAMILIES, LAYERWISE, family
from tests.optim.test_qk_clip import clip_once, parameters
from tests.optim.tiny import batch, halfway, middle, values

PER_HEAD = [kind for kind in FAMILIES if kind not in LAYERWISE]
MODES = ("balanced", "query", "group")


def attention(model):
    names = ("self_attn", "attention", "attn")
    return next(m for n, m in model.named_modules() if n.rpartition(".")[2] in names)


def heads_of(model, kind):
    """Views of the weights of each query head and each key head, written down by hand.

    Returns:
        Two lists, by query head and by key head, of lists of views into parameters.
    """
    module = attention(model)
    if kind == "gpt2":
        weight, bias = module.c_attn.weight.t(), module.c_attn.bias
        return tuple(
            [[weight[o + 8 * h : o + 8 * h + 8], bias[o + 8 * h : o + 8 * h + 8]] for h in range(4)]
            for o in (0, 32)
        )
    if kind == "gpt_neox":
        weight = module.query_key_value.weight.view(4, 3, 8, 32)
        bias = module.query_key_value.bias.view(4, 3, 8)
        return tuple([[weight[h, i], bias[h, i]] for h in range(4)] for i in (0, 1))
    if kind == "phi3":
        weight = module.qkv_proj.weight
        rows = [[weight[8 * h : 8 * h + 8]] for h in range(8)]
        return rows[:4], rows[4:6]
    if kind.startswith("deepseek"):
        query = (module.q_proj if module.q_lora_rank is None else module.q_b_proj).weight
        query, key = query.view(4, 12, -1), module.kv_b_proj.weight.view(4, 14, -1)
        return [[query[h]] for h in range(4)], [[key[h, :8]] for h in range(4)]
    sides = []
    for side, count in (("q", 4), ("k", 2)):
        if kind == "olmo2":
            tensors = [getattr(module, f"{side}_norm").weight]
        else:
            tensors = list(getattr(module, f"{side}_proj").parameters())
        sides.append([[t.unflatten(0, (count, -1))[h] for t in tensors] for h in range(count)])
    return tuple(sides)


def frozen_copy(model, kind):
    """A copy of every parameter, and of the heads' views, taken together."""
    heads = [
        [[v.detach().clone() for v in head] for head in side] for side in heads_of(model, kind)
    ]
    return parameters(model), heads


def taus(before):
    """One head over; half of the heads over."""
    return halfway(before, 1), halfway(before, 2)


def expected(before, tau, mode, groups):
    over = (tau / before.clamp_min(tau)).view(groups, -1)
    if mode == "group":
        over = over.min(1, keepdim=True).values.expand_as(over)
    return before * over.reshape(-1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", PER_HEAD)
def test_clip_then_rerun_gives_min_of_value_and_tau(kind, mode):
    ids, mask = batch(padding="left")
    first = values(family(kind), ids, mask)[0]
    for tau in taus(first):
        model = family(kind)
        stats = clip_once(model, ids, mask, tau=tau, gqa=mode)
        groups = len(heads_of(model, kind)[1])
        torch.testing.assert_close(
            values(model, ids, mask)[0], expected(first, tau, mode, groups), rtol=1e-4, atol=0
        )
        assert stats.clipped_heads == int((first > tau).sum()) > 0
        assert stats.unclippable == () and stats.missed_heads == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", PER_HEAD)
def test_what_need_not_change_is_equal_bit_for_bit(kind, mode):
    model = family(kind)
    ids, mask = batch()
    before = values(model, ids, mask)[0]
    tau = taus(before)[0]
    top, old = int(before.argmax()), parameters(model)
    queries, keys = frozen_copy(model, kind)[1]
    clip_once(model, ids, mask, tau=tau, gqa=mode)
    share = len(queries) // len(keys)
    new_queries, new_keys = heads_of(model, kind)
    for h, (new, was) in enumerate(zip(new_queries, queries, strict=True)):
        may_move = h == top or (mode != "query" and h // share == top // share)
        assert all(map(torch.equal, new, was)) == (not may_move), h
    for g, (new, was) in enumerate(zip(new_keys, keys, strict=True)):
        assert all(map(torch.equal, new, was)) == (mode == "query" or g != top // share), g
    with torch.no_grad():  # put the heads back: nothing but them may have moved
        for views, was in ((new_queries, queries), (new_keys, keys)):
            for head, copies in zip(views, was, strict=True):
                for view, copy in zip(head, copies, strict=True):
                    view.copy_(copy)
    assert all(torch.equal(p, old[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", LAYERWISE)
def test_shared_gains_bring_the_layer_to_tau(kind, mode):
    model = family(kind)
    ids, mask = batch(padding="right")
    before, old = values(model, ids, mask), parameters(model)
    tau = middle(before)
    stats = clip_once(model, ids, mask, tau=tau, gqa=mode)
    gamma = tau / float(before.max())
    torch.testing.assert_close(values(model, ids, mask), before * gamma, rtol=1e-4, atol=0)
    assert stats.clipped_heads == int((before > tau).sum()) and stats.unclippable == ()
    for name, new in model.named_parameters():
        moved = "q_norm" in name or ("k_norm" in name and mode != "query")
        assert torch.equal(new, old[name]) == (not moved), name


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_is_left_alone_below_tau(kind):
    model = family(kind)
    ids, mask = batch()
    tau = float(values(model, ids, mask).max()) * 1.0001
    old = parameters(model)
    stats = clip_once(model, ids, mask, tau=tau)
    assert stats.clipped_heads == 0 and stats.heads == 4
    assert all(torch.equal(p, old[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "gpt_neox"])
def test_random_biases_shrink_with_their_rows(kind):
    model = family(kind, gain=1.0)
    for name, parameter in model.named_parameters():
        if name.endswith(("proj.bias", "c_attn.bias", "query_key_value.bias")):
            parameter.data.mul_(5)
    ids, mask = batch()
    before = values(model, ids, mask)
    tau = float(before.max()) / 3
    clip_once(model, ids, mask, tau=tau)
    torch.testing.assert_close(values(model, ids, mask), before.clamp_max(tau), rtol=1e-4, atol=0)


def test_soft_capped_logits_are_read_and_clipped_before_the_cap():
    model = family("gemma2", gain=150.0)
    ids, mask = batch()
    before = values(model, ids, mask)
    cap = model.config.attn_logit_softcapping
    assert float(before.max()) > cap
    tau = (float(before.max()) + cap) / 2
    clip_once(model, ids, mask, tau=tau)
    torch.testing.assert_close(values(model, ids, mask), before.clamp_max(tau), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3", "qwen3"])
def test_a_second_clip_of_the_same_batch_does_nothing(kind):
    model = family(kind)
    ids, mask = batch()
    tau = middle(values(model, ids, mask))
    clip_once(model, ids, mask, tau=tau)
    old = parameters(model)
    clip_once(model, ids, mask, tau=tau * (1 + 1e-4))  # the margin of the tests that reach tau
    assert all(torch.equal(p, old[name]) for name, p in model.named_parameters())


def test_latent_attention_follows_k2():
    # W_qc and W_kc by sqrt(gamma), W_qr by gamma, the shared W_kr and the values not at all.
    model = family("deepseek_v3")
    module = attention(model)
    query = module.q_b_proj.weight.detach().clone().view(4, 12, -1)
    keys = module.kv_b_proj.weight.detach().clone().view(4, 14, -1)
    shared = module.kv_a_proj_with_mqa.weight.detach().clone()
    ids, mask = batch()
    before = values(model, ids, mask)[0]
    tau = float(before.min()) / 2
    clip_once(model, ids, mask, tau=tau)
    gamma = (tau / before)[:, None, None]
    new = module.q_b_proj.weight.view(4, 12, -1)
    torch.testing.assert_close(new[:, :8], query[:, :8] * gamma.sqrt())
    torch.testing.assert_close(new[:, 8:], query[:, 8:] * gamma)
    new = module.kv_b_proj.weight.view(4, 14, -1)
    torch.testing.assert_close(new[:, :8], keys[:, :8] * gamma.sqrt())
    assert torch.equal(new[:, 8:], keys[:, 8:])
    assert torch.equal(module.kv_a_proj_with_mqa.weight, shared)


def test_one_plus_w_gains_shrink_as_a_whole():
    # At w = 0 the gain is 1: scaling w itself would do nothing.
    model = family("gemma3")
    module = attention(model)
    with torch.no_grad():
        module.q_norm.weight.zero_()
        module.k_norm.weight.fill_(3.0)
    ids, mask = batch()
    before = values(model, ids, mask)
    tau = float(before.max()) / 4
    clip_once(model, ids, mask, tau=tau)
    torch.testing.assert_close(module.q_norm.weight, torch.full((8,), 0.5 - 1))
    torch.testing.assert_close(module.k_norm.weight, torch.full((8,), 4 * 0.5 - 1))
    torch.testing.assert_close(float(values(model, ids, mask).max()), tau, rtol=1e-4, atol=0)


def test_layers_are_exact_each_for_its_own_input():
    # A clipped layer changes what the next one sees, so each is compared on the input it had.
    model = family("qwen2", num_hidden_layers=3)
    ids, mask = batch()
    seen = {}
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update({module: (args, kwargs)}), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    with LogitTracker(model, source="exact") as tracker:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        before = {name: r.value for name, r in tracker.consume().items()}
    for hook in hooks:
        hook.remove()
    tau = middle(torch.stack([*before.values()]))
    inputs = dict(seen)
    clip_once(model, ids, mask, tau=tau)
    with LogitTracker(model, source="exact") as tracker:
        for module, (args, kwargs) in inputs.items():
            module(*args, **kwargs)
        for name, reading in tracker.consume().items():
            wanted = before[name].clamp_max(tau)
            torch.testing.assert_close(reading.value, wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["llama", "olmo2", "phi3"])
def test_balanced_keeps_heads_under_tau_where_their_shared_key_moves(kind):
    model = family(kind)
    ids, mask = batch()
    before = values(model, ids, mask)[0]
    tau, top = taus(before)[0], int(before.argmax())
    clip_once(model, ids, mask, tau=tau)
    after, others = values(model, ids, mask)[0], torch.arange(4) != top
    torch.testing.assert_close(after[others], before[others], rtol=1e-5, atol=0)


def test_settings_of_a_clip_reach_every_family():
    for kind in ("phi3", "deepseek_v3"):
        model = family(kind)
        ids, mask = batch()
        before = values(model, ids, mask)[0]
        tau = middle(before)
        with LogitTracker(model, tau=tau) as tracker:
            model(input_ids=ids, attention_mask=mask)
            QKClip(tracker, tau=tau, alpha=0.25).apply()
        after = values(model, ids, mask)[0]
        torch.testing.assert_close(after, before.clamp_max(tau), rtol=1e-4, atol=0)
