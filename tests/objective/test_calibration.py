import dataclasses
import math

import pytest
import torch

from hmpo import members
from hmpo.config import ObjectiveConfig, PowerMeanConfig
from hmpo.errors import ConfigError
from hmpo.objective.calibration import ClipCalibration, clip_scale, scaled_bounds
from hmpo.objective.metrics import objective_metrics
from tests.support import tiny_llama
from tests.trainer.test_trainer import PROMPTS, settings, trainer_for

KINDS = {
    "token": members.hmpo(),
    "token, ratio space": members.dapo(),
    "sequence": members.gspo(),
    "sequence, drift": dataclasses.replace(members.holder(), clip_center="drift"),
    "sequence, z": ObjectiveConfig(
        clip_level="sequence", clip_width="z", clip_low=2.0, clip_high=3.0
    ),
}


def data(rows=400, length=12, spread=0.1):
    generator = torch.Generator().manual_seed(0)
    d = spread * torch.randn(rows, length, generator=generator, dtype=torch.float64)
    mask = torch.arange(length) < torch.randint(4, length + 1, (rows, 1), generator=generator)
    return torch.where(mask, d, 0), mask, torch.randn(rows, generator=generator).double()


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("share", [0.05, 0.2])
def test_the_chosen_share_clips_afterwards(kind, share):
    objective = dataclasses.replace(KINDS[kind], clip_share=share)
    d, mask, advantages = data()
    p = torch.tensor(-1.0, dtype=torch.float64)
    scale = clip_scale(d, mask, advantages, p, objective, share)
    config = scaled_bounds(objective, scale)
    old = torch.zeros_like(d)
    metrics = objective_metrics(d, old, mask, advantages, config, exponent=p)
    units = int(mask.sum()) if objective.clip_level == "token" else len(d)
    assert metrics["clip/frac"].item() == pytest.approx(share, abs=1.5 / units)
    (low, high), (before_low, before_high) = config.log_bounds, objective.log_bounds
    assert low / before_low == pytest.approx(high / before_high), "their proportion stays"


def test_nothing_to_calibrate_on_gives_none():
    d, mask, advantages = data()
    objective = dataclasses.replace(members.gspo(), clip_share=0.1)
    assert clip_scale(torch.zeros_like(d), mask, advantages, 1.0, objective, 0.1) is None
    assert clip_scale(d, mask, torch.zeros_like(advantages), 1.0, objective, 0.1) is None


def test_a_run_calibrates_once_and_says_so():
    objective = dataclasses.replace(members.gspo(), clip_share=0.2, clip_rollouts=2)
    trainer = trainer_for(tiny_llama(), settings(objective=objective, minibatches=4), lr=0.5)
    metrics = [trainer.update_step(PROMPTS) for _ in range(2)]
    assert trainer.objective == objective
    assert not [e for e in trainer.drain_events() if e.name == "clip_calibrated"]
    metrics += [trainer.update_step(PROMPTS) for _ in range(2)]
    (event,) = [e for e in trainer.drain_events() if e.name == "clip_calibrated"]
    assert event.data["scale"] > 1, "GSPO's band is far too narrow for six tokens"
    assert trainer.objective.log_bounds == (event.data["log_low"], event.data["log_high"])
    assert metrics[-1]["clip/hi"] == pytest.approx(event.data["log_high"])
    assert trainer.in_force.calibration.scale == math.fsum(trainer.in_force.calibration.scales) / 6


def test_calibration_resumes_where_it_was():
    objective = dataclasses.replace(members.gspo(), clip_share=0.2)
    config = settings(objective=objective, minibatches=4)
    whole = trainer_for(tiny_llama(), config, lr=0.5)
    for _ in range(3):
        whole.update_step(PROMPTS)
    half = trainer_for(tiny_llama(), config, lr=0.5)
    half.update_step(PROMPTS)
    half.begin_rollout(PROMPTS, {})
    half.next_update()
    half.next_update()
    other = trainer_for(tiny_llama(seed=5), config, lr=0.5)
    other.load_state_dict(half.state_dict())
    while other.pending_updates:
        other.next_update()
    other.update_step(PROMPTS)
    assert other.in_force.calibration.state_dict() == whole.in_force.calibration.state_dict()
    assert other.objective == whole.objective != objective


def test_without_a_share_nothing_is_observed():
    calibration = ClipCalibration(members.gspo())
    d, mask, advantages = data()
    seen = calibration.observe(d, mask, advantages, 0.0, members.gspo(), rollout=5, staleness=3)
    assert not seen
    assert calibration.apply(members.gspo()) == members.gspo()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"clip_share": 1.0}, "clip_share"),
        ({"clip_share": 0.1, "clip_level": "none"}, "clip_share"),
        ({"clip_share": 0.1, "clip_rollouts": 0}, "clip_rollouts"),
    ],
)
def test_settings_without_effect_are_refused(change, name):
    with pytest.raises(ConfigError, match=f"{name}: got"):
        ObjectiveConfig(**change)


def test_one_update_per_rollout_cannot_calibrate():
    objective = dataclasses.replace(members.gspo(), clip_share=0.1)
    with pytest.raises(ConfigError, match="no ratio differs from 1"):
        PowerMeanConfig(objective=objective, minibatches=1)
