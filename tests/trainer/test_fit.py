"""`Trainer.fit` trains on a task as a run does, and goes on where it stopped."""

from pathlib import Path

import pytest
import torch

import hmpo
from hmpo.config import (
    EvalConfig,
    GSPOConfig,
    HMPOConfig,
    PolicyConfig,
    RunConfig,
    TaskConfig,
    TrainerConfig,
)
from hmpo.errors import ConfigError
from hmpo.models import load_policy
from hmpo.run.build import build_optimizer
from hmpo.tasks import Task, make_task
from hmpo.trainer.gspo import GSPOTrainer
from hmpo.trainer.power_mean import HMPOTrainer

SETTINGS = {"group_size": 4, "max_length": 12, "minibatches": 2}


def task() -> Task:
    return make_task(TaskConfig(name="sort"))


def trainer(kind: type = HMPOTrainer, config: type = HMPOConfig, **options):
    loaded = load_policy(PolicyConfig(path="tiny-sort"))
    given = {"tokenizer": loaded.tokenizer, "stop": task().stop} | options
    optimizer = build_optimizer(loaded.model, RunConfig().optimizer)
    return kind(loaded.model, None, optimizer, config(**SETTINGS), task().reward, **given)


def weights(policy: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def test_fit_ends_with_the_weights_of_a_run_of_the_same_settings(tmp_path: Path) -> None:
    config = RunConfig(
        name="run",
        out=str(tmp_path),
        updates=5,
        prompts_per_rollout=4,
        trainer=TrainerConfig(**SETTINGS),
        eval=EvalConfig(final_prompts=8),
    )
    hmpo.train(config)
    result = load_policy(PolicyConfig(path=str(tmp_path / "run" / "policy"))).model
    own = trainer()
    own.fit(task(), 5, prompts_per_rollout=4)
    assert torch.equal(weights(own.policy), weights(result))


def test_fit_in_two_parts_is_fit_in_one_also_inside_a_rollout() -> None:
    whole, parts = trainer(), trainer()
    expected = whole.fit(task(), 5, prompts_per_rollout=4)
    first = parts.fit(task(), 3, prompts_per_rollout=4)
    second = parts.fit(task(), 2, prompts_per_rollout=4)
    assert [r["loss"] for r in first + second] == [r["loss"] for r in expected]
    assert torch.equal(weights(parts.policy), weights(whole.policy))


def test_fit_calls_back_with_each_update_and_works_for_gspo() -> None:
    seen: list[float] = []
    own = trainer(GSPOTrainer, GSPOConfig)
    records = own.fit(task(), 2, prompts_per_rollout=4, on_update=lambda r: seen.append(r["loss"]))
    assert seen == [record["loss"] for record in records]
    assert own.step == 2


def test_no_updates_change_nothing() -> None:
    own = trainer()
    before = weights(own.policy)
    assert own.fit(task(), 0) == []
    assert torch.equal(weights(own.policy), before)


def test_a_trainer_whose_responses_end_elsewhere_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"stop: got \(\) for the trainer"):
        trainer(stop=()).fit(task(), 1)


@pytest.mark.parametrize(
    ("updates", "prompts", "field"), [(-1, 4, "updates"), (1, 0, "prompts_per_rollout")]
)
def test_numbers_out_of_range_are_refused(updates: int, prompts: int, field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: got"):
        trainer().fit(task(), updates, prompts_per_rollout=prompts)
