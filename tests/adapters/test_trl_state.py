"""Inside TRL: what outlives an exception, a second training, a resume, and what may not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from transformers import TrainerCallback

from hmpo.adapters.trl.agm import STATE_FILE, AGMCallback
from hmpo.adapters.trl.card import describe, paper_of
from hmpo.adapters.trl.trainer import PowerMeanGRPOTrainer
from hmpo.config import ControlConfig
from hmpo.config.members import BY_NAME
from hmpo.errors import CheckpointError, NonFiniteError
from hmpo.lab.folder import load_run
from hmpo.lab.summary import _facts
from tests.adapters.gradients import (
    ROWS,
    digits,
    direct_gradient,
    make_batch,
    make_trainer,
    tokenizer,
    trl_gradient,
    with_old,
)
from tests.adapters.test_trl import difference, records, train, weights

SAVE = {"save_strategy": "steps", "save_steps": 2.0}
PROMPTS = Dataset.from_dict({"prompt": ["12>"] * 2})


class Failing(TrainerCallback):
    """Raises once at a step."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.step = -1
            raise self.error


def statuses(folder: Path) -> list[str]:
    return [record["status"] for record in records(folder) if record["type"] == "end"]


# ----------------------------------------------------------------------------------- exceptions


def test_a_forward_that_fails_leaves_nothing_to_the_next_training(tmp_path: Path) -> None:
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
    straight = train(tmp_path / "straight", learning_rate=0.0, **parts)
    trainer = make_trainer(str(tmp_path / "cut"), learning_rate=0.0, logging_steps=1.0, **parts)
    whole, calls = trainer.model.forward, []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(options)
        if trainer._loss_inputs is not None and len(trainer._window) == 1:
            raise RuntimeError("out of memory")
        return whole(*args, **options)

    trainer.model.forward = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    trainer.model.forward = whole
    assert trainer._loss_inputs is None
    assert statuses(tmp_path / "cut") == ["failed"]
    trainer.evaluate(PROMPTS)
    trainer.train()
    assert trainer.last_record["n_seq"] == straight.last_record["n_seq"] == ROWS
    assert [r["rollout"] for r in records(tmp_path / "cut")[1:-1]] == [0, 0]


def test_an_evaluation_that_fails_leaves_the_loss_as_it_was(tmp_path: Path) -> None:
    trainer = make_trainer(str(tmp_path), max_steps=1)
    whole = trainer._weigh
    trainer._weigh = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate(PROMPTS)
    trainer._weigh = whole
    assert trainer._loss_inputs is None
    trainer.train()
    assert trainer.last_record["n_seq"] == ROWS


