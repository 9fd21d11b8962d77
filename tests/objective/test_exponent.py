"""Where p comes from: criteria against loops, and the sources inside the trainer."""

import copy
import dataclasses
import math

import pytest
import torch
from torch.autograd import gradcheck

from hmpo import members
from hmpo.config import ExponentConfig, ObjectiveConfig, RunConfig
from hmpo.config.identity import config_hash
from hmpo.config.reading import run_config
from hmpo.errors import ConfigError
from hmpo.objective.exponent import (
    LearnableExponent,
    ess_criterion,
    exponent_source,
    variance_criterion,
)
from hmpo.objective.means import effective_sample_size
from hmpo.run.build import trainer_config
from tests.objective.cases import batch, rows_of
from tests.support import in_float64, tiny_llama
from tests.trainer.test_trainer import PROMPTS, settings, trainer_for, weights


def learnable(p=-1.0, **changes) -> ObjectiveConfig:
    return ObjectiveConfig(p=p, exponent=ExponentConfig(kind="learnable", **changes))


def quiet():
    d, mask, advantages = batch(-0.4, 0.4, overflow=False)
    return d.clamp(-1, 1), mask, advantages


def sizes(row, p):
    powers = [math.exp(p * v) for v in row]
    total = math.fsum(powers)
    mean = (total / len(row)) ** (1 / p)
    squares = math.fsum((x / total) ** 2 for x in powers)
    return mean, squares


@pytest.mark.parametrize("p", [-2.0, -0.3, 0.7])
def test_criteria_equal_their_definition_and_their_slopes_a_difference(p):
    d, mask, advantages = quiet()
    rows, a = rows_of(d, mask), advantages.tolist()
    at = torch.tensor(p, dtype=torch.float64, requires_grad=True)
    logs = [-math.log(sizes(row, p)[1] * len(row)) for row in rows]
    expected = (math.fsum(logs) / len(rows) - math.log(0.9)) ** 2
    assert ess_criterion(d, mask, at, 0.9).item() == pytest.approx(expected, rel=1e-12)
    terms = [adv**2 * sizes(row, p)[0] ** 2 * sizes(row, p)[1] for row, adv in zip(rows, a)]
    expected = math.fsum(terms) / len(rows)
    assert variance_criterion(d, mask, advantages, at).item() == pytest.approx(expected, rel=1e-12)
    assert gradcheck(lambda q: ess_criterion(d, mask, q, 0.9), (at,))
    assert gradcheck(lambda q: variance_criterion(d, mask, advantages, q), (at,))


def run_source(config, steps, surrogate=torch.square):
    d, mask, advantages = quiet()
    source = LearnableExponent(config, torch.device("cpu"))
    for _ in range(steps):
        record = source.learn(d, mask, advantages, surrogate)
    return source.value(0), record


@pytest.mark.parametrize("start", [-1.0, 0.5])
def test_ess_criterion_finds_its_root_on_the_side_of_the_start(start):
    p, record = run_source(learnable(start, target=0.9), 600)
    assert p * start > 0 and record["ratio/p_bound"] == 0
    d, mask, _ = quiet()
    reached = effective_sample_size(d, mask, p).log().mean().exp().item()
    assert reached == pytest.approx(0.9, rel=1e-4)


def test_variance_criterion_goes_to_an_exponent_of_at_most_zero():
    p, _ = run_source(learnable(1.0, criterion="variance"), 800)
    assert -4.0 < p <= 0.0


def test_surrogate_criterion_runs_to_its_bound_and_says_so():
    """Negatives more dispersed than positives: the slope in p has one sign for every p."""
    config = learnable(1.0, criterion="surrogate", allow_surrogate=True, bound=2.0, lr=0.1)
    with pytest.warns(UserWarning, match="expect p to run to its bound 2"):
        p, record = run_source(config, 400, surrogate=lambda p: p)
    assert p < -1.98 and record == {"ratio/p_step": pytest.approx(0, abs=1e-2), "ratio/p_bound": 1}


