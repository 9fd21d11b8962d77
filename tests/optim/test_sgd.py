"""`optimizer.name = "sgd"`: its steps, what it decays, its state or lack of one, and QK-clip."""

import copy
import math

import pytest
import torch

from hmpo import members
from hmpo.config import OptimizerConfig
from hmpo.config.reading import run_config
from hmpo.config.unread_run import refuse_unread_run
from hmpo.errors import ConfigError, ModelError, NonFiniteError
from hmpo.optim.muon_clip import qk_clip_stats
from hmpo.optim.state import split_clip_state
from hmpo.run.build import build_optimizer
from hmpo.trainer.faults import optimizer_fault
from hmpo.trainer.power_mean import PowerMeanTrainer
from tests.optim.tiny import make
from tests.oracles.sgd import sgd_step
from tests.trainer.test_trainer import PROMPTS, low_tokens, settings, weights

MOMENTUM = pytest.mark.parametrize("momentum", [0.0, 0.9])


def sgd(model, **changes) -> torch.optim.Optimizer:
    return build_optimizer(model, OptimizerConfig(name="sgd", **{"lr": 0.05} | changes))


def trainer_for(momentum: float, **changes) -> PowerMeanTrainer:
    model = make("qwen2")
    config = settings(**{"objective": members.hmpo(), "max_qk_score": 5.0} | changes)
    optimizer = sgd(model, momentum=momentum, weight_decay=0.1)
    return PowerMeanTrainer(model, None, optimizer, config, low_tokens)


@MOMENTUM
def test_steps_equal_the_loop_and_only_matrices_are_decayed(momentum: float) -> None:
    model = make("qwen2", dtype=torch.float64)
    optimizer = sgd(model, momentum=momentum, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    expected = {n: p.detach().flatten().tolist() for n, p in model.named_parameters()}
    buffers = dict.fromkeys(expected)
    for _ in range(3):
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            expected[name], buffers[name] = sgd_step(
                expected[name], p.grad.flatten().tolist(), buffers[name],
                lr=0.05, momentum=momentum, decay=0.1 if p.ndim >= 2 else 0.0,
            )  # fmt: skip
        optimizer.step()
    assert {p.ndim for p in model.parameters()} == {1, 2}, "both kinds are there"
    for name, p in model.named_parameters():
        wanted = torch.tensor(expected[name], dtype=torch.float64).view_as(p)
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-12, atol=1e-14)


def test_without_momentum_decay_in_the_gradient_is_decoupled_decay() -> None:
    model = torch.nn.Linear(3, 2, bias=False).double()
    before = model.weight.detach().clone()
    optimizer = sgd(model, weight_decay=0.1)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    decoupled = before * (1 - 0.05 * 0.1) - 0.05
    torch.testing.assert_close(model.weight.detach(), decoupled, rtol=1e-14, atol=1e-16)


@MOMENTUM
@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_trainer_goes_on_to_the_bit_with_a_schedule_and_a_clip_that_acts(
    momentum: float, done: int
) -> None:
    schedule = {"lr_schedule": "cosine", "warmup_updates": 1, "total_updates": 6}
    whole, saved = trainer_for(momentum, **schedule), None
    clipped, rates = 0, []
    for update in range(4):
        if update == done:
            saved = copy.deepcopy(whole.state_dict())
        if not whole.pending_updates:
            whole.begin_rollout(PROMPTS, {})
        rates.append(whole.next_update()["lr"])
        stats = qk_clip_stats(whole.optimizer)
        clipped += 0 if stats is None else stats.clipped_heads
    assert clipped > 0 and rates == [0.05 * whole.config.lr_factor(u) for u in range(4)]
    assert saved is not None
    kept = saved["optimizer"]["state"]
    assert bool(kept) is (momentum > 0), "a state only with momentum"
    other = trainer_for(momentum, **schedule)
    other.load_state_dict(saved)
    for _ in range(done, 4):
        if not other.pending_updates:
            other.begin_rollout(PROMPTS, {})
        other.next_update()
    assert torch.equal(weights(other.policy), weights(whole.policy))
    one, two = (split_clip_state(t.optimizer)["optimizer"]["state"] for t in (whole, other))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name]["momentum_buffer"], two[name]["momentum_buffer"])


def test_a_controllers_factor_scales_the_step() -> None:
    found = []
    for scale in (1.0, 0.5):
        trainer = trainer_for(0.0, qk_clip=False, max_qk_score=100.0)
        before = weights(trainer.policy).clone()
        trainer.lr_scale = scale
        trainer.begin_rollout(PROMPTS, {})
        assert trainer.next_update()["lr"] == 0.05 * scale
        found.append(weights(trainer.policy) - before)
    rounding = 2e-6  # of the weights, which are float32 and some of them above 1
    torch.testing.assert_close(found[1], 0.5 * found[0], rtol=1e-3, atol=rounding)


def test_a_bad_gradient_leaves_weights_and_an_absent_state_as_they_were() -> None:
    trainer = trainer_for(0.0)
    trainer.begin_rollout(PROMPTS, {})
    trainer.batch.advantages[:] = math.nan
    before = weights(trainer.policy).clone()
    assert trainer.next_update()["update_skipped"] == 1
    assert torch.equal(weights(trainer.policy), before) and not trainer.optimizer.state


def test_a_momentum_that_is_not_finite_is_found_by_name() -> None:
    trainer = trainer_for(0.9)
    trainer.update_step(PROMPTS)
    (name, p), *_ = trainer.policy.named_parameters()
    trainer.optimizer.state[p]["momentum_buffer"].flatten()[0] = math.inf
    where = f"{name}.momentum_buffer"
    found = optimizer_fault(trainer.policy, trainer.optimizer)
    assert found == {"site": "optimizer_state", "where": where}
    trainer.begin_rollout(PROMPTS, {})
    before = weights(trainer.policy).clone()
    assert trainer.next_update()["update_skipped"] == 1, "before a step spreads it"
    assert torch.equal(weights(trainer.policy), before)
    lost = trainer_for(0.0)
    lost.optimizer.param_groups[0]["lr"] = math.inf
    lost.begin_rollout(PROMPTS, {})
    with pytest.raises(NonFiniteError, match="not finite after the step at site weights"):
        lost.next_update()


def test_frozen_weights_are_left_out_and_a_model_without_others_is_refused() -> None:
    model = make()
    for name, p in model.named_parameters():
        p.requires_grad_("q_proj" in name)
    held = [p for group in sgd(model).param_groups for p in group["params"]]
    assert held and all(p.requires_grad for p in held)
    with pytest.raises(ModelError, match="no trainable parameter"):
        sgd(model.requires_grad_(False))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": "sgd", "betas": [0.5, 0.9]}, r"optimizer.betas: got \(0.5, 0.9\), expected"),
        ({"name": "sgd", "muon_lr": 0.1}, "optimizer.muon_lr: got 0.1, expected None"),
        ({"momentum": 0.5}, "optimizer.momentum: got 0.5, expected 0.0, as with optimizer.name"),
        ({"name": "muon", "momentum": 0.5}, "optimizer.momentum: got 0.5, expected 0.0"),
        ({"name": "sgd", "momentum": 1.0}, "momentum: got 1.0, expected in"),
    ],
)
def test_settings_of_other_optimizers_are_refused(table, message) -> None:
    with pytest.raises(ConfigError, match=message):
        refuse_unread_run(run_config({"optimizer": table}))
