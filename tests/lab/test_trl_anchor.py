"""TRL's side of a study: the settings that it is given, and a run that is compared with ours."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest

from hmpo.lab.study.outcomes import LATE, Outcome, outcome_of, read_outcomes, write_outcome
from hmpo.run.loop import train

pytest.importorskip("trl")
STUDIES = Path(__file__).parents[2] / "studies"
quiet = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def anchor():
    with pytest.MonkeyPatch.context() as patch:
        spec = importlib.util.spec_from_file_location("trl_anchor", STUDIES / "trl_anchor.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "trl_anchor", module)
        spec.loader.exec_module(module)
        yield module


def tiny(anchor, name="gspo+key+fresh"):
    """A cell of the suite, so short that it says nothing."""
    cell = next(c for c in anchor.read_suite(str(anchor.SUITE)).cells if c.name == name)
    config = cell.config
    changes = {
        "updates": 4,
        "prompts_per_rollout": 8,
        "trainer": dataclasses.replace(config.trainer, group_size=8, minibatches=2),
        "eval": dataclasses.replace(config.eval, prompts=16, final_prompts=16, every=2),
        "optimizer": dataclasses.replace(config.optimizer, lr=1e-2),
    }
    return dataclasses.replace(cell, config=dataclasses.replace(config, **changes), seeds=(900,))


def test_trl_is_told_what_a_run_of_ours_does(anchor):
    cells = {c.name: c.config for c in anchor.read_suite(str(anchor.SUITE)).cells}
    grpo = anchor.trl_settings(cells["grpo+spell+fresh"], 100)
    gspo = anchor.trl_settings(cells["gspo+key+fresh"], 101)
    assert (grpo["importance_sampling_level"], grpo["epsilon"], grpo["epsilon_high"]) == (
        "token",
        0.2,
        0.2,
    )
    assert (gspo["importance_sampling_level"], gspo["epsilon"], gspo["epsilon_high"]) == (
        "sequence",
        3e-4,
        4e-4,
    )
    assert (grpo["learning_rate"], gspo["learning_rate"], grpo["lr_scheduler_type"]) == (
        3e-4,
        1e-3,
        "linear",
    )
    assert grpo["per_device_train_batch_size"] * grpo["steps_per_generation"] == 16 * 8
    assert (grpo["adam_beta1"], grpo["adam_beta2"]) == cells["grpo+spell+fresh"].optimizer.betas


@quiet
def test_both_sides_measure_the_same_policy_before_training_and_a_run_is_made_once(
    anchor, tmp_path, capsys, monkeypatch
):
    cell = tiny(anchor)
    path = tmp_path / "outcomes" / "trl.jsonl.gz"
    suite = dataclasses.replace(anchor.read_suite(str(anchor.SUITE)), cells=(cell,))
    (made,) = anchor.make(suite, [cell], [900], path)
    assert made.registered == suite.protocol.sha256
    assert (made.cell, made.status, made.updates) == ("trl-gspo+key+fresh", "finished", 4)
    assert made.evals["step"] == [0, 2, 4] and made.tokens > 0
    assert made.reward["step"] == [1, 2, 3, 4]

    folder = tmp_path / "900"
    train(cell.run_config(900, str(tmp_path)), folder=folder)
    own = outcome_of(folder, cell.name, cell.levels, "main", 900)
    write_outcome(folder, own)
    assert own.evals["step"] == made.evals["step"]
    assert own.passed[0] == made.passed[0] and own.heldout == made.heldout
    assert own.before == made.before
    assert own.passed[-1] != own.passed[0] and made.passed[-1] != made.passed[0]

    monkeypatch.setattr(anchor, "run", lambda *_: pytest.fail("made again"))
    assert anchor.make(suite, [cell], [900], path) == read_outcomes(path) == [made]
    (line,) = anchor.side_by_side(suite, [made], [own])
    assert "1 seeds, equal before training in 1" in line
    assert anchor.side_by_side(suite, [made], []) == ["gspo+key+fresh: no seed that both have run"]


def test_a_run_says_which_protocol_it_was_decided_by(anchor):
    suite = anchor.read_suite(str(anchor.SUITE))
    cell, present = suite.cells[0], suite.protocol.sha256
    first = Outcome(cell="trl-x", seed=100, status="finished", registered=present)
    later = dataclasses.replace(first, registered=LATE)
    other = dataclasses.replace(first, registered="of another file")
    assert anchor.registered(suite, cell, 100, []) == present
    assert anchor.registered(suite, cell, 100, [first, later]) == present
    assert anchor.registered(suite, cell, 100, [other]) == LATE
    assert anchor.registered(suite, cell, 900, []) == LATE
    assert anchor.registered(dataclasses.replace(suite, protocol=None), cell, 100, []) == ""


def test_the_committed_runs_of_trl_were_decided_by_the_protocol(anchor):
    found = read_outcomes(anchor.OUTCOMES)
    suite = anchor.read_suite(str(anchor.SUITE))
    assert {outcome.registered for outcome in found} == {suite.protocol.sha256}


def test_a_cell_that_is_not_there_is_one_line(anchor, capsys):
    with pytest.raises(SystemExit):
        anchor.main(["--only", "grpo+carry", "--compare"])
    assert "no cell grpo+carry" in capsys.readouterr().err
