"""What TRL supplies to reward functions, ours are supplied with: by name, here or in a child."""

import functools
import inspect
import json
import math

import pytest
import torch

from hmpo import HMPOConfig, HMPOTrainer
from hmpo.errors import RewardError
from hmpo.rewards import Rewards, check_reward_fn
from hmpo.run import loop as run
from hmpo.telemetry.plain import json_ready
from hmpo.telemetry.records import step_record
from tests.faults.micro import micro_config, micro_policy, records
from tests.support import tiny_llama


def shaped(completions, trainer_state, log_extra, log_metric, **columns):
    """As in TRL: shaped by the progress, with a column and two metrics logged."""
    assert not columns.keys() & {"trainer_state", "log_extra", "log_metric"}
    log_extra("length", [len(c) for c in completions])
    log_metric("calls", 1)
    log_metric("calls", 2.0)
    log_metric("odd", float("nan"))
    return [trainer_state.global_step / max(1, trainer_state.max_steps)] * len(completions)


def maybe(completions, log_metric=None):
    """Metrics are asked for by a default, too."""
    log_metric("maybe", 0.5)
    return [0.0] * len(completions)


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_state_and_logs_are_supplied_and_come_back(timeout):
    with Rewards([shaped, maybe], timeout=timeout, max_steps=8) as rewards:
        rewards.refuse_missing(["answer"])
        result = rewards(["a", "b"], ["xy", "z"], [[1], [2]], {"answer": ["1", "2"]}, step=2)
    assert result.total == [0.25, 0.25] and result.extras == {"length": [2, 1]}
    assert result.metrics["calls"] == 1.5 and result.metrics["maybe"] == 0.5
    assert math.isnan(result.metrics["odd"])


def test_a_function_that_asks_for_nothing_gets_nothing_and_a_column_comes_first():
    seen = {}

    def plain(completions, **columns):
        seen.update(columns)
        return [0.0] * len(completions)

    def own(completions, log_metric):
        return [float(value) for value in log_metric]

    result = Rewards([plain, own])(["a"], ["b"], [[1]], {"log_metric": [3]})
    assert set(seen) == {"prompts", "completion_ids", "log_metric"} and result.total == [3.0]
    check_reward_fn(shaped)
    check_reward_fn(functools.partial(maybe))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda log_extra, log_metric: log_extra("a", [1, 2, 3]), r"got 3 values, expected 2"),
        (lambda log_extra, log_metric: log_metric("a", "x"), r"got 'x', expected a number"),
    ],
)
def test_a_log_that_does_not_fit_is_a_fault_of_the_function(call, told):
    def wrong(completions, log_extra, log_metric):
        call(log_extra, log_metric)
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=told):
        Rewards(wrong)(["a", "b"], ["c", "d"], [[1], [2]], {})


def test_the_names_are_those_that_trl_supplies():
    trl = pytest.importorskip("trl")
    source = inspect.getsource(trl.GRPOTrainer._calculate_rewards)
    for name in ("trainer_state", "log_extra", "log_metric"):
        assert f'reward_kwargs["{name}"]' in source


def test_a_trainer_tells_how_far_it_is_and_logs_what_was_told():
    policy, steps = tiny_llama(), []

    def reward(completion_ids, trainer_state, log_metric, log_extra):
        steps.append((trainer_state.global_step, trainer_state.max_steps))
        log_metric("answered", 0.25)
        log_extra("first", [ids[0] for ids in completion_ids])
        return [float(sum(ids) % 3) for ids in completion_ids]

    optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
    config = HMPOConfig(group_size=4, max_length=4, minibatches=2, total_updates=4)
    trainer = HMPOTrainer(policy, None, optimizer, config, reward)
    metrics = [trainer.update_step([[5, 6], [7]], key=["a", "b"]) for _ in range(2)]
    assert steps == [(0, 4), (2, 4)]
    assert step_record("r", metrics[0])["logged/answered"] == 0.25
    sample = trainer.samples[5]
    assert sample["columns"] == {"key": "b"} and set(sample["rewards"]) == {"reward"}
    assert isinstance(sample["extra"]["first"], int)


def test_completions_hold_the_columns_and_the_rewards_by_function(tmp_path):
    path = micro_policy(tmp_path / "policy")
    config = micro_config(path, tmp_path, updates=2, samples=3)
    folder = run.train(config).folder
    lines = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert len([line for line in lines if line["rollout"] == 0]) == 3
    for line in lines:
        assert line["columns"] and list(line["rewards"].values()) == [line["reward"]]
    assert records(folder, "step")


def test_columns_without_a_form_in_json_are_told_by_their_repr():
    class Odd:
        def __repr__(self):
            raise KeyError("x")

    value = {1: (2, {3}), "odd": Odd(), "long": range(10), "n": torch.tensor(1.5).item()}
    assert json_ready(value) == {
        "1": [2, "{3}"],
        "odd": "a Odd whose repr raises KeyError",
        "long": "range(0, 10)",
        "n": 1.5,
    }
    nested = []
    nested.append(nested)
    assert "[[...]]" in json.dumps(json_ready(nested))
