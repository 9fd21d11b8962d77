"""Float32 copies of bfloat16 weights: what a step does to them, clips, checkpoints, closures."""

import copy
import gc
import io
import math
import weakref

import pytest
import torch
from torch import nn

from hmpo.config import OptimizerConfig
from hmpo.errors import CheckpointError, ConfigError
from hmpo.optim import MuonClipConfig, qk_clip_stats, with_qk_clip
from hmpo.optim.masters import masters_of, with_masters
from hmpo.run.build import build_optimizer
from tests.models.families import family

OPTIMIZERS = {
    "adamw": OptimizerConfig(lr=1e-3, weight_decay=0.1),
    "sgd": OptimizerConfig(name="sgd", lr=1e-3, momentum=0.9, weight_decay=0.1),
    "muon": OptimizerConfig(name="muon", lr=1e-3, weight_decay=0.1, muon_dtype="float32"),
}
IDS = torch.arange(14).view(2, 7)


def narrow() -> nn.Module:
    return family("llama").to(torch.bfloat16)


def set_gradients(model: nn.Module, step: int) -> None:
    """Gradients that bfloat16 holds exactly, equal for any two models alike."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(p.dtype)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_are_those_of_a_float32_model_rounded(name):
    model = narrow()
    wide = copy.deepcopy(model).float()
    optimizer, other = (build_optimizer(m, OPTIMIZERS[name]) for m in (model, wide))
    before = [p.clone() for p in model.parameters()]
    for step in range(5):
        for m, o in ((model, optimizer), (wide, other)):
            set_gradients(m, step)
            o.step()
    masters = masters_of(optimizer)
    assert masters is not None and masters_of(other) is None
    for p, q, old in zip(model.parameters(), wide.parameters(), before):
        assert p.dtype == torch.bfloat16 and p.grad.dtype == torch.bfloat16
        assert torch.equal(masters(p), q.detach()), "the same operations on the same numbers"
        assert torch.equal(p.detach(), q.detach().bfloat16())
        assert not torch.equal(p, old)
    floats = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    assert {v.dtype for v in floats} <= {torch.float32}


def test_steps_too_small_for_bfloat16_add_up():
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    plain = nn.Parameter(weight.detach().clone())
    optimizer = with_masters(torch.optim.SGD([weight], lr=2**-12))
    other = torch.optim.SGD([plain], lr=2**-12)
    for _ in range(64):
        for p, o in ((weight, optimizer), (plain, other)):
            p.grad = torch.ones_like(p)
            o.step()
    assert (plain == 1).all(), "each step rounds away"
    assert (weight == 1 - 64 * 2**-12).all()


def test_storage_stays_the_models_own():
    model = narrow()
    optimizer = build_optimizer(model, OPTIMIZERS["adamw"])
    places = [p.data_ptr() for p in model.parameters()]
    set_gradients(model, 0)
    optimizer.step()
    assert [p.data_ptr() for p in model.parameters()] == places


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clip", [False, True])
def test_a_state_in_between_goes_on_to_the_bit(name, clip):
    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = narrow()
        optimizer = build_optimizer(model, OPTIMIZERS[name])
        if clip:
            with_qk_clip(optimizer, model, MuonClipConfig(max_qk_score=0.01))
        return model, optimizer

    def steps(model, optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            optimizer.zero_grad()
            model(IDS)
            set_gradients(model, step)
            optimizer.step()

    model, optimizer = made()
    steps(model, optimizer, 0, 3)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    steps(model, optimizer, 3, 6)
    again, other = made()
    file.seek(0)
    weights, state = torch.load(file, weights_only=False)
    again.load_state_dict(weights)
    other.load_state_dict(state)
    floats = [v for s in other.state.values() for v in s.values() if torch.is_tensor(v)]
    assert torch.bfloat16 not in {v.dtype for v in floats}
    steps(again, other, 3, 6)
    for p, q in zip(model.parameters(), again.parameters()):
        assert torch.equal(p, q)
        assert torch.equal(masters_of(optimizer)(p), masters_of(other)(q))
    assert not clip or qk_clip_stats(optimizer).clipped_heads > 0


def test_qk_clip_scales_weights_and_copies_alike():
    model = narrow()
    optimizer = build_optimizer(model, OPTIMIZERS["sgd"])
    with_qk_clip(optimizer, model, MuonClipConfig(max_qk_score=0.01))
    q_proj = model.model.layers[0].self_attn.q_proj.weight
    before = q_proj.detach().clone()
    model(IDS)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step()
    assert qk_clip_stats(optimizer).clipped_heads > 0
    assert q_proj.norm() < before.norm()
    for p in model.parameters():
        assert torch.equal(p.detach(), masters_of(optimizer)(p).bfloat16())
    clipped = q_proj.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # nothing was read before it
    assert torch.equal(q_proj, clipped), "the next step does not undo the clip"


def test_weights_set_by_somebody_else_are_taken_over_and_the_others_keep_their_copies():
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = with_masters(torch.optim.SGD([weight], lr=2**-12))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with torch.no_grad():
        weight[0] = 8.0
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert masters_of(optimizer)(weight).tolist() == [8.0, 1 - 2**-12]


def test_float32_weights_need_no_copies_and_the_state_is_the_plain_one():
    model = family("llama")
    optimizer = build_optimizer(model, OPTIMIZERS["adamw"])
    assert masters_of(optimizer) is None and "masters" not in optimizer.state_dict()


def test_a_state_of_other_weights_or_without_copies(caplog):
    model = narrow()
    optimizer = build_optimizer(model, OPTIMIZERS["adamw"])
    set_gradients(model, 0)
    optimizer.step()
    state = optimizer.state_dict()
    state["masters"].popitem()
    with pytest.raises(CheckpointError, match="float32 copies of weights, expected"):
        optimizer.load_state_dict(state)
    state = optimizer.state_dict()
    del state["masters"]
    other = narrow()
    other.load_state_dict(model.state_dict())
    fresh = build_optimizer(other, OPTIMIZERS["adamw"])
    fresh.load_state_dict(state)
    for p in other.parameters():
        assert torch.equal(masters_of(fresh)(p), p.detach().float())


def test_a_closure_is_refused_in_one_line():
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = with_masters(torch.optim.SGD([weight], lr=0.1))
    for call in (lambda: optimizer.step(lambda: 0.0), lambda: optimizer.step(closure=lambda: 0.0)):
        with pytest.raises(ConfigError, match=r"got a closure, expected none") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert weight.dtype == torch.bfloat16 and math.isclose(weight.sum().item(), 2.0)


class Breaks(torch.optim.SGD):
    """Steps on its first parameter, and fails."""

    broken = True

    @torch.no_grad()
    def step(self, closure=None):
        first, *_ = self.param_groups[0]["params"]
        first.add_(2**-12)
        if self.broken:
            raise RuntimeError("half-way")


def test_a_step_that_fails_leaves_the_parameters_their_own_as_far_as_it_came():
    weights = [nn.Parameter(torch.full((2,), 0.125, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = with_masters(Breaks(weights, lr=1.0))
    gradients = [torch.full_like(weight, 3.0) for weight in weights]
    for weight, gradient in zip(weights, gradients):
        weight.grad = gradient
    with pytest.raises(RuntimeError, match="half-way"):
        optimizer.step()
    for weight, gradient in zip(weights, gradients):
        assert weight.dtype == torch.bfloat16 and weight.grad is gradient
    masters = masters_of(optimizer)
    assert masters(weights[0]).tolist() == [0.125 + 2**-12] * 2
    assert weights[0].tolist() == masters(weights[0]).bfloat16().tolist()
    assert weights[1].tolist() == [0.125] * 2
    optimizer.broken = False
    optimizer.step()
    assert masters(weights[0]).tolist() == [0.125 + 2**-11] * 2


def test_a_state_that_does_not_load_leaves_parameters_copies_and_state_as_they_were():
    model = narrow()
    optimizer = build_optimizer(model, OPTIMIZERS["adamw"])
    set_gradients(model, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    set_gradients(model, 1)
    optimizer.step()
    after = optimizer.state_dict()
    weights = [p.detach().clone() for p in model.parameters()]
    held = {i: value.clone() for i, value in after["masters"].items()}
    for state in (before | {"param_groups": []}, {"state": {}, "param_groups": []}):
        with pytest.raises(ValueError, match="parameter group"):
            optimizer.load_state_dict(state)
        for p, own in zip(model.parameters(), weights):
            assert p.dtype == p.grad.dtype == torch.bfloat16 and torch.equal(p, own)
        now = optimizer.state_dict()["masters"]
        assert all(torch.equal(now[i], value) for i, value in held.items())
    other = before["masters"] | {0: before["masters"][0][:1]}
    with pytest.raises(CheckpointError, match="float32 copies of weights"):
        optimizer.load_state_dict(before | {"masters": other})
    optimizer.load_state_dict(before)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, value in before["masters"].items():
        assert torch.equal(masters_of(optimizer)(parameters[i]), value)


@pytest.mark.parametrize("early", [False, True])
def test_learning_rate_schedulers_step_with_copies_and_the_memory_is_freed_at_once(early):
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR
    if early:
        rates = schedule(optimizer, lambda step: 2.0**-step)
        with_masters(optimizer)
    else:
        rates = schedule(with_masters(optimizer), lambda step: 2.0**-step)
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        rates.step()
    assert weight.tolist() == [-0.5, -0.5] and optimizer._opt_called
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer, rates
        assert gone() is None
    finally:
        gc.enable()
