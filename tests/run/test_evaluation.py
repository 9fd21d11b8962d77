"""Evaluation draws and scores as rollouts do, in their precision."""

import pytest
import torch

from hmpo.config import PolicyConfig, PowerMeanConfig, TaskConfig
from hmpo.models import load_policy, stop_token_ids
from hmpo.rewards import Rewards
from hmpo.run.evaluation import Evaluator
from hmpo.tasks import make_task
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
