import copy
import dataclasses
import gc
import io
import logging
import math
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from transformers.models.llama import modeling_llama

from hmpo.attention.tap import listener_count
from hmpo.errors import CheckpointError, ConfigError, ModelError
from hmpo.optim import (
    LogitTracker,
    MuonClip,
    MuonClipConfig,
    QKClip,
    detach_qk_clip,
    discard_qk_readings,
    qk_clip_stats,
    with_qk_clip,
)
from hmpo.optim.muon_clip import _attached
from hmpo.optim.state import clip_lists, clip_metrics
from hmpo.telemetry.lookup import lookup
from tests.optim.tiny import KINDS, attentions, batch, loss_of, make, values

CONFIG = MuonClipConfig(max_qk_score=5.0)


def adamw(model, lr=1e-2):
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)


def wrapped(model, lr=1e-2, config=CONFIG):
    optimizer = MuonClip(adamw(model, lr), config)
    optimizer.attach(model)
    return optimizer


def hooked(model, lr=1e-2, config=CONFIG):
    return with_qk_clip(adamw(model, lr), model, config)


def muon(model, lr=1e-2, config=CONFIG):
    return MuonClip.for_model(model, lr, config=config)


MAKERS = {"wrapped": wrapped, "hooked": hooked, "muon": muon}


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        ids, mask = batch(padding="left", seed=step)
        optimizer.zero_grad()
        loss_of(model, ids, mask).backward()
        optimizer.step()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.fixture(autouse=True, scope="module")
def _fast_collections():
    gc.collect()  # what other tests left in circles would be kept by the next line
    gc.freeze()  # what is imported by now is not searched again after every test
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _nothing_left():
    before = modeling_llama.ALL_ATTENTION_FUNCTIONS["sdpa"]
    yield
    gc.collect()
    assert listener_count() == 0 and not len(_attached)
    assert modeling_llama.ALL_ATTENTION_FUNCTIONS["sdpa"] is before


@pytest.mark.parametrize("maker", ["wrapped", "hooked"])
def test_equals_the_optimizer_then_the_clip(maker):
    model, reference = make("qwen2"), make("qwen2")
    optimizer, plain = MAKERS[maker](model), adamw(reference)
    with LogitTracker(reference, tau=5.0) as tracker:
        clip = QKClip(tracker, tau=5.0)
        for step in range(3):
            train(model, optimizer, 1, step)
            train(reference, plain, 1, step)
            stats = clip.apply()
            assert stats.clipped_heads > 0
            assert qk_clip_stats(optimizer) == stats
            assert same(model, reference)
            moments = (optimizer.state_dict()["state"], plain.state_dict()["state"])
            for mine, theirs in zip(*(m.values() for m in moments), strict=True):
                assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    detach_qk_clip(optimizer)


@pytest.mark.parametrize("maker", MAKERS)
def test_infinite_patience_equals_the_bare_optimizer(maker):
    config = MuonClipConfig(max_qk_score=1e30)
    model, reference = make(), make()
    optimizer = MAKERS[maker](model, config=config)
    plain = MuonClip.for_model(reference, 1e-2).base if maker == "muon" else adamw(reference)
    train(model, optimizer, 3)
    train(reference, plain, 3)
    assert same(model, reference)
    assert qk_clip_stats(optimizer).clipped_heads == 0


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("kind", KINDS)
def test_first_step_monitored(kind, maker):
    model = make(kind, num_hidden_layers=1)
    before = values(model, *batch(padding="left", seed=0))
    optimizer = MAKERS[maker](model, lr=0.0)
    train(model, optimizer, 1)
    stats = qk_clip_stats(optimizer)
    assert stats.max_logit == pytest.approx(float(before.max()), rel=1e-5) and before.max() > 5.0
    after = values(model, *batch(padding="left", seed=0))
    torch.testing.assert_close(after, before.clamp_max(5.0), rtol=1e-4, atol=0)


def test_model_given_to_step_is_read_from_then_on(caplog):
    model = make()
    optimizer = MuonClip(adamw(model), CONFIG)
    with caplog.at_level(logging.WARNING):
        train(model, optimizer, 2)
    assert caplog.text.count("without a model") == 1 and optimizer.last_stats is None
    optimizer.step(model=model)
    assert optimizer.last_stats.unread_heads == optimizer.last_stats.heads == 8
    ids, _ = batch()
    loss_of(model, ids).backward()
    optimizer.step(model=model)
    assert optimizer.last_stats.clipped_heads > 0 and optimizer.last_stats.unread_heads == 0