def test_no_dispersion_moves_p_by_nothing_and_rounding_by_next_to_nothing():
    for scale, limit in ((0.0, 0.0), (1e-7, 1e-6)):
        source = LearnableExponent(learnable(), torch.device("cpu"))
        d = scale * torch.randn(4, 8)
        record = source.learn(d, torch.ones(4, 8, dtype=torch.bool), torch.ones(4), torch.square)
        assert abs(record["ratio/p_step"]) <= limit


def test_learnable_p_is_optimised_and_checkpointed():
    """It is in an optimizer, moves, holds no stale gradient, and resumes bit for bit."""

    def fresh():
        model = tiny_llama()
        return trainer_for(model, settings(objective=learnable(target=0.999)), sgd=False, lr=0.02)

    straight = fresh()
    (group,) = straight.in_force.source.optimizer.param_groups
    assert group["params"] == [straight.in_force.source.rho] and group["weight_decay"] == 0.0
    owned = {id(p) for g in straight.optimizer.param_groups for p in g["params"]}
    assert id(straight.in_force.source.rho) not in owned, "outside the model's gradient clipping"
    records = [straight.update_step(PROMPTS) for _ in range(3)]
    assert straight.in_force.source.value(0) != -1.0 and straight.in_force.source.rho.grad is None
    assert all(abs(r["ratio/p_step"]) > 0 and r["ratio/p_bound"] == 0 for r in records)
    assert records[-1]["ratio/p"] + records[-1]["ratio/p_step"] == pytest.approx(
        straight.in_force.source.value(0)
    )
    for stop in range(1, 6):
        first, second = fresh(), fresh()
        while first.step < stop:
            if not first.pending_updates:
                first.begin_rollout(PROMPTS, {})
            first.next_update()
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        while second.step < 6:
            if not second.pending_updates:
                second.begin_rollout(PROMPTS, {})
            second.next_update()
        assert torch.equal(weights(second.policy), weights(straight.policy)), stop
        assert torch.equal(second.in_force.source.rho, straight.in_force.source.rho), stop


def test_learnable_p_survives_a_checkpoint_on_disk(tmp_path):
    from hmpo.checkpoint import load_checkpoint, save_checkpoint

    trainer = trainer_for(tiny_llama(), settings(objective=learnable()), sgd=False)
    trainer.update_step(PROMPTS)
    save_checkpoint(tmp_path, trainer.step, trainer.state_dict())
    other = trainer_for(tiny_llama(), settings(objective=learnable()), sgd=False)
    other.load_state_dict(load_checkpoint(tmp_path).state)
    assert torch.equal(other.in_force.source.rho, trainer.in_force.source.rho)
    one, two = (t.in_force.source.optimizer.state_dict()["state"][0] for t in (trainer, other))
    assert all(torch.equal(one[key], two[key]) for key in one) and len(one) >= 3


def test_p_does_not_learn_from_a_skipped_update():
    trainer = trainer_for(tiny_llama(), settings(objective=learnable()))
    trainer.begin_rollout(PROMPTS, {})
    trainer.next_update()
    before = trainer.in_force.source.value(0)
    trainer.batch.rollout.old_logprobs[:] = float("nan")
    record = trainer.next_update()
    assert record["update_skipped"] == 1 and "ratio/p_step" not in record
    assert trainer.in_force.source.value(0) == before


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    "objective",
    [
        learnable(criterion="variance"),
        members.holder(),
        members.apmpo(),
        members.pmpo(),
        ObjectiveConfig(clip_level="sequence", clip_center="drift", clip_width="z", clip_low=1.0),
    ],
    ids=["learnable", "linear", "reward", "matched", "drift"],
)
def test_sources_and_bands_do_not_see_micro_batches(objective, size):
    results = []
    for micro in (None, size):
        model = in_float64(tiny_llama())
        config = settings(
            objective=objective, micro_batch_size=micro, max_grad_norm=None, total_updates=4
        )
        trainer = trainer_for(model, config)
        records = [trainer.update_step(PROMPTS), trainer.update_step(PROMPTS)]
        results.append((weights(model), torch.tensor([r["ratio/p"] for r in records])))
    for one, two in zip(*results):
        assert float((one - two).abs().max()) < 1e-12


