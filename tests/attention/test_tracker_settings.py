"""The tracker inside compiled graphs, over ranks, and under every kind of mask."""

import gc

import pytest
import torch
from torch.testing import assert_close

from hmpo.attention import readings
from hmpo.attention.tap import listen, listener_count
from hmpo.attention.tracker import LogitTracker
from tests.optim.tiny import attentions, batch, loss_of, make, middle
from tests.oracles.attention_logits import max_logits, model_max_logits
from tests.ranks.processes import run_script


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def read(tracker):
    return {name: r.value for name, r in tracker.consume().items()}


def gradients(model, ids, run):
    model.zero_grad()
    loss = run(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_compiled_without_a_graph_break(attention):
    model = make(attention=attention, num_hidden_layers=1)
    ids, _ = batch()
    oracle = model_max_logits(model, ids)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    plain = gradients(model, ids, compiled)
    with LogitTracker(model, tau=3.0) as tracker:
        tracked = gradients(model, ids, compiled)
        found = read(tracker)
        with torch.no_grad():
            compiled(input_ids=ids, labels=ids, use_cache=False)
        assert all((v == -torch.inf).all() for v in read(tracker).values())
    assert all(torch.equal(a, b) for a, b in zip(plain, tracked, strict=True))
    for name, value in found.items():
        assert_close(value.double(), oracle[name], rtol=1e-5, atol=0)
    compiled(input_ids=ids, labels=ids, use_cache=False)  # the closed tracker hears nothing
    assert all((v == -torch.inf).all() for v in read(tracker).values())


@pytest.mark.usefixtures("compiler")
def test_compiled_auto_is_certified_or_exact(monkeypatch):
    monkeypatch.setattr(readings, "CHEAP_SCORES", 0)
    model = make()
    ids, mask = batch(padding="left")
    oracle = model_max_logits(model, ids, mask)
    tau = middle(torch.cat(list(oracle.values())))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with LogitTracker(model, tau=tau) as tracker:
        compiled(input_ids=ids, attention_mask=mask, use_cache=False)
        found = tracker.consume()
    for name, reading in found.items():
        assert (reading.value.double() >= oracle[name] * (1 - 1e-6)).all()
        assert reading.exact[reading.value > tau].all()


def test_compiled_calls_are_never_kept(monkeypatch):
    # A compiler overwrites what its graph no longer needs.
    monkeypatch.setattr(readings, "host_reads_are_free", lambda device: False)
    model = make()
    layer = attentions(model)[0]
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    with LogitTracker(model, tau=1e-3) as tracker:
        arguments = query, key, None, torch.zeros(1), 0.5, True, id(layer)
        torch.ops.hmpo.observe_logits(*arguments)
        assert not any(r.kept for r in tracker._readings.values())
        value = read(tracker)["model.layers.0.self_attn"]
    keep = torch.ones(1, 6, dtype=torch.bool)
    assert_close(value.double(), max_logits(query, key, keep, 0.5), rtol=1e-5, atol=1e-6)


def test_module_that_dies_is_forgotten():
    model = make(num_hidden_layers=1)
    before = listener_count()
    tracker = LogitTracker(model)
    assert listener_count() == before + 1
    del model
    gc.collect()
    assert listener_count() == before
    tracker.close()


RANKS = """
    import sys, torch, torch.distributed as dist
    from hmpo.optim import LogitTracker
    from tests.optim.tiny import batch, make

    rank, store = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    model, one = make(), make()
    ids, mask = batch(rows=4, padding="left")
    with LogitTracker(one) as tracker:
        one(input_ids=ids[:2], attention_mask=mask[:2])
        first = tracker.consume()
        one(input_ids=ids[2:], attention_mask=mask[2:])
        second = tracker.consume()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    reductions, reduce = [], dist.all_reduce
    dist.all_reduce = lambda *a, **k: (reductions.append(1), reduce(*a, **k))[1]
    mine = slice(0, 2) if rank == 0 else slice(2, 4)
    with LogitTracker(model) as tracker:
        model(input_ids=ids[mine], attention_mask=mask[mine])
        both = tracker.consume()
        assert len(reductions) == 1, reductions
        for name in both:
            expected = torch.maximum(first[name].value, second[name].value)
            assert torch.allclose(both[name].value, expected, rtol=1e-6)
        if rank == 0:  # rank 1 has no data
            model(input_ids=ids[:2], attention_mask=mask[:2])
        alone = tracker.consume()
        for name in alone:
            assert torch.allclose(alone[name].value, first[name].value, rtol=1e-6)
        layer = model.model.layers[0].self_attn
        if rank == 1:
            with torch.no_grad():
                layer.q_proj.weight[:8].fill_(torch.nan)
        model(input_ids=ids[mine], attention_mask=mask[mine])
        nan = tracker.consume()["model.layers.0.self_attn"].value
        assert nan.isnan().tolist() == [True, False, False, False], nan
        assert all((r.value == -torch.inf).all() for r in tracker.consume().values())
    dist.barrier()
    dist.destroy_process_group()
"""


def test_two_ranks_share_one_reduction(tmp_path):
    run_script(RANKS, tmp_path)


def test_sliding_window_hides_what_is_behind_it():
    model = make("mistral", sliding_window=4)
    ids, mask = batch(padding="left")
    calls = []
    end = listen(attentions(model)[0], calls.append)
    found = {}
    for source in ("exact", "lse"):
        with LogitTracker(model, source=source) as tracker:
            model(input_ids=ids, attention_mask=mask)
            found[source] = read(tracker)["model.layers.0.self_attn"]
    end()
    call, keep = calls[0], mask.bool()
    distance = torch.arange(10)[:, None] - torch.arange(10)
    pairs = (distance >= 0) & keep[:, None] & keep[:, :, None]
    scores = call.query @ call.key.repeat_interleave(2, 1).mT * call.scale
    full = scores.masked_fill(~pairs[:, None], -torch.inf).amax((0, 2, 3))
    hidden = ~(pairs & (distance < 4))[:, None]
    truth = scores.masked_fill(hidden, -torch.inf).amax((0, 2, 3))
    assert (full > truth + 0.1).any(), "the window has to matter here"
    assert_close(found["exact"], truth, rtol=1e-5, atol=0)
    assert (found["lse"] >= truth).all() and (found["lse"] < truth + 1.5).all()


def test_packed_sequences_do_not_see_each_other():
    model = make()
    ids, _ = batch(rows=1, length=12)
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    with LogitTracker(model, source="exact") as tracker:
        model(input_ids=ids, position_ids=positions, use_cache=False)
        packed = read(tracker)
        model(input_ids=ids[:, :7], use_cache=False)
        model(input_ids=ids[:, 7:], use_cache=False)
        apart = read(tracker)
        model(input_ids=ids, use_cache=False)
        whole = read(tracker)
    for name in packed:
        assert_close(packed[name], apart[name], rtol=1e-4, atol=1e-5)
    assert any((whole[name] > packed[name] + 0.1).any() for name in whole)


def test_softcap_is_read_before_the_cap():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=48,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=32,
            attn_logit_softcapping=2.0,
            attn_implementation="eager",
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        for layer in attentions(model):
            layer.q_proj.weight.mul_(300)
    ids, mask = batch(padding="right")
    oracle = model_max_logits(model, ids, mask)
    with LogitTracker(model) as tracker:
        loss_of(model, ids, mask)
        found = read(tracker)
    assert max(float(v.max()) for v in found.values()) > 2.0
    for name, value in found.items():
        assert_close(value.double(), oracle[name], rtol=1e-4, atol=0)
