"""What a dry run shows: rewards that are missing are no number, conversations are texts."""

import math

from rich.console import Console

from hmpo.cli.rehearsal import rewards_line, sample_tables
from hmpo.run.rehearsal import Rehearsal, rehearse
from tests.faults.micro import micro_config, micro_policy

PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "12"}]
COMPLETION = [{"role": "assistant", "content": "21"}]


def found(rewards: list[float]) -> Rehearsal:
    samples = [
        {
            "prompt": PROMPT,
            "completion": COMPLETION,
            "reward": reward,
            "rewards": {"mine": None if math.isnan(reward) else reward},
            "finished": True,
        }
        for reward in rewards
    ]
    ids = [4] * len(rewards)
    return Rehearsal(samples=samples, prompts=ids, responses=ids, metrics={})


def test_responses_without_a_reward_are_left_out_of_the_mean_and_counted() -> None:
    nan = float("nan")
    assert rewards_line(found([1.0, 0.0, 1.0])) == "mean reward 0.6667, 2 different rewards"
    assert rewards_line(found([1.0, nan, float("nan"), 0.5])) == (
        "mean reward 0.75, 2 different rewards, 2 responses without a reward left out"
    )
    assert rewards_line(found([nan, nan])) == "no response got a reward"


def test_conversations_are_shown_as_texts_and_a_missing_reward_by_name() -> None:
    console = Console(width=100, record=True)
    for table in sample_tables(found([1.0, float("nan")])):
        console.print(table)
    text = console.export_text()
    assert "system: Be brief.\\nuser: 12 (4 ids)" in text and "21 (4 ids)" in text
    assert "1 (mine 1.0)" in text and "none (mine None)" in text
    assert "role" not in text and "nan" not in text


def test_a_rollout_whose_rewards_fail_at_times_has_a_mean(tmp_path) -> None:
    config = micro_config(
        micro_policy(tmp_path / "policy"),
        tmp_path,
        rewards__functions=["tests.faults.rewards:half"],
    )
    line = rewards_line(rehearse(config))
    assert line == "mean reward 1, 1 different rewards, 6 responses without a reward left out"
