"""Advantages inside TRL: per token, and by an estimator that TRL has."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from hmpo.adapters.trl.config import ESTIMATORS
from hmpo.errors import ConfigError, ShapeError
from hmpo.objective.estimators import estimate_advantages
from tests.adapters.gradients import (
    ROWS,
    direct_gradient,
    make_batch,
    make_trainer,
    trl_gradient,
    with_old,
)
from tests.adapters.test_trl import config


@pytest.mark.parametrize("name", ["hmpo", "gspo", "cispo", "dppo_tv"])
def test_equal_advantages_per_token_have_the_gradient_of_one_per_response(
    tmp_path: Path, name: str
) -> None:
    trainer = make_trainer(str(tmp_path), objective=name)
    batch = with_old(trainer.model, make_batch())
    one = trl_gradient(trainer, batch)
    trainer._forget()
    batch["advantages"] = batch["advantages"][:, None].expand(-1, 10)
    assert torch.equal(trl_gradient(trainer, batch), one)


def test_advantages_per_token_are_used_where_a_mean_is_of_one(tmp_path: Path) -> None:
    varying = torch.randn(ROWS, 10, generator=torch.Generator().manual_seed(2))
    tokens = {"member": "grpo", "segments": "token"}
    trainer = make_trainer(str(tmp_path / "token"), objective=tokens)
    batch = with_old(trainer.model, make_batch())
    batch["advantages"] = varying
    found, own = trl_gradient(trainer, batch), direct_gradient(trainer, batch)
    assert float((found - own).norm() / own.norm()) < 1e-6
    trainer = make_trainer(str(tmp_path / "response"), objective="hmpo")
    with pytest.raises(ShapeError, match="advantages: got several in segment"):
        trl_gradient(trainer, batch)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_has_trls_own_settings_and_gives_our_advantages(
    tmp_path: Path, name: str
) -> None:
    """TRL adds 1e-4 to each deviation."""
    told: dict[str, Any] = {}

    def first(prompts, completions, completion_ids, **columns):
        values = [len(set(ids)) / 10 + i / 7 for i, ids in enumerate(completion_ids)]
        told["first"] = [None if i == 1 else v for i, v in enumerate(values)]
        return told["first"]

    def second(prompts, completions, completion_ids, **columns):
        told["second"] = [None if i in (1, 2) else float(i % 3) for i in range(len(completions))]
        return told["second"]

    trainer = make_trainer(
        str(tmp_path),
        estimator=name,
        max_steps=1,
        reward_weights=[1.0, 0.5],
        reward=[first, second],
    )
    made = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda given: told.setdefault("made", made(given))
    trainer.train()
    table = torch.tensor(
        [[math.nan if v is None else v for v in told[key]] for key in ("first", "second")]
    ).T
    valid = ~table.isnan()
    total = (table.nan_to_num(0.0) * torch.tensor([1.0, 0.5])).sum(1)
    groups = torch.arange(len(total)) // trainer.num_generations
    if name == "gdpo":
        weights = torch.tensor([1.0, 0.5])
        ours = estimate_advantages(table, groups, name, valid=valid, weights=weights)
    else:
        ours = estimate_advantages(total, groups, name, valid=valid.any(1))
    order = told["made"]["advantages"]
    torch.testing.assert_close(order, ours.values.float(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"estimator": "rloo"},
        {"estimator": "reinforce_pp"},
        {"estimator": "group", "scale_rewards": "batch"},
        {"estimator": "batch_std", "multi_objective_aggregation": "normalize_then_sum"},
    ],
)
def test_an_estimator_that_trl_lacks_or_contradicts_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"(estimator|scale_rewards|aggregation): got"):
        config(**settings)
