import copy
import gc
import logging

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.models.llama import modeling_llama

from hmpo.attention import readings
from hmpo.attention.tap import attend, listener_count
from hmpo.attention.tracker import LogitTracker
from hmpo.errors import CheckpointError, ConfigError
from tests.optim.tiny import KINDS, attentions, batch, loss_of, make, middle
from tests.oracles.attention_logits import max_logits, model_max_logits

INTERFACE = modeling_llama.ALL_ATTENTION_FUNCTIONS


def read(tracker):
    return {name: r.value for name, r in tracker.consume().items()}


def assert_matches(found, oracle, rtol=1e-5):
    assert list(found) == list(oracle)
    for name in oracle:
        assert_close(found[name].double(), oracle[name], rtol=rtol, atol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [None, "ones", "left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_max_logit_equals_attention_logits(kind, padding, attention):
    model = make(kind, attention=attention)
    ids, mask = batch(padding=padding)
    mask = None if padding is None else mask
    oracle = model_max_logits(model, ids, mask)
    with LogitTracker(model, source="exact") as tracker:
        model(input_ids=ids, attention_mask=mask)
        found = tracker.consume()
    assert all(r.exact.all() for r in found.values())
    assert_matches({n: r.value for n, r in found.items()}, oracle)


def test_padding_would_matter():
    # The largest logit of the unpadded batch lies on tokens that the mask hides.
    model = make()
    ids, mask = batch(padding="left")
    hidden, full = model_max_logits(model, ids, mask), model_max_logits(model, ids)
    assert any((hidden[name] < full[name] - 0.1).any() for name in full)


def test_gqa_monitored():
    model = make("llama", num_key_value_heads=1)
    ids, _ = batch()
    oracle = model_max_logits(model, ids)
    with LogitTracker(model) as tracker:
        model(input_ids=ids)
        found = read(tracker)
    assert found["model.layers.0.self_attn"].shape == (4,)
    assert len(set(found["model.layers.0.self_attn"].tolist())) == 4
    assert_matches(found, oracle)


def test_hook_order_independent():
    # Reading happens where attention is computed, so the order of q_proj and k_proj is nothing.
    model = make()
    ids, _ = batch()
    layer = attentions(model)[0]
    order = []
    layer.q_proj.register_forward_hook(lambda *_: order.append("q"))
    layer.k_proj.register_forward_hook(lambda *_: order.append("k"))
    oracle = model_max_logits(model, ids)
    forward = type(layer).forward

    def keys_first(self, hidden_states, **kwargs):
        cached = self.k_proj(hidden_states)
        original, self.k_proj.forward = self.k_proj.forward, lambda _: cached
        try:
            return forward(self, hidden_states, **kwargs)
        finally:
            self.k_proj.forward = original

    layer.forward = keys_first.__get__(layer)
    with LogitTracker(model) as tracker:
        order.clear()
        model(input_ids=ids)
        assert order[0] == "k"
        assert_matches(read(tracker), oracle)


@pytest.mark.parametrize("source", ["auto", "lse", "exact", "bound"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_bit_identical(kind, attention, source):
    model = make(kind, attention=attention)
    ids, mask = batch(padding="left")

    def run():
        model.zero_grad()
        loss = loss_of(model, ids, mask)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    plain = run()
    with LogitTracker(model, tau=5.0, source=source):
        tracked = run()
    assert all(torch.equal(a, b) for a, b in zip(plain, tracked, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing(reentrant):
    model = make().train()
    ids, mask = batch(padding="right")
    oracle = model_max_logits(model, ids, mask)
    loss_of(model, ids, mask).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with LogitTracker(model) as tracker:
        loss_of(model, ids, mask).backward()
        assert_matches(read(tracker), oracle)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_passes_without_gradients_are_ignored():
    model = make()
    ids, _ = batch()
    with LogitTracker(model) as tracker:
        with torch.no_grad():
            model(input_ids=ids)
        with torch.inference_mode():
            model(input_ids=ids)
        model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
        assert all((v == -torch.inf).all() for v in read(tracker).values())


def test_accumulation_equals_concatenation():
    model = make()
    ids, mask = batch(rows=6, padding="left")
    with LogitTracker(model) as tracker:
        model(input_ids=ids, attention_mask=mask)
        whole = read(tracker)
        for part in range(3):
            rows = slice(2 * part, 2 * part + 2)
            model(input_ids=ids[rows], attention_mask=mask[rows])
        parts = read(tracker)
        assert all((v == -torch.inf).all() for v in read(tracker).values())
    for name in whole:
        assert_close(whole[name], parts[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_inputs_are_compared_in_float32(autocast):
    model = make(dtype=torch.float32 if autocast else torch.bfloat16)
    ids, _ = batch()
    seen = {}
    original = INTERFACE["sdpa"]

    def spy(module, query, key, *args, **kwargs):
        seen[module] = query.detach(), key.detach()
        return original(module, query, key, *args, **kwargs)

    INTERFACE["sdpa"] = spy
    try:
        with LogitTracker(model) as tracker:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                model(input_ids=ids)
            found = read(tracker)
    finally:
        del INTERFACE["sdpa"]
    keep = torch.ones_like(ids, dtype=torch.bool)
    for value, (query, key) in zip(found.values(), seen.values(), strict=True):
        oracle = max_logits(query, key, keep, query.shape[-1] ** -0.5)
        assert_close(value.double(), oracle, rtol=1e-6, atol=0)


def test_auto_is_exact_or_certified(monkeypatch):
    monkeypatch.setattr(readings, "CHEAP_SCORES", 0)
    model = make()
    ids, mask = batch(padding="left")
    oracle = model_max_logits(model, ids, mask)
    tau = middle(torch.cat(list(oracle.values())))
    with LogitTracker(model, tau=tau) as tracker:
        model(input_ids=ids, attention_mask=mask)
        found = tracker.consume()
    kinds = set()
    for name, reading in found.items():
        kinds |= set(reading.exact.tolist())
        truth = oracle[name]
        exact = reading.exact
        assert_close(reading.value[exact].double(), truth[exact], rtol=1e-5, atol=0)
        assert (reading.value[~exact] <= tau).all()
        assert (reading.value[~exact] >= truth[~exact]).all()
    assert True in kinds


@pytest.mark.parametrize("keep_bytes", [1 << 20, 0])
def test_deferred_reading_equals_immediate(monkeypatch, keep_bytes):
    model = make()
    ids, mask = batch(padding="right")
    monkeypatch.setattr(readings, "CHEAP_SCORES", 0)
    with LogitTracker(model, tau=3.0) as tracker:
        model(input_ids=ids, attention_mask=mask)
        expected = tracker.consume()
    monkeypatch.setattr(readings, "host_reads_are_free", lambda device: False)
    monkeypatch.setattr(readings, "KEEP_BYTES", keep_bytes)
    with LogitTracker(model, tau=3.0) as tracker:
        for _ in range(2):
            model(input_ids=ids, attention_mask=mask)
            kept = [r.kept for r in tracker._readings.values()]
            assert all(kept) if keep_bytes else not any(kept)
            found = tracker.consume()
            assert not any(r.kept for r in tracker._readings.values())
            for name in expected:
                # Blocks of other rows are multiplied: equal but for rounding.
                assert_close(found[name].value, expected[name].value, rtol=1e-6, atol=0)
                assert torch.equal(found[name].exact, expected[name].exact)
        assert next(iter(tracker._readings.values())).budget.left == keep_bytes


def test_bound_source_is_never_below():
    model = make()
    ids, mask = batch(padding="left")
    oracle = model_max_logits(model, ids, mask)
    with LogitTracker(model, source="bound") as tracker:
        model(input_ids=ids, attention_mask=mask)
        for name, reading in tracker.consume().items():
            assert not reading.exact.any()
            assert (reading.value.double() >= oracle[name]).all()


@pytest.fixture
def untapped():
    """Trackers that earlier tests left as garbage are gone before a test looks at the table."""
    gc.collect()


def test_close_ends_the_reading_of_its_own_model_alone():
    first, second = make(), make(seed=3)
    a, b = LogitTracker(first), LogitTracker(second)
    a.close()
    a.close()
    ids, _ = batch()
    first(input_ids=ids)
    second(input_ids=ids)
    assert all((v == -torch.inf).all() for v in read(a).values())
    assert all(v.isfinite().all() for v in read(b).values())
    b.close()
    assert not any("forward" in vars(m) for m in [*first.modules(), *second.modules()])
    assert listener_count() == 0


def test_second_model_untouched():
    tracked, other = make(seed=0), make(seed=1)
    ids, _ = batch()
    oracle = model_max_logits(tracked, ids)
    with LogitTracker(tracked) as tracker:
        other(input_ids=ids)
        copy.deepcopy(tracked)(input_ids=ids)
        assert all((v == -torch.inf).all() for v in read(tracker).values())
        tracked(input_ids=ids)
        assert_matches(read(tracker), oracle)


@pytest.mark.usefixtures("untapped")
def test_dropped_tracker_and_model_leave_nothing():
    model = make()
    tracker = LogitTracker(model)
    del tracker
    gc.collect()
    assert "forward" not in vars(attentions(model)[0]) and listener_count() == 0
    tracker = LogitTracker(model)
    del model
    gc.collect()
    assert tracker.model is None and listener_count() == 0
    tracker.close()


def test_implementation_may_change_at_run_time():
    model = make(attention="sdpa")
    ids, mask = batch(padding="left")
    oracle = model_max_logits(model, ids, mask)
    with LogitTracker(model) as tracker:
        model.set_attn_implementation("eager")
        model(input_ids=ids, attention_mask=mask)
        assert_matches(read(tracker), oracle)


def test_model_without_sites(caplog):
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    with caplog.at_level(logging.WARNING), LogitTracker(model) as tracker:
        model(torch.tensor([1, 2]))
        assert tracker.consume() == {}
    assert "no attention found" in caplog.text


def test_unreadable_attention_is_named(caplog):
    model = make()
    model.config._attn_implementation = "flex_attention"
    with caplog.at_level(logging.WARNING), LogitTracker(model) as tracker:
        assert not tracker.sites
    assert len(tracker.unread) == 2
    assert "flex_attention" in tracker.unread[0] and "sdpa" in tracker.unread[0]
    assert tracker.unread[0] in caplog.text


def test_nan_is_reported_not_hidden():
    model = make()
    ids, _ = batch()
    with torch.no_grad():
        attentions(model)[1].q_proj.weight[:8].fill_(torch.nan)
    with LogitTracker(model) as tracker:
        model(input_ids=ids)
        value = read(tracker)["model.layers.1.self_attn"]
    assert value.isnan().tolist() == [True, False, False, False]


def test_settings_are_checked():
    model = make()
    with pytest.raises(ConfigError, match="tau"):
        LogitTracker(model, tau=0.0)
    with pytest.raises(ConfigError, match="source"):
        LogitTracker(model, source="flash")


def test_state_round_trip_and_mismatch():
    model = make()
    ids, _ = batch()
    with LogitTracker(model) as tracker, LogitTracker(make(num_hidden_layers=1)) as other:
        model(input_ids=ids)
        state = tracker.state_dict()
        expected = read(tracker)
        tracker.load_state_dict(state)
        assert_matches(read(tracker), {n: v.double() for n, v in expected.items()}, rtol=0)
        with pytest.raises(CheckpointError, match="layers"):
            other.load_state_dict(state)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_a_mask_sdpa_is_causal_and_eager_is_not(attention):
    model = make(attention=attention)
    layer = attentions(model)[0]
    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    function = {"sdpa": lambda: INTERFACE["sdpa"], "eager": eager_function}[attention]
    with LogitTracker(model) as tracker:
        called = attend(function, attention == "eager")
        out, _ = called(layer, query, key, key, None, scaling=0.3)
        found = read(tracker)["model.layers.0.self_attn"]
    first_row_sees_one_key = torch.allclose(out[:, 0, 0], key[:, 0, 0])
    assert first_row_sees_one_key == (attention == "sdpa")
    keep = torch.ones(2, 6, dtype=torch.bool)
    oracle = max_logits(query, key, keep, 0.3, causal=attention == "sdpa")
    assert_close(found.double(), oracle, rtol=1e-5, atol=1e-6)


def eager_function():
    return modeling_llama.eager_attention_forward
