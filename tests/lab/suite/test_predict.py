"""Predicted times: what a run is made of, and how runs fill the processes."""

from pathlib import Path

import pytest

from hmpo.config.reading import run_config
from hmpo.lab.suite import predict as room
from hmpo.lab.suite.predict import MOST, Measured, measure, predict
from hmpo.lab.suite.selection import chosen_runs
from tests.lab.suite.small import MAD, suite


def oracle(measured: Measured, updates: int, each: int, every: int, n: int, final: int, k: int):
    """A run, second by second: what happens before, at and after each update."""
    seconds, per_response = measured.load, measured.evaluation / (2 * measured.measured)
    for step in range(updates):
        seconds += measured.rollout * (step % each == 0) + measured.update
        if every and (step + 1) % every == 0 and step + 1 < updates:
            seconds += 2 * n * per_response
    return seconds + 2 * final * (max(1, k) + 1) * per_response


@pytest.mark.parametrize("every", [0, 1, 3])
@pytest.mark.parametrize("pass_at", [0, 1, 4])
def test_a_run_is_the_sum_of_its_parts(every: int, pass_at: int) -> None:
    measured = Measured(load=1.0, rollout=2.0, update=0.5, evaluation=3.0, measured=10, most=MOST)
    config = run_config(
        {
            "updates": 7,
            "trainer": {"minibatches": 2, "epochs": 2},
            "eval": {"every": every, "prompts": 10, "final_prompts": 40, "pass_at": pass_at},
        }
    )
    expected = oracle(measured, 7, 4, every, 10, 40, pass_at)
    assert measured.whole(config) == pytest.approx(expected, rel=1e-12)


def test_runs_begin_as_soon_as_a_process_is_free(tmp_path: Path, monkeypatch) -> None:
    whole = suite(tmp_path)
    seconds = {"grpo+low": 5.0, "grpo+high": 1.0, "hmpo+low": 1.0, "hmpo+high": 2.0}

    class Fixed:
        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        def whole(self, config: object) -> float:
            return self.seconds

    order = iter([0.0, *seconds.values()])
    monkeypatch.setattr(room, "measure", lambda config, folder: Fixed(next(order)))
    told: list[str] = []
    found = predict(chosen_runs(whole.cells, {100}), 2, lambda name, s: told.append(name))
    assert told == list(seconds) and found.cells == seconds
    assert found.total == 5.0, "5 beside 1 + 1 + 2"


def test_one_update_is_measured_and_nothing_of_it_is_kept(tmp_path: Path) -> None:
    whole = suite(tmp_path, cells=[{"name": "mad", "settings": MAD, "seeds": [100]}])
    runs = [run for run in chosen_runs(whole.cells, {100}) if run[0].name in ("grpo+low", "mad")]
    before = sorted(tmp_path.rglob("*"))
    found = predict(runs, 1, lambda name, seconds: None)
    assert sorted(tmp_path.rglob("*")) == before
    assert found.cells["grpo+low"] > 0
    measured = measure(runs[0][0].run_config(100, str(tmp_path / "x")), tmp_path / "x")
    assert min(measured.load, measured.rollout, measured.update, measured.evaluation) > 0
    assert measured.measured == 2
