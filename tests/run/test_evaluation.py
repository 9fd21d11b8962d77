"""Evaluation draws and scores as rollouts do, in their precision."""

import dataclasses
import hashlib
import math
import random

import pytest
import torch

from hmpo.config import PolicyConfig, PowerMeanConfig, TaskConfig
from hmpo.models import load_policy, stop_token_ids
from hmpo.rewards import Rewards
from hmpo.run.evaluation import Evaluation, Evaluator, Rate, hash_prompts, hex_bits
from hmpo.tasks import Example, make_task
from hmpo.trainer.rollout import sampling_options


def evaluator(**settings) -> Evaluator:
    loaded, task = load_policy(PolicyConfig(path="tiny-sort")), make_task(TaskConfig(), 0)
    config = PowerMeanConfig(
        max_length=6, eos_token=stop_token_ids(loaded.tokenizer, task.stop), **settings
    )
    return Evaluator(
        policy=loaded.model,
        tokenizer=loaded.tokenizer,
        task=task,
        rewards=Rewards(task.reward),
        config=config,
        batch_size=8,
    )


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_evaluation_samples_in_the_precision_of_the_rollouts(autocast: str) -> None:
    measured, precisions = evaluator(autocast=autocast, decoder="module"), set()

    def observe(module, inputs, output) -> None:
        precisions.add(output.dtype)

    measured.policy.model.layers[0].mlp.down_proj.register_forward_hook(observe)
    measured.evaluate(4)
    assert precisions == {torch.bfloat16 if autocast == "bfloat16" else torch.float32}


def test_evaluation_repeats_itself_and_is_not_truncated() -> None:
    plain, truncated = evaluator(), evaluator(top_k=1, sampling_dtype="bfloat16")
    first = plain.evaluate(16, pass_at=2)
    assert first == plain.evaluate(16, pass_at=2) == truncated.evaluate(16, pass_at=2)
    assert first.pass_at is not None and first.pass_at.successes >= first.sampled.successes


def test_the_options_of_a_trainer_are_those_of_its_configuration() -> None:
    config = PowerMeanConfig(temperature=0.7, top_k=3, sampling_dtype="bfloat16", eos_token=9)
    options = sampling_options(config, ("x",))
    assert (options.temperature, options.top_k, options.truncates) == (0.7, 3, True)
    assert (options.dtype, options.eos_tokens, options.stop) == (torch.bfloat16, (9,), ("x",))


class FewPrompts:
    """Four held-out prompts, which repeat; two of them cannot be scored."""

    name, level, levels, stop, max_new_tokens = "few", 1, 1, ("\n",), 6

    def heldout(self, index: int) -> Example:
        digit = index % 4
        return Example(prompt=f"{digit}>", columns={"answer": None if digit % 2 else "x"})

    train = heldout

    def reward(self, prompts, completions, completion_ids, answer, **columns):
        return [None if a is None else 0.5 for a in answer]


def few(**changes) -> Evaluator:
    task = FewPrompts()
    rewards = Rewards(task.reward, on_error="skip")
    return dataclasses.replace(evaluator(), task=task, rewards=rewards, **changes)


def test_what_was_not_scored_is_neither_right_nor_wrong() -> None:
    found = few(success=0.5).evaluate(4, pass_at=2, step=7)
    assert found.sampled == Rate(successes=2, trials=2) == found.greedy == found.pass_at
    assert (found.mean_reward, found.dropped) == (0.5, 4 + 2)
    assert {(event.name, event.step) for event in found.events} == {("reward_none", 7)}
    assert (found.passed, found.heldout) == ("c", hash_prompts(["0>", "2>"])), "of those scored"
    record = found.record()
    assert (record["eval/dropped"], record["eval/n"]) == (6, 2)
    assert Evaluation.from_record(record) == dataclasses.replace(found, events=())


def test_success_begins_at_a_setting_and_the_mean_reward_does_not_depend_on_it() -> None:
    strict = few().evaluate(4)
    assert strict.sampled == Rate(successes=0, trials=2) and strict.mean_reward == 0.5


def test_nothing_scored_is_no_number() -> None:
    task = FewPrompts()
    task.heldout = lambda index: Example(prompt="1>", columns={"answer": None})
    found = dataclasses.replace(few(), task=task).evaluate(3)
    assert found.sampled == Rate(successes=0, trials=0)
    assert math.isnan(found.sampled.value) and math.isnan(found.mean_reward)
    assert found.sampled.interval == (0.0, 1.0)
    assert (found.passed, found.heldout) == ("", hash_prompts([]))


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 13])
def test_bits_of_prompts_are_read_back_one_by_one(count: int) -> None:
    draw = random.Random(count)
    passed = [draw.random() < 0.5 for _ in range(count)]
    text = hex_bits(passed)
    read = [bool(int(digit, 16) & 8 >> i) for digit in text for i in range(4)]
    assert len(text) == -(-count // 4) and read[:count] == passed and not any(read[count:])
    assert hex_bits([True, False, False, False, False, True]) == "84", "the first is the highest"


def test_prompts_have_one_hash_in_their_order() -> None:
    digests = {
        hash_prompts(p) for p in (["a", "b"], ["b", "a"], ["ab"], ["a", "b", ""], ["\ud800"])
    }
    assert len(digests) == 5
    known = hashlib.sha256(b'["a", "b"]').hexdigest()
    assert hash_prompts(["a", "b"]) == known


def test_n_is_the_number_of_distinct_held_out_prompts(caplog) -> None:
    found = few().evaluate(64)
    assert found.sampled.trials == 2 and found.dropped == 2 + 2
    assert "task few has 4 that differ: n = 4" in caplog.text


def test_random_rewards_under_a_time_limit_are_the_same_in_each_evaluation() -> None:
    def draw(completions, **columns):
        return [random.random() for _ in completions]

    with Rewards(draw, timeout=20.0) as rewards:
        measured = dataclasses.replace(evaluator(), rewards=rewards)
        assert measured.evaluate(4, greedy=False) == measured.evaluate(4, greedy=False)
