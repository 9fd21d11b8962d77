"""Which update did best, from the records of evaluations, and that its checkpoint is kept."""

import random
import shutil

import pytest

from hmpo.cli import main
from hmpo.errors import CheckpointError, ModelError
from hmpo.run.best import best_evaluation, logged_evaluations
from hmpo.run.evaluation import Evaluation, Rate, hex_bits
from hmpo.run.loop import train
from hmpo.run.observer import Observer
from hmpo.run.place import found_place, saved_steps
from tests.faults.micro import everything, micro_config

KEPT = {"eval__every": 2, "eval__prompts": 8, "checkpoint__keep": 1, "checkpoint__every": 3}
SCORES = {0: 7, 2: 1, 4: 5, 6: 5, 8: 3}
"""Successes of 8 by update; the evaluation after the run has 16 prompts, the others missed."""


def record(step: int, name: str, passed: list[bool], dropped: int = 0) -> dict:
    return {
        "step": step,
        "eval/name": name,
        "eval/sampled_k": sum(passed),
        "eval/sampled_n": len(passed),
        "eval/dropped": dropped,
        "eval/passed": hex_bits(passed),
    }


def test_the_best_is_the_first_of_the_highest_on_the_same_prompts() -> None:
    draw = random.Random(0)
    for _ in range(200):
        count = draw.randint(1, 9)
        ways = [[draw.random() < 0.5 for _ in range(count)] for _ in range(draw.randint(0, 4))]
        last = [draw.random() < 0.5 for _ in range(count + draw.randint(0, 7))]
        records = [record(0, "before", [True] * count)]
        records += [record(3 * i, "during", passed) for i, passed in enumerate(ways, 1)]
        records.append(record(20, "after", last))
        scores = {3 * i: sum(passed) for i, passed in enumerate(ways, 1)}
        scores[20] = sum(last[:count]) if ways else sum(last)
        wanted = next(step for step, score in scores.items() if score == max(scores.values()))
        best = best_evaluation(records)
        assert best is not None and best["step"] == wanted


def test_where_prompts_were_not_scored_rates_are_compared_as_they_are() -> None:
    way = record(3, "during", [True, False])
    assert best_evaluation([way, record(6, "after", [False, False, True, True], dropped=1)]) == way
    last = record(6, "after", [False, False, True, True, True], dropped=1)
    assert best_evaluation([way, last]) == last


def test_nothing_measured_is_never_best() -> None:
    nothing = {"step": 3, "eval/name": "during", "eval/sampled_k": 0, "eval/sampled_n": 0}
    none_passed = record(6, "during", [False])
    assert best_evaluation([]) is None
    assert best_evaluation([record(0, "before", [True])]) is None
    assert best_evaluation([nothing, none_passed]) == none_passed
    assert best_evaluation([none_passed, nothing]) == none_passed


def test_a_folder_without_a_log_has_no_evaluations(tmp_path) -> None:
    assert list(logged_evaluations(tmp_path)) == []


class Copier(Observer):
    """Copies the run's folder as a kill would leave it: at an evaluation, or after an update."""

    def __init__(self, folder, to, moment: tuple[str, int]) -> None:
        self.folder, self.to, self.moment = folder, to, moment

    def on_update(self, record, timing) -> None:
        self._copy("update", record["step"] + 1)

    def on_evaluation(self, step, name, evaluation) -> None:
        self._copy("evaluation", step)

    def _copy(self, what: str, step: int) -> None:
        if (what, step) == self.moment:
            shutil.copytree(self.folder, self.to, ignore=shutil.ignore_patterns("run.lock"))


