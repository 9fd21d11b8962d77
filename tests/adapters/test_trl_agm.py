"""The controllers inside TRL: advice is harmless, decisions act, and a resume goes on with them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

import hmpo.agm.control
from hmpo.adapters.trl.agm import STATE_FILE, UNREAD, AGMCallback
from hmpo.adapters.trl.trainer import PowerMeanGRPOTrainer
from hmpo.agm.control import Control
from hmpo.config import ControlConfig
from hmpo.config.agm import StopConfig, UncertaintyConfig
from hmpo.config.reading import from_dict
from hmpo.errors import CheckpointError, ConfigError
from hmpo.lab.replay import first_difference, load_source, replay
from tests.adapters.gradients import make_trainer
from tests.adapters.test_trl import records, weights
from tests.agm.streams import EAGER
from tests.agm.test_control import Script
from tests.agm.walk import settings_of

SETTINGS = EAGER | {"adapter": EAGER["adapter"] | {"gap_target": 1e-9}}
APPLY = from_dict(ControlConfig, SETTINGS | {"mode": "apply", "controls": ["lr", "p", "stop"]})
ADVISE = dataclasses.replace(APPLY, mode="advise")


def train(
    folder: Path, agm: ControlConfig | None = None, resume: bool = False, **settings: Any
) -> PowerMeanGRPOTrainer:
    options: dict[str, Any] = {"max_steps": 12, "learning_rate": 3e-3, "exponent": "controller"}
    options |= {"lr_scheduler_type": "linear", "run_name": "same"}
    trainer = make_trainer(str(folder), **(options | settings))
    if agm is not None:
        trainer.add_callback(AGMCallback(trainer, agm))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def decisions(folder: Path) -> list[dict[str, Any]]:
    return [record for record in records(folder) if record["type"] == "decision"]


def test_advice_is_logged_and_leaves_the_weights_alone(tmp_path: Path) -> None:
    off, advised = train(tmp_path / "off"), train(tmp_path / "on", ADVISE)
    assert torch.equal(weights(off), weights(advised))
    found = decisions(tmp_path / "on")
    assert [record["step"] for record in found] == list(range(12))
    assert not any(record["applied"] for record in found)
    assert {record["decision/regime"] for record in found} != {"initialization"}


def test_decisions_act_and_a_replay_of_the_log_makes_them_again(tmp_path: Path) -> None:
    train(tmp_path, APPLY)
    steps = [record for record in records(tmp_path) if record["type"] == "step"]
    schedule = [3e-3 * (1 - i / 12) for i in range(12)]
    factors = [1.0, *(record["decision/lr_mult"] for record in decisions(tmp_path))]
    assert [r["lr"] for r in steps] == pytest.approx([a * b for a, b in zip(schedule, factors)])
    assert len(set(factors)) > 1 and len({record["ratio/p"] for record in steps}) > 1
    source = load_source(tmp_path / "telemetry.jsonl")
    source = dataclasses.replace(source, config=APPLY)
    again = replay(source, Control(APPLY, source.log.run))
    assert len(again) == 12 and first_difference(source, again) is None


def test_each_decision_is_in_force_from_the_next_update_on(tmp_path, monkeypatch) -> None:
    table = {1: {"lr_mult": 0.5, "p": 0.25}, 4: {"lr_mult": 0.5, "stop": "plateau"}}
    monkeypatch.setattr(Script, "table", table)
    monkeypatch.setattr(hmpo.agm.control, "AdaptiveAGMFramework", Script)
    train(tmp_path, APPLY, lr_scheduler_type="constant")
    found = records(tmp_path)
    steps = [record for record in found if record["type"] == "step"]
    assert [record["lr"] for record in steps] == [3e-3] * 2 + [1.5e-3] * 3
    assert [record["ratio/p"] for record in steps] == [-1.0] * 2 + [0.25] * 3
    assert found[-1]["type"] == "end" and found[-1]["status"] == "early_stop"


def test_a_resume_goes_on_with_the_controllers_bit_for_bit(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 6.0}
    straight = train(tmp_path / "straight", APPLY, **settings)
    train(tmp_path / "cut", APPLY, **settings)
    (tmp_path / "cut" / "checkpoint-12").rename(tmp_path / "aside")
    resumed = train(tmp_path / "cut", APPLY, resume=True, **settings)
    assert torch.equal(weights(resumed), weights(straight))
    logs = [(tmp_path / name / "telemetry.jsonl").read_bytes() for name in ("straight", "cut")]
    assert logs[0] == logs[1]
    (tmp_path / "cut" / "checkpoint-12").rename(tmp_path / "other")
    (tmp_path / "cut" / "checkpoint-6" / STATE_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"hmpo_agm\.json: missing"):
        train(tmp_path / "cut", APPLY, resume=True, **settings)


def test_what_cannot_be_set_inside_trl_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(str(tmp_path))
    with pytest.raises(ConfigError, match=r"got \['clip', 'level'\], expected some of lr, p, stop"):
        AGMCallback(trainer, ControlConfig(mode="apply", controls=("clip", "level")))
    with pytest.raises(ConfigError, match='expected "controller"'):
        AGMCallback(trainer, ControlConfig(mode="apply", controls=("p",)))
    trainer.args.lr_scheduler_type = "reduce_lr_on_plateau"
    with pytest.raises(ConfigError, match="lr_scheduler_type: got 'reduce_lr_on_plateau'"):
        AGMCallback(trainer, ControlConfig(mode="apply"))
    AGMCallback(trainer, ControlConfig(mode="advise", controls=("clip", "level")))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"first_level": 2}, "first_level"),
        ({"gating": False}, "gating"),
        ({"uncertainty": UncertaintyConfig(window=9)}, "uncertainty.window"),
        ({"stop": StopConfig(target=0.9)}, "stop.target"),
        ({"stop": StopConfig(min_steps=9)}, "stop.min_steps"),
    ],
)
def test_what_nothing_reads_inside_trl_is_refused(tmp_path: Path, changes: dict, name: str) -> None:
    trainer = make_trainer(str(tmp_path))
    with pytest.raises(ConfigError, match=f"^agm.{name}: got .* inside TRL: TRL"):
        AGMCallback(trainer, ControlConfig(mode="advise", **changes))
    read = StopConfig(gap_abort=0.5, patience=9, max_steps=3)
    AGMCallback(trainer, ControlConfig(mode="advise", stop=read))


def test_every_name_of_what_is_unread_is_one_of_a_setting() -> None:
    settings = {*settings_of(ControlConfig())}
    for name in UNREAD:
        assert any(path == name or path.startswith(f"{name}.") for path in settings), name