def test_an_interrupted_log_says_so(tmp_path: Path) -> None:
    trainer = make_trainer(str(tmp_path), max_steps=3)
    trainer.add_callback(Failing(2, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert statuses(tmp_path) == ["interrupted"]
    assert records(tmp_path)[-1]["step"] == 2


# ------------------------------------------------------------------------------------ schedules


def test_evaluation_before_training_and_a_longer_second_training(tmp_path: Path) -> None:
    trainer = make_trainer(str(tmp_path), objective="holder", max_steps=3)
    assert "eval_loss" in trainer.evaluate(PROMPTS)
    trainer.train()
    first = [record["ratio/p"] for record in records(tmp_path)[1:-1]]
    trainer.args.max_steps = 5
    trainer.train()
    second = [record["ratio/p"] for record in records(tmp_path)[1:-1]]
    assert first == [2.0, 2.0, -2.0], "two updates a generation"
    assert second == [2.0, 2.0, 0.0, 0.0, -2.0]


def test_p_stays_within_a_generation_also_where_a_training_goes_on_from_inside_one(
    tmp_path: Path,
) -> None:
    train(tmp_path, objective="holder", max_steps=3, **SAVE | {"save_steps": 1.0})
    saved = str(tmp_path / "checkpoint-1")
    other = make_trainer(str(tmp_path / "b"), objective="holder", max_steps=6)
    other.train(resume_from_checkpoint=saved)
    lines = [line for line in records(tmp_path / "b") if "ratio/p" in line]
    found = [(line["rollout"], line["ratio/p"]) for line in lines]
    by_rollout: dict[int, set[float]] = {}
    for rollout, p in found:
        by_rollout.setdefault(rollout, set()).add(p)
    assert len(found) == 5 and all(len(values) == 1 for values in by_rollout.values())
    assert len(by_rollout) == 3, "generations that begin at steps 1, 3 and 5"


def test_what_was_learned_stays_for_a_second_training(tmp_path: Path) -> None:
    trainer = train(tmp_path, exponent={"kind": "learnable", "lr": 0.1}, max_steps=2)
    learned = trainer.in_force.source.value(0)
    trainer.train()
    assert records(tmp_path)[1]["ratio/p"] == pytest.approx(learned) != -1.0


# ---------------------------------------------------------------------------------- telemetry


def test_a_training_after_a_resume_keeps_the_log(tmp_path: Path) -> None:
    train(tmp_path, **SAVE)
    trainer = train(tmp_path, resume=True, max_steps=6, **SAVE)
    whole = (tmp_path / "telemetry.jsonl").read_bytes()
    trainer.train()
    assert (tmp_path / "telemetry-1.jsonl").read_bytes() == whole
    assert [r["step"] for r in records(tmp_path)[1:-1]] == list(range(6))


def test_a_resume_elsewhere_leaves_the_log_that_lies_there(tmp_path: Path) -> None:
    train(tmp_path / "one", **SAVE)
    train(tmp_path / "other", max_steps=6, run_name="other", objective="gmpo")
    lying = (tmp_path / "other" / "telemetry.jsonl").read_bytes()
    trainer = make_trainer(str(tmp_path / "other"), max_steps=6)
    trainer.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    assert (tmp_path / "other" / "telemetry-1.jsonl").read_bytes() == lying
    assert [r["step"] for r in records(tmp_path / "other")[1:-1]] == [2, 3, 4, 5]


def test_records_after_a_resume_have_the_runs_own_name(tmp_path: Path) -> None:
    train(tmp_path, **SAVE)
    train(tmp_path, resume=True, max_steps=6, **SAVE)  # another length is another hash
    assert len({record["run_id"] for record in records(tmp_path)}) == 1


def test_the_report_names_the_objective(tmp_path: Path) -> None:
    train(tmp_path, objective="gspo", p=-1.0, max_steps=1)
    facts = dict(_facts(load_run(tmp_path)))
    assert facts["objective"] == "gspo (p = -1.0), p = -1"


# ---------------------------------------------------------------------------------- checkpoints


WITH_STATE = {
    "learnable": {"exponent": "learnable"},
    "reward": {"objective": "apmpo"},
    "controller": {"exponent": "controller"},
    "calibrated": {"objective": {"member": "hmpo", "clip_share": 0.2, "clip_rollouts": 1}},
}


def half(completions: list[str], **_: Any) -> list[float]:
    return [float(index % 2) for index in range(len(completions))]


@pytest.mark.parametrize("settings", WITH_STATE.values(), ids=WITH_STATE)
def test_a_state_is_never_dropped_nor_begun_anew_in_silence(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    train(tmp_path / "with", max_steps=2, reward=half, **SAVE, **settings)
    train(tmp_path / "without", max_steps=2, reward=half, **SAVE)
    saved = str(tmp_path / "with" / "checkpoint-2")
    with pytest.raises(CheckpointError, match="resume with the"):
        make_trainer(str(tmp_path / "a"), max_steps=3).train(resume_from_checkpoint=saved)
    other = make_trainer(str(tmp_path / "b"), max_steps=3, reward=half, **settings)
    with pytest.raises(CheckpointError, match="resume with the"):
        other.train(resume_from_checkpoint=str(tmp_path / "without" / "checkpoint-2"))
    shutil.rmtree(tmp_path / "with" / "checkpoint-2" / "hmpo")
    missing = make_trainer(str(tmp_path / "c"), max_steps=3, reward=half, **settings)
    with pytest.raises(CheckpointError, match=r"hmpo: missing"):
        missing.train(resume_from_checkpoint=saved)


def test_other_settings_after_a_resume_are_told(tmp_path: Path, caplog: Any) -> None:
    train(tmp_path, max_steps=2, **SAVE)
    train(tmp_path, resume=True, max_steps=3, clip_low=0.1, **SAVE)
    assert "resumed with objective.clip_low = 0.1, saved with 0.4" in caplog.text


def test_all_of_a_checkpoint_is_there_before_it_is_pushed(tmp_path: Path) -> None:
    trainer = make_trainer(str(tmp_path), max_steps=2, exponent="learnable", **SAVE)
    trainer.add_callback(AGMCallback(trainer, ControlConfig(mode="advise")))
    pushed: list[list[str]] = []
    trainer.args.push_to_hub = True
    trainer._push_from_checkpoint = lambda folder: pushed.append(
        sorted(path.name for path in Path(folder).iterdir())
    )
    trainer._finish_current_push = lambda: None
    trainer.train()
    assert {"hmpo", STATE_FILE, "optimizer.pt"} <= set(pushed[0])


def test_arguments_may_be_given_by_position(tmp_path: Path) -> None:
    other = make_trainer(str(tmp_path))
    data, model = other.train_dataset, other.model
    trainer = PowerMeanGRPOTrainer(model, digits, other.args, data, None, tokenizer())
    assert trainer.train_dataset is data and trainer.processing_class is not None


def test_the_model_card_names_the_member_and_its_paper(tmp_path: Path) -> None:
    trainer = make_trainer(str(tmp_path), objective="gspo", clip_low=0.1)
    trainer.create_model_card("x")
    text = (tmp_path / "README.md").read_text()
    assert "power-mean objective gspo (clip_low = 0.1) of hmpo" in text
    assert "DeepSeekMath" not in text and "GRPO" not in text.split("## Citations")[0]
    assert paper_of(BY_NAME["gspo"]())["id"] == "2507.18071"
    assert paper_of(BY_NAME["hmpo"]()) == {} and describe(BY_NAME["hmpo"]()) == "hmpo"


# ------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("corrected", [False, True])
def test_a_log_ratio_beyond_exp_keeps_the_gradient_or_stops_the_update(
    tmp_path: Path, corrected: bool
) -> None:
    folder = tmp_path / "policy"
    make_trainer(str(tmp_path)).model.save_pretrained(folder)
    options: dict[str, Any] = {"model": str(folder), "use_bias_correction_kl": corrected}
    for shift in (-95.0, 95.0):  # of the log ratio of one token
        trainer = make_trainer(str(tmp_path), objective="hmpo", beta=0.3, **options)
        batch = with_old(trainer.model, make_batch())
        batch["old_per_token_logps"][0, 1] -= shift
        batch["old_per_token_logps"][2, 5] = 500.0  # padding
        batch["ref_per_token_logps"] = batch["old_per_token_logps"].clone()
        batch["ref_per_token_logps"][0, 1] += shift
        batch["ref_per_token_logps"][2, 5] = 0.0
        if corrected and shift > 0:
            with pytest.raises(NonFiniteError, match=r"response 0 is not finite \(token 1\)"):
                trl_gradient(trainer, batch)
            continue
        ours = trl_gradient(trainer, batch)
        batch["advantages"] = torch.zeros(ROWS)
        ours = ours - trl_gradient(trainer, batch)
        batch = batch | {"advantages": make_batch()["advantages"]}
        assert ours.isfinite().all()
        assert difference(ours, direct_gradient(trainer, batch)) < 1e-5


def test_a_norm_that_is_not_finite_leaves_the_weights(tmp_path: Path) -> None:
    for norm in (1.0, 0.0):  # 0: nothing is clipped
        trainer = make_trainer(str(tmp_path), max_steps=2, max_grad_norm=norm)
        before = weights(trainer)
        whole = trainer._compute_loss
        trainer._compute_loss = lambda *args, f=whole: f(*args) * float("nan")
        with pytest.raises(NonFiniteError, match="update 0: the gradient's norm is nan"):
            trainer.train()
        assert torch.equal(weights(trainer), before)


def test_evaluation_and_the_log_have_no_numbers_of_the_surrogate(tmp_path: Path) -> None:
    trainer = train(tmp_path, max_steps=2, entropy_coef=0.1)
    found = trainer.evaluate(PROMPTS)
    names = {name for line in trainer.state.log_history for name in line} | found.keys()
    assert not [name for name in names if "clip_ratio" in name or "policy_loss" in name]
    assert "pg_loss" in names and "eval_reward" in names
    assert json.loads((tmp_path / "telemetry.jsonl").read_bytes().splitlines()[0])["objective"]