def test_schedule_and_rewards_set_the_exponent_of_each_update():
    trainer = trainer_for(tiny_llama(), settings(objective=members.holder(), total_updates=4))
    trainer.begin_rollout(PROMPTS, {})
    seen = [trainer.next_update()["ratio/p"] for _ in range(2)]
    trainer.begin_rollout(PROMPTS, {})
    seen += [trainer.next_update()["ratio/p"] for _ in range(2)]
    assert seen == [2.0, 2.0, -2.0, -2.0], "fixed within a rollout"

    trainer = trainer_for(tiny_llama(), settings(objective=members.apmpo()))
    record = trainer.update_step(PROMPTS)
    rewards = torch.tensor([s["reward"] for s in trainer.samples], dtype=torch.float64)
    assert record["ratio/p"] == pytest.approx(math.exp(-0.8 * rewards.mean()))
    gain = 0.2 * math.tanh(rewards.mean() / rewards.std(correction=0))
    assert record["clip/hi"] == pytest.approx(math.log(1.2 + gain))
    other = trainer_for(tiny_llama(), settings(objective=members.apmpo()))
    other.load_state_dict(copy.deepcopy(trainer.state_dict()))
    assert (
        other.objective == trainer.objective
        and other.in_force.source.p == trainer.in_force.source.p
    )


def test_a_controller_sets_the_exponent_of_the_next_updates_and_a_checkpoint_keeps_it():
    objective = ObjectiveConfig(p=-1.0, exponent=ExponentConfig(kind="controller"))
    trainer = trainer_for(tiny_llama(), settings(objective=objective))
    trainer.begin_rollout(PROMPTS, {})
    assert trainer.next_update()["ratio/p"] == -1.0
    trainer.in_force.set(p=0.25)
    assert trainer.next_update()["ratio/p"] == 0.25
    other = trainer_for(tiny_llama(), settings(objective=objective))
    other.load_state_dict(copy.deepcopy(trainer.state_dict()))
    assert other.in_force.source.value(0) == 0.25
    with pytest.raises(ConfigError, match="p: got nan from a controller"):
        trainer.in_force.set(p=math.nan)


def test_sources_by_name():
    kinds = {}
    for make in members.BY_NAME.values():
        source = exponent_source(make(), torch.device("cpu"), 10)
        kinds.setdefault(type(source).__name__, []).append(make().name)
        assert source.state_dict() in ({}, {"p": None, "clip_high": 0.2})
    holders = ["holder", "holder_clamped", "holder_token"]
    assert kinds["LinearExponent"] == holders and kinds["RewardExponent"] == ["apmpo"]


def test_a_file_names_the_source_and_refines_a_members_own():
    config = run_config({"objective": {"member": "apmpo", "exponent": {"gamma": 0.5}}})
    expected = dataclasses.replace(members.apmpo().exponent, gamma=0.5)
    assert config.objective.exponent == expected
    config = run_config({"objective": {"member": "apmpo", "exponent": {"kind": "linear"}}})
    assert config.objective.exponent == ExponentConfig(kind="linear")
    with pytest.raises(ConfigError, match=r"objective\.exponent\.gama: unknown; did you mean"):
        run_config({"objective": {"exponent": {"gama": 0.5}}})
    config = run_config({"updates": 7}, ["objective.member=holder"])
    assert trainer_config(config).total_updates == 7
    assert config_hash(config) != config_hash(dataclasses.replace(config, updates=8))
    assert config_hash(RunConfig(updates=7)) == config_hash(RunConfig(updates=8))
