"""What is said of a run at its end."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from hmpo.cli.screen import outcome_table
from hmpo.run.evaluation import Evaluation, Rate
from hmpo.run.observer import RunResult


def shown(before: Evaluation, after: Evaluation | None) -> str:
    result = RunResult(folder=Path("run"), status="completed", step=3, before=before, after=after)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(outcome_table(result))
    return " ".join(console.export_text().replace("│", " ").split())


def measured(successes: int, mean: float) -> Evaluation:
    rate = Rate(successes=successes, trials=8)
    return Evaluation(sampled=rate, greedy=rate, mean_reward=mean)


def test_graded_rewards_are_shown_by_their_mean() -> None:
    """A judge's scores of 0.4 and 0.6 are no success, and yet a difference."""
    assert "mean reward 0.400 0.600 8" in shown(measured(0, 0.4), measured(0, 0.6))
    assert "mean reward 0.400 - 8" in shown(measured(0, 0.4), None)


@pytest.mark.parametrize("after", [measured(4, 0.5), None])
def test_the_mean_of_right_and_wrong_is_the_success_and_not_said_twice(after) -> None:
    text = shown(measured(2, 0.25), after)
    assert "sampled" in text and "mean reward" not in text