def test_readings_span_the_micro_batches_of_a_step():
    model, whole = make(), make()
    optimizer, other = hooked(model, lr=0.0), hooked(whole, lr=0.0)
    ids, mask = batch(rows=4, padding="right")
    loss_of(whole, ids, mask).backward()
    other.step()
    for rows in (slice(0, 2), slice(2, 4)):
        loss_of(model, ids[rows], mask[rows]).backward()
    optimizer.step()
    for a, b in zip(attentions(model), attentions(whole), strict=True):
        torch.testing.assert_close(a.q_proj.weight, b.q_proj.weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("maker", MAKERS)
def test_resume_exact(maker):
    straight = make("qwen2")
    train(straight, MAKERS[maker](straight), 4)

    model = make("qwen2")
    optimizer = MAKERS[maker](model)
    train(model, optimizer, 2)
    ids, mask = batch(padding="left", seed=2)
    optimizer.zero_grad()
    loss_of(model, ids, mask).backward()  # stop between the backward pass and the step
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    resumed = make("qwen2", seed=9)
    resumed.load_state_dict(saved["model"])
    second = MAKERS[maker](resumed, lr=0.5)
    second.load_state_dict(saved["optimizer"])
    assert qk_clip_stats(second) == qk_clip_stats(optimizer)
    assert second.param_groups[0]["lr"] == 1e-2
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        b.grad = None if a.grad is None else a.grad.clone()
    second.step()
    train(resumed, second, 1, 3)
    assert same(straight, resumed)


def test_state_waits_for_the_model():
    model = make()
    optimizer = wrapped(model)
    train(model, optimizer, 1)
    state = optimizer.state_dict()
    later = MuonClip(adamw(model), CONFIG)
    later.load_state_dict(state)
    assert later.state_dict()["qk_clip"] == state["qk_clip"] or later.last_stats is None
    later.attach(model)
    assert later.last_stats == optimizer.last_stats


def test_bare_state_loads_and_foreign_state_is_refused():
    model, other = make(), make(num_hidden_layers=1)
    bare = adamw(model)
    train(model, bare, 1)
    optimizer = wrapped(model)
    optimizer.load_state_dict(bare.state_dict())
    assert optimizer.state[next(model.parameters())]["step"] == 1
    with pytest.raises(CheckpointError, match="layers"):
        wrapped(other).load_state_dict(optimizer.state_dict())


def test_state_is_plain():
    model = make()
    optimizer = hooked(model)
    train(model, optimizer, 1)

    def check(value):
        if isinstance(value, dict):
            assert all(type(key) in (str, int) for key in value)
            return all(map(check, value.values()))
        if isinstance(value, list):
            return all(map(check, value))
        assert value is None or type(value) in (int, float, str, torch.Tensor)
        return True

    assert check(optimizer.state_dict()["qk_clip"])


@pytest.mark.parametrize("maker", MAKERS)
def test_step_applied_once_on_error(maker, monkeypatch):
    model = make()
    optimizer = MAKERS[maker](model)
    steps = []
    base = optimizer.base if isinstance(optimizer, MuonClip) else optimizer
    base.register_step_pre_hook(lambda *_: steps.append(1))
    ids, _ = batch()
    loss_of(model, ids).backward()

    def broken(self):
        raise TypeError("inside the clip")

    monkeypatch.setattr(QKClip, "apply", broken)
    with pytest.raises(TypeError, match="inside the clip"):
        optimizer.step()
    assert steps == [1]


def test_error_in_the_base_step_surfaces_and_nothing_is_clipped():
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            raise TypeError("inside the step")

    model = make()
    optimizer = MuonClip(Broken(model.parameters(), lr=1.0), CONFIG)
    reference = copy.deepcopy(model)
    ids, _ = batch()
    optimizer.attach(model)
    loss_of(model, ids).backward()
    with pytest.raises(TypeError, match="inside the step"):
        optimizer.step(model=model)
    assert same(model, reference) and optimizer.last_stats is None


def test_muonclip_failure_is_loud():
    model = make()
    for settings in (
        {"max_qk_score": 0.0},
        {"max_qk_score": math.nan},
        {"alpha": 2.0},
    ):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            MuonClipConfig(**settings)
    for settings in (
        {"gqa": "min"},
        {"source": "flash"},
        {"scale_frozen": 1},
    ):  # past the tests' type checker
        fields = SimpleNamespace(**dataclasses.asdict(CONFIG) | settings)
        with pytest.raises(ConfigError, match=next(iter(settings))):
            MuonClipConfig.__post_init__(fields)
    with pytest.raises(ConfigError, match="with_qk_clip"):
        MuonClip(hooked(model), CONFIG)
    optimizer = wrapped(model)
    with pytest.raises(ConfigError, match="base_optimizer"):
        MuonClip(optimizer, CONFIG)
    with pytest.raises(ModelError, match="second model"):
        optimizer.attach(make())
    with pytest.raises(ModelError, match="second model"):
        with_qk_clip(hooked(model), make(), CONFIG)
    with pytest.raises(ConfigError, match="config"):
        with_qk_clip(optimizer, model, MuonClipConfig(max_qk_score=7.0))


def test_no_hook_leak():
    model = make()
    optimizer = adamw(model)
    before = copy.copy(optimizer.__dict__)
    for tau in (5.0, 5.0, 6.0):
        assert with_qk_clip(optimizer, model, MuonClipConfig(max_qk_score=tau)) is optimizer
        assert len(optimizer._optimizer_step_post_hooks) == 1
        assert listener_count() == 2, "one for each layer"
    train(model, optimizer, 1)
    assert qk_clip_stats(optimizer) is not None
    detach_qk_clip(optimizer)
    detach_qk_clip(optimizer)
    assert qk_clip_stats(optimizer) is None and listener_count() == 0
    for name in before:
        if name.endswith("_hooks"):
            assert not optimizer.__dict__[name]
    for _ in range(3):
        wrapped(model)
    gc.collect()
    assert listener_count() == 0


def test_nothing_keeps_model_or_optimizer_alive():
    model = make()
    optimizer = hooked(model)
    train(model, optimizer, 1)
    gone = weakref.ref(model), weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_with_qk_clip_attaches_a_muonclip():
    model = make()
    optimizer = MuonClip(adamw(model), CONFIG)
    assert with_qk_clip(optimizer, model, CONFIG) is optimizer
    train(model, optimizer, 1)
    assert qk_clip_stats(optimizer) is optimizer.last_stats is not None
    detach_qk_clip(optimizer)
    assert optimizer.last_stats is None


def test_optimizer_protocol():
    model = make()
    optimizer = wrapped(model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state
    assert optimizer.defaults is optimizer.base.defaults
    extra = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert optimizer.base.param_groups[-1]["lr"] == 0.5
    extra.grad = torch.ones(2)
    optimizer.zero_grad()
    assert extra.grad is None
    assert "lr: 0.5" in repr(optimizer)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(optimizer.last_stats))
    ids, _ = batch()

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.requires_grad and seen[0].clipped_heads > 0


@pytest.mark.parametrize("maker", MAKERS)
def test_schedulers(maker):
    model = make()
    optimizer = MAKERS[maker](model)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4),
        ],
        milestones=[2],
    )
    rates = []
    for step in range(4):
        train(model, optimizer, 1, step)
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step()
    assert rates[0] == pytest.approx(1e-3) and rates[2] == pytest.approx(1e-2)
    assert rates[3] < rates[2]
    assert qk_clip_stats(optimizer).heads == 8


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("maker", ["wrapped", "hooked"])
def test_step_skipped_by_the_scaler_is_not_clipped(maker, fused):
    model = make()
    base = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    optimizer = with_qk_clip(MuonClip(base, CONFIG) if maker == "wrapped" else base, model, CONFIG)
    scaler = GradScaler("cpu", init_scale=8.0)
    reference = copy.deepcopy(model)
    ids, _ = batch()
    scaler.scale(loss_of(model, ids)).backward()
    next(model.parameters()).grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert same(model, reference) and qk_clip_stats(optimizer) is None
    if fused and maker == "hooked":  # the optimizer was called, so its clip knows of the skip
        readings = optimizer.state_dict()["qk_clip"]["readings"]
        assert all((layer["exact"] == -math.inf).all() for layer in readings.values())
    optimizer.zero_grad()
    scaler.scale(loss_of(model, ids)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not same(model, reference) and qk_clip_stats(optimizer).clipped_heads > 0
    detach_qk_clip(optimizer)


@pytest.mark.parametrize("maker", MAKERS)
def test_readings_of_a_step_left_out_are_discarded(maker):
    model, reference = make(), make()
    optimizer, other = MAKERS[maker](model, lr=0.0), MAKERS[maker](reference, lr=0.0)
    with torch.no_grad():
        attentions(model)[0].q_proj.weight.mul_(10)
    loss_of(model, batch()[0]).backward()  # not finite, say: this step is left out
    with torch.no_grad():
        attentions(model)[0].q_proj.weight.div_(10)
    discard_qk_readings(optimizer)
    discard_qk_readings(adamw(reference))  # nothing to discard
    for m, o in ((model, optimizer), (reference, other)):
        train(m, o, 1)
    assert qk_clip_stats(optimizer).max_logit == pytest.approx(qk_clip_stats(other).max_logit)


@pytest.mark.parametrize("maker", MAKERS)
def test_pickle_without_the_model(maker):
    model = make()
    optimizer = MAKERS[maker](model)
    train(model, optimizer, 1)
    copied = pickle.loads(pickle.dumps(optimizer))
    assert type(copied) is type(optimizer)
    assert qk_clip_stats(copied) is None and listener_count() == 2
    assert copied.param_groups[0]["lr"] == 1e-2
    if maker != "hooked":
        assert copied.config == CONFIG
        copied.attach(model)
        assert copied.last_stats == optimizer.last_stats
        copied.detach()


@pytest.mark.parametrize("maker", ["wrapped", "hooked"])
def test_model_without_attention_trains(maker):
    model, reference = nn.Linear(3, 2), nn.Linear(3, 2)
    reference.load_state_dict(model.state_dict())
    optimizer, plain = MAKERS[maker](model), adamw(reference)
    for m, o in ((model, optimizer), (reference, plain)):
        m(torch.ones(1, 3)).sum().backward()
        o.step()
    assert same(model, reference)
    stats = qk_clip_stats(optimizer)
    assert stats.heads == 0 and math.isnan(stats.max_logit) and stats.max_by_layer == {}
    state = pickle.loads(pickle.dumps(optimizer.state_dict()))
    optimizer.load_state_dict(state)


def test_clip_holds_the_logits_under_a_violent_optimizer():
    free, held = make(gain=1.0), make(gain=1.0)
    config = MuonClipConfig(max_qk_score=4.0)
    loose = MuonClip.for_model(free, 0.3, config=MuonClipConfig(max_qk_score=1e9))
    tight = MuonClip.for_model(held, 0.3, config=config)
    train(free, loose, 40)
    train(held, tight, 40)
    assert loose.last_stats.max_logit > 100
    assert tight.last_stats.max_logit < 40


def test_telemetry_of_a_clip():
    model = make()
    optimizer = hooked(model)
    assert clip_metrics(optimizer) == {} == clip_lists(optimizer)
    train(model, optimizer, 1)
    stats = qk_clip_stats(optimizer)
    metrics, lists = clip_metrics(optimizer), clip_lists(optimizer)
    assert metrics["qk/clipped_heads"] == stats.clipped_heads > 0
    assert metrics["qk/unread"] == 0 == metrics["qk/fallbacks"]
    settled = {name: n for name, n in metrics.items() if name.startswith("qk/tier/")}
    assert len(settled) == 4 and sum(settled.values()) >= stats.heads == 8
    assert len(lists["qk/max_by_layer"]) == 2 and len(lists["qk/max_by_head"]) == 8
    assert max(lists["qk/max_by_head"]) == stats.max_logit == max(lists["qk/max_by_layer"])
    assert stats.seconds > 0
    for name in {**metrics, **lists}:
        assert lookup(name) is not None
    again = type(stats).from_state(stats.state())
    assert again == stats and again.seconds == 0.0  # a clock is no part of a run's state
