"""What a dry run shows: rewards that are missing are no number, conversations are texts."""

import dataclasses
import math

from rich.console import Console

from hmpo.cli.rehearsal import WIDTH, reading_lines, rewards_line, sample_tables
from hmpo.run.rehearsal import Rehearsal, rehearse
from tests.faults.micro import micro_config, micro_policy

PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "12"}]
READ = "<s>Be brief.</s><user>12</s><assistant>"
ENDS = ("</s>", "\n")
COMPLETION = [{"role": "assistant", "content": "21"}]


def found(rewards: list[float]) -> Rehearsal:
    samples = [
        {
            "prompt": PROMPT,
            "completion": COMPLETION,
            "reward": reward,
            "rewards": {"mine": None if math.isnan(reward) else reward},
            "finished": True,
            "columns": {"answer": "21"},
        }
        for reward in rewards
    ]
    ids = [4] * len(rewards)
    return Rehearsal(samples=samples, prompts=ids, responses=ids, metrics={}, read=READ, ends=ENDS)


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
    assert text.count("expected") == 2
    assert "1 (mine 1.0)" in text and "none (mine None)" in text
    assert "role" not in text and "nan" not in text


def test_the_first_prompt_is_shown_as_the_policy_reads_it_and_where_a_response_ends() -> None:
    read, ends = reading_lines(found([1.0]), 16)
    assert read.plain == f"the policy reads: {READ}"
    assert ends.plain == "a response ends at </s>, \\n, or after 16 tokens"
    long = dataclasses.replace(found([1.0]), read=READ + "x" * 2 * WIDTH + READ)
    read = reading_lines(long, 16)[0].plain
    assert len(read) < WIDTH + 30, "what stands in the middle gives way"
    assert read.startswith(f"the policy reads: {READ}") and read.endswith(READ)


def test_a_rollout_whose_rewards_fail_at_times_has_a_mean(tmp_path) -> None:
    config = micro_config(
        micro_policy(tmp_path / "policy"),
        tmp_path,
        rewards__functions=["tests.faults.rewards:half"],
    )
    line = rewards_line(rehearse(config))
    assert line == (
        "mean reward 1, all equal, which teaches nothing, 6 responses without a reward left out"
    )
