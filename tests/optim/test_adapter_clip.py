"""LoRA over a frozen base: B alone shrinks, by the least that brings each head to tau."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hmpo.errors import ConfigError
from hmpo.optim import LogitTracker, MuonClip, MuonClipConfig, QKClip, with_qk_clip
from hmpo.optim.adapter_factor import AIM, OVER, SplitCall, largest_factors, last_root
from hmpo.optim.muon_clip import qk_clip_stats
from tests.attention.test_sites_adapters import adapted
from tests.optim.test_qk_clip import parameters
from tests.optim.tiny import batch, clear_of, halfway, loss_of, middle, values
from tests.oracles.adapter_factor import largest_logit, scan

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

MODES = ("balanced", "query", "group")


def strong(kind, gain=3.0, **options):
    """A model whose adapter makes most of its logits."""
    model = adapted(kind, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(gain)
    return model


def base_values(model, ids, mask=None):
    with model.disable_adapter():
        return values(model, ids, mask)


def silenced_queries(model, ids, mask=None):
    """Maxima with the adapter on the keys only."""
    bare = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in bare.named_parameters():
            if "q_proj.lora_B" in name:
                parameter.zero_()
    return values(bare, ids, mask)


def clip(model, batches, tau, **options):
    with LogitTracker(model, tau=tau) as tracker:
        clipper = QKClip(tracker, tau=tau, **options)
        for ids, mask in batches:
            model(input_ids=ids, attention_mask=mask)
        return clipper.apply()


def between(low, high):
    """A threshold that the base keeps and the adapter breaks."""
    base, top = float(low.max()), float(high.max())
    assert top > 1.2 * base
    return clear_of(base + 0.2 * (top - base), high)


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "mistral", "phi3", "gpt2", "gpt_neox", "deepseek_v3"]
)
def test_every_head_above_tau_comes_to_tau_from_below(kind):
    model = strong(kind)
    ids, mask = batch(padding="left")
    before = values(model, ids, mask)[0]
    tau = between(base_values(model, ids, mask), before)
    stats = clip(model, [(ids, mask)], tau)
    after, over = values(model, ids, mask)[0], before > tau
    assert stats.clipped_heads == int(over.sum()) > 0
    assert stats.missed_heads == 0 and stats.unclippable == ()
    assert bool((after <= tau).all())
    groups = torch.arange(4) // (2 if kind in ("llama", "qwen2", "mistral", "phi3") else 1)
    for group in groups[over].unique():  # the head that set the group's factor is at tau
        assert float(after[groups == group].max()) >= tau * (1 - 1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_query_mode_is_exact_for_each_head(kind):
    model = strong(kind)
    ids, mask = batch(padding="right")
    before, old = values(model, ids, mask)[0], parameters(model)
    low = float(silenced_queries(model, ids, mask).max())
    tau = clear_of(max(1.05 * low, middle(before)), before)
    stats = clip(model, [(ids, mask)], tau, gqa="query")
    after, over = values(model, ids, mask)[0], before > tau
    assert 0 < int(over.sum()) < 4 and stats.clipped_heads == int(over.sum())
    assert bool((after[over] <= tau).all()) and bool((after[over] >= tau * (1 - 1e-4)).all())
    for name, new in model.named_parameters():
        was = old[name]
        if "q_proj.lora_B" in name:
            same = [torch.equal(a, b) for a, b in zip(new.view(4, 8, -1), was.view(4, 8, -1))]
            assert same == (~over).tolist()
        else:
            assert torch.equal(new, was), name


@pytest.mark.parametrize("gqa", ["balanced", "group"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_only_the_rows_of_b_in_groups_above_tau_move(kind, gqa):
    model = strong(kind)
    ids, mask = batch()
    before, old = values(model, ids, mask)[0], parameters(model)
    pairs = before.view(2, 2).max(1).values
    tau = halfway(pairs, 1)
    assert tau > float(base_values(model, ids, mask).max())
    clip(model, [(ids, mask)], tau, gqa=gqa)
    group, share = int(pairs.argmax()), []
    for name, new in model.named_parameters():
        side = "q" if "q_proj.lora_B" in name else "k" if "k_proj.lora_B" in name else ""
        if not side:
            assert torch.equal(new, old[name]), name
            continue
        parts, was = (x.detach().view(2, -1, new.shape[1]) for x in (new, old[name]))
        assert torch.equal(parts[1 - group], was[1 - group])
        share.append(parts[group] / was[group])
    queries, keys = sorted(share, key=len, reverse=True)
    assert float(keys.max() - keys.min()) < 1e-6 and float(keys.max()) < 1
    if gqa == "group":
        torch.testing.assert_close(queries[:8], keys)
        torch.testing.assert_close(queries[8:], keys)
    else:  # each head's queries shrink no more than they have to
        assert bool((queries >= keys.min() - 1e-6).all()) and bool((queries <= 1 + 1e-6).all())
    assert float(values(model, ids, mask).max()) == pytest.approx(tau, rel=1e-4)


def test_balanced_returns_to_each_head_what_it_can():
    model, both = strong("llama"), []
    ids, mask = batch()
    before = values(model, ids, mask)[0]
    tau = between(base_values(model, ids, mask), before)
    for gqa in ("group", "balanced"):
        one = copy.deepcopy(model)
        clip(one, [(ids, mask)], tau, gqa=gqa)
        both.append(values(one, ids, mask)[0])
    assert bool((both[1] >= both[0] * (1 - 1e-5)).all())
    assert float((both[1] - both[0]).max()) > 0.05 * tau


def test_a_head_whose_base_exceeds_tau_is_reported_and_left_alone():
    model = strong("llama")
    ids, mask = batch()
    before, old = values(model, ids, mask)[0], parameters(model)
    tau = float(base_values(model, ids, mask).min()) / 2
    stats = clip(model, [(ids, mask)], tau)
    assert stats.missed_heads == int((before > tau).sum()) == 4 and stats.clipped_heads == 0
    assert "the frozen base exceeds it" in stats.unclippable[0]
    assert all(torch.equal(p, old[name]) for name, p in model.named_parameters())


def test_a_group_that_its_base_blocks_still_clips_its_other_heads():
    model = strong("llama")
    with torch.no_grad():  # head 0's base alone is far above tau; head 1 shares its keys
        for name, parameter in model.named_parameters():
            if "q_proj.base_layer.weight" in name:
                parameter[:8].mul_(100)
                parameter[8:16].mul_(0.01)
    ids, mask = batch()
    before, old = values(model, ids, mask)[0], parameters(model)
    tau = float(before[1]) * 0.8
    stats = clip(model, [(ids, mask)], tau)
    after = values(model, ids, mask)[0]
    assert float(before[0]) > tau and stats.missed_heads >= 1
    assert tau * (1 - 1e-4) <= float(after[1]) <= tau
    assert float(after[0]) == float(before[0])
    keys = next(name for name in old if "k_proj.lora_B" in name)
    assert torch.equal(model.get_parameter(keys)[:8], old[keys][:8])


@pytest.mark.parametrize("gqa", MODES)
def test_all_micro_batches_count(gqa):
    model = strong("qwen2")
    batches = [batch(seed=seed, padding=side) for seed, side in ((1, "left"), (5, None))]
    before = torch.stack([values(model, *one)[0] for one in batches])
    low = torch.stack([silenced_queries(model, *one)[0] for one in batches])
    low = torch.maximum(low, torch.stack([base_values(model, *one)[0] for one in batches]))
    tau = between(low, before)
    stats = clip(model, batches, tau, gqa=gqa)
    assert stats.missed_heads == 0
    after = torch.stack([values(model, *one)[0] for one in batches])
    assert bool((after <= tau).all()) and float(after.max()) >= tau * (1 - 1e-4)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj"]])
def test_an_adapter_on_one_side_only(targets):
    one = strong("llama")
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            if "lora_B" in name and targets[0] not in name:
                parameter.zero_()
    other = "k_proj" if targets[0] == "q_proj" else "q_proj"
    for layer in one.modules():
        if other in dict(layer.named_children()):
            setattr(layer, other, getattr(layer, other).base_layer)
    ids, mask = batch()
    before = values(one, ids, mask)[0]
    with one.disable_adapter():
        tau = between(values(one, ids, mask), before)
    stats = clip(one, [(ids, mask)], tau)
    after, over = values(one, ids, mask)[0], before > tau
    assert stats.clipped_heads == int(over.sum()) > 0
    assert tau * (1 - 1e-4) <= float(after.max()) <= tau
    if other == "q_proj":  # mode "query" leaves the keys alone, so nothing is left to scale
        stats = clip(one, [(ids, mask)], tau * 0.9, gqa="query")
        assert stats.clipped_heads == 0 and stats.missed_heads > 0


def test_two_active_adapters_of_other_ranks_shrink_together_and_an_idle_one_stays():
    model = strong("llama", rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 3})
    for name in ("second", "idle"):
        model.add_adapter(name, LoraConfig(r=3, target_modules=["q_proj", "k_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.second" in name or "lora_B.idle" in name:
                parameter.normal_()
    model.base_model.set_adapter(["default", "second"])
    ids, mask = batch()
    before, old = values(model, ids, mask)[0], parameters(model)
    tau = between(base_values(model, ids, mask), before)
    clip(model, [(ids, mask)], tau)
    assert tau * (1 - 1e-4) <= float(values(model, ids, mask).max()) <= tau
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, old[name])}
    assert {name.split(".")[-2] for name in moved} == {"default", "second"}


def test_dropout_is_off_when_run_again_and_no_random_number_is_used():
    model = strong("llama", lora_dropout=0.5)
    ids, mask = batch()
    before = values(model, ids, mask)[0]
    tau = between(base_values(model, ids, mask), before)
    model.train()
    torch.manual_seed(4)
    with LogitTracker(model, tau=tau) as tracker:
        clipper = QKClip(tracker, tau=tau)
        model(input_ids=ids, attention_mask=mask)
        state = torch.get_rng_state()
        clipper.apply()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(m.training for m in model.modules())
    model.eval()
    assert tau * (1 - 1e-4) <= float(values(model, ids, mask).max()) <= tau


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_are_kept_once_and_clipped(reentrant):
    model = strong("llama")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    ids, mask = batch()
    before = values(strong("llama"), ids, mask)[0]
    tau = between(base_values(strong("llama"), ids, mask), before)
    with LogitTracker(model, tau=tau) as tracker:
        clipper = QKClip(tracker, tau=tau)
        loss_of(model, ids, mask).backward()
        assert [len(calls) for calls in tracker.inputs.calls.values()] == [1]
        assert clipper.apply().clipped_heads > 0
    model.eval()
    assert tau * (1 - 1e-4) <= float(values(model, ids, mask).max()) <= tau


def test_an_optimizer_step_and_its_momentum_stay_whole():
    model = strong("llama")
    ids, mask = batch()
    tau = between(base_values(model, ids, mask), values(model, ids, mask))
    trained = [p for p in model.parameters() if p.requires_grad]
    bare = copy.deepcopy(model)
    plain = torch.optim.AdamW([p for p in bare.parameters() if p.requires_grad], lr=1e-3)
    optimizer = with_qk_clip(
        torch.optim.AdamW(trained, lr=1e-3), model, MuonClipConfig(max_qk_score=tau)
    )
    loss_of(model, ids, mask).backward()
    loss_of(bare, ids, mask).backward()
    optimizer.step()
    plain.step()
    assert qk_clip_stats(optimizer).clipped_heads > 0
    for mine, theirs in zip(trained, plain.param_groups[0]["params"], strict=True):
        assert torch.equal(optimizer.state[mine]["exp_avg"], plain.state[theirs]["exp_avg"])
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, ids, mask)
        loss.backward()
        optimizer.step()
    assert bool(loss.isfinite()) and float(values(model, ids, mask).max()) < 1.2 * tau


def test_learning_rate_zero_with_the_wrapper_brings_the_layer_to_tau():
    model = strong("qwen2")
    ids, mask = batch()
    tau = between(base_values(model, ids, mask), values(model, ids, mask))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = MuonClip(torch.optim.SGD(trained, lr=0.0), MuonClipConfig(max_qk_score=tau))
    optimizer.attach(model)
    loss_of(model, ids, mask).backward()
    optimizer.step()
    assert optimizer.last_stats.clipped_heads > 0
    assert tau * (1 - 1e-4) <= float(values(model, ids, mask).max()) <= tau
    optimizer.detach()
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_nothing_is_kept_without_lora_or_when_it_is_only_reported():
    from tests.attention.families import family

    for model, options in ((family("llama"), {}), (strong("llama"), {"lora": "report"})):
        with LogitTracker(model, tau=1.0) as tracker:
            QKClip(tracker, tau=1.0, **options)
            assert not tracker.inputs.armed
            assert not any(m._forward_pre_hooks for m in model.modules())


def test_inputs_are_dropped_at_the_step_and_not_kept_far_from_tau():
    model = strong("llama")
    ids, mask = batch()
    tau = float(values(model, ids, mask).max()) * 4
    with LogitTracker(model, tau=tau) as tracker:
        clipper = QKClip(tracker, tau=tau)
        model(input_ids=ids, attention_mask=mask)
        kept = next(iter(tracker.inputs.calls.values()))
        assert all(
            not t.requires_grad
            for t in (*kept[0].args, *kept[0].kwargs.values())
            if isinstance(t, torch.Tensor)
        )
        clipper.apply()
        assert tracker.inputs.calls == {}
        model(input_ids=ids, attention_mask=mask)
        assert tracker.inputs.calls == {}  # no head was above tau / 2
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(4)
        model(input_ids=ids, attention_mask=mask)
        stats = clipper.apply()
        assert stats.missed_heads > 0 and "inputs were not kept" in stats.unclippable[0]
        model(input_ids=ids, attention_mask=mask)
        assert clipper.apply().clipped_heads > 0


def test_too_many_inputs_are_reported(monkeypatch):
    monkeypatch.setattr("hmpo.attention.inputs.KEEP_INPUT_BYTES", 100)
    model = strong("llama")
    ids, mask = batch()
    old = parameters(model)
    stats = clip(model, [(ids, mask)], middle(values(model, ids, mask)))
    assert stats.missed_heads == 2 and "inputs of attention exceed" in stats.unclippable[0]
    assert all(torch.equal(p, old[name]) for name, p in model.named_parameters())


def test_under_autocast_the_second_run_is_under_autocast_too():
    model = strong("qwen2")
    ids, mask = batch()
    tau = between(base_values(model, ids, mask), values(model, ids, mask))
    with torch.autocast("cpu", torch.bfloat16):
        stats = clip(model, [(ids, mask)], tau)
    with torch.autocast("cpu", torch.bfloat16):  # another one: the first caches the old weights
        after = values(model, ids, mask)
    assert stats.clipped_heads > 0
    assert tau * 0.98 <= float(after.max()) <= tau * 1.01  # bfloat16 has 8 bits


class Int8Linear(torch.nn.Module):
    """A frozen linear layer that keeps its weight in 8 bits, a scale for each row."""

    def __init__(self, linear):
        super().__init__()
        size = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight.detach() / size).round().to(torch.int8))
        self.register_buffer("size", size)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.codes * self.size)


def test_a_quantised_base_needs_nothing_more():
    model = strong("llama")
    for module in model.modules():
        if "lora_A" in dict(module.named_children()):
            module.base_layer = Int8Linear(module.base_layer)
    ids, mask = batch()
    tau = between(base_values(model, ids, mask), values(model, ids, mask))
    stats = clip(model, [(ids, mask)], tau)
    assert stats.clipped_heads > 0 and stats.missed_heads == 0
    assert tau * (1 - 1e-4) <= float(values(model, ids, mask).max()) <= tau


def test_an_adapter_that_two_layers_share_is_reported():
    model = strong("llama", gain=3.0)
    layers = [m for m in model.modules() if "q_proj" in dict(m.named_children())]
    extra = torch.nn.ModuleList([copy.copy(layers[0])])
    model.base_model.model.model.extra = extra  # the same projections under another name
    ids, mask = batch()
    old = parameters(model)
    tau = between(base_values(model, ids, mask), values(model, ids, mask)[0])
    stats = clip(model, [(ids, mask)], tau)
    assert stats.clipped_heads == 0 and stats.missed_heads > 0
    assert "serves other layers too" in stats.unclippable[0]
    assert all(torch.equal(p, old[name]) for name, p in model.named_parameters())


def test_keys_from_an_earlier_call_are_reported():
    model = strong("llama")
    ids, mask = batch()
    with torch.no_grad():
        cache = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
    tau = middle(values(model, ids, mask)) / 2
    with LogitTracker(model, tau=tau) as tracker:
        clipper = QKClip(tracker, tau=tau)
        model(input_ids=ids, past_key_values=cache)
        assert "holds earlier keys" in next(iter(tracker.inputs.lost.values()))
        stats = clipper.apply()
    assert stats.missed_heads > 0 and "holds earlier keys" in stats.unclippable[0]


def test_a_head_that_is_above_tau_by_a_bound_only_is_left_and_counted():
    model = strong("llama")
    ids, mask = batch()
    before, old = values(model, ids, mask), parameters(model)
    tau = float(before.max()) * 1.001
    with LogitTracker(model, tau=tau, source="bound") as tracker:
        clipper = QKClip(tracker, tau=tau)
        model(input_ids=ids, attention_mask=mask)
        stats = clipper.apply()
    assert stats.reread_heads > 0 and stats.clipped_heads == stats.missed_heads == 0
    assert all(torch.equal(p, old[name]) for name, p in model.named_parameters())


def _worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    ids = torch.cat([batch(rows=2, seed=seed)[0] for seed in (1, 5)])
    model, sharded = strong("llama"), strong("llama")
    tau = between(base_values(model, ids), values(model, ids))
    stats = clip(model, [(ids[2 * rank :][:2], None)], tau)
    after = values(model, ids)  # the maximum over the ranks, each of which has seen half
    assert stats.clipped_heads > 0 and stats.missed_heads == 0
    assert tau * (1 - 1e-4) <= float(after.max()) <= tau
    gathered = [torch.empty(0)] * 2
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            gathered = [torch.empty_like(parameter) for _ in range(2)]
            dist.all_gather(gathered, parameter.detach())
            assert torch.equal(*gathered), name
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    with LogitTracker(sharded, tau=tau) as tracker:
        clipper = QKClip(tracker, tau=tau)
        loss_of(sharded, ids[2 * rank :][:2]).backward()
        stats = clipper.apply()
    assert stats.missed_heads > 0 and "LoRA over a frozen base" in stats.unclippable[0], stats
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs the gloo backend")
def test_ranks_agree_on_one_factor_for_both_batches(tmp_path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ConfigError, match="lora"):
        QKClip(LogitTracker(torch.nn.Linear(2, 2)), lora="merge")


def rows(*shape):
    entry = st.floats(-3, 3, width=32)
    count = shape[0] * shape[1]
    return st.lists(entry, min_size=count, max_size=count).map(
        lambda x: torch.tensor(x).view(1, 1, *shape)
    )


@settings(max_examples=60, deadline=None)
@given(rows(4, 2), rows(4, 2), rows(4, 2), rows(4, 2), st.floats(0.05, 12))
def test_the_factor_is_the_largest_that_a_scan_finds_however_the_maximum_moves(q, dq, k, dk, tau):
    call = SplitCall(query=q, query_step=dq, key=k, key_step=dk, mask=None, causal=True, scale=0.7)
    (c,) = largest_factors([call], tau, 1, lambda x: x).tolist()
    lists = [x[0, 0].tolist() for x in (q, dq, k, dk)]

    def largest(factor):
        return largest_logit(*lists, 0.7, factor)

    rounding = 1e-5  # of float32 products of these sizes
    if c >= 0:
        assert largest(c) <= tau * OVER + rounding
    assert scan(largest, tau * AIM - rounding, 400) <= max(c, -1.0) or c == 1.0


def test_a_maximum_that_rises_again_below_one_is_passed_by():
    # One pair is over tau at c = 1 and another on (0.4, 0.8): the answer lies below 0.4.
    call = SplitCall(
        query=torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]]),
        query_step=torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]]),
        key=torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]]),
        key_step=torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]]),
        mask=None,
        causal=True,
        scale=1.0,
    )
    (c,) = largest_factors([call], 1.5, 1, lambda x: x).tolist()  # c (1 + c) = 1.5
    assert c == pytest.approx((7**0.5 - 1) / 2, rel=1e-4)
    assert largest_factors([call], 0.9, 1, lambda x: x).tolist() == [-torch.inf]  # q1 . k0 = 1


def test_last_roots_by_hand():
    a, b, d, c, root = torch.tensor(
        [
            [-1.0, 2.0, 0.0, 1.0, 0.5],  # a line
            [-0.25, 0.0, 1.0, 1.0, 0.5],  # a parabola that rises
            [-0.16, 1.0, -1.0, 0.5, 0.2],  # one that falls again, left of its top
            [-0.16, 1.0, -1.0, 1.0, 0.8],
            [0.5, 0.0, 0.0, 1.0, -torch.inf],  # over everywhere
            [1.0, 0.0, 1.0, 1.0, -torch.inf],
            [0.0, 1.0, 0.0, 1.0, 0.0],
            [0.5, 1.0, 0.0, 1.0, -torch.inf],  # the root is negative
        ],
        dtype=torch.float64,
    ).T
    torch.testing.assert_close(last_root(a, b, d, c), root)