@pytest.fixture
def scored(monkeypatch):
    """Evaluations that find `SCORES`."""

    def evaluate(self, prompts, *, step, **options) -> Evaluation:
        right = SCORES[step]
        passed = [i < right for i in range(16 if step in (0, 8) else 8)]
        return Evaluation(
            sampled=Rate(successes=right, trials=len(passed)),
            passed=hex_bits(passed),
            heldout="0" * 64,
        )

    monkeypatch.setattr("hmpo.run.evaluation.Evaluator.evaluate", evaluate)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, [4, 8]),
        ({"checkpoint__keep": 2}, [4, 6, 8]),
        ({"checkpoint__keep_best": False}, [8]),
        ({"checkpoint__every": 0}, [8]),
        ({"eval__every": 0}, [8]),
    ],
)
def test_the_best_checkpoint_is_kept_beside_the_last(changes, steps, scored, policy, out) -> None:
    run = train(micro_config(policy, out, **KEPT | changes)).folder
    assert saved_steps(run) == steps
    if 4 in steps:
        assert found_place(f"{run}@best") == (run, 4)
    if "checkpoint__keep_best" in changes:
        with pytest.raises(CheckpointError, match=r"update 4 did best, .* only 8"):
            found_place(f"{run}@best")


@pytest.mark.parametrize(
    "moment", [("update", 3), ("evaluation", 4), ("update", 5), ("evaluation", 6), ("update", 7)]
)
def test_a_killed_and_resumed_run_keeps_the_same(moment, scored, policy, out) -> None:
    config = micro_config(policy, out, **KEPT)
    run = train(config, observer=Copier(out / "run", out / "copy", moment)).folder
    expected = everything(run)
    run.rename(out / "whole")
    (out / "copy").rename(run)
    train(config, resume=True)
    found = everything(run)
    assert sorted(found) == sorted(expected)
    assert [name for name in found if found[name] != expected[name]] == []


def test_the_best_is_measured_and_exported_by_name(scored, policy, out, capsys) -> None:
    run = train(micro_config(policy, out, **KEPT)).folder
    assert main(["export", str(run), "--step", "best"]) == 0
    assert capsys.readouterr().out == f"policy after 4 updates: {run / 'export'}\n"
    text = (run / "export" / "README.md").read_text()
    low, high = Rate(successes=5, trials=8).interval
    assert f"| 0.625 ({low:.3f} to {high:.3f}), n = 8 |" in text


def test_a_last_evaluation_that_is_best_is_found_in_the_last_checkpoint(
    scored, policy, out, monkeypatch
) -> None:
    monkeypatch.setitem(SCORES, 8, 6)
    run = train(micro_config(policy, out, **KEPT)).folder
    assert found_place(f"{run}@best") == (run, 8)


def test_a_checkpoints_name_is_read_where_a_run_is_begun_and_else_refused_in_one_line(
    scored, policy, out, capsys, monkeypatch
) -> None:
    monkeypatch.setitem(SCORES, 1, 0)
    run = train(micro_config(policy, out, **KEPT)).folder
    began = micro_config(policy, out, "began", updates=1, policy__start=f"{run}@best")
    assert train(began).step == 1
    began = micro_config(f"{run}@best", out, "none")
    with pytest.raises(
        ModelError, match=r"names a checkpoint of a run, .* by policy.start"
    ) as told:
        train(began)
    assert "\n" not in str(told.value)
    for command in (["export"], ["train", "--resume"]):
        assert main([*command, f"{run}@best"]) == 2
        error = capsys.readouterr().err
        assert f"names a checkpoint, expected a run; give {run} " in error
        assert "--step best" in error and error.count("\n") == 1
    run.rename(out / "run@best")
    assert found_place(str(out / "run@best")) == (out / "run@best", 8)


def test_a_best_that_was_not_kept_is_refused_by_name_though_the_best_since_is_kept(
    scored, policy, out, monkeypatch
) -> None:
    monkeypatch.setitem(SCORES, 10, 2)
    train(micro_config(policy, out, updates=6, **KEPT | {"checkpoint__keep_best": False}))
    run = train(micro_config(policy, out, updates=10, **KEPT), resume=True).folder
    assert saved_steps(run) == [8, 10]
    with pytest.raises(CheckpointError, match=r"update 4 did best, and has no .* only 8, 10$"):
        found_place(f"{run}@best")
    assert found_place(f"{run}@8") == (run, 8)
