"""`Trainer.fit` trains on a task as a run does, and goes on where it stopped."""

import json
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
from hmpo.environments import Environments
from hmpo.errors import ConfigError, TaskError
from hmpo.models import load_policy
from hmpo.models.chat import PromptOptions
from hmpo.run.build import build_optimizer
from hmpo.tasks import Task, make_task
from hmpo.trainer.gspo import GSPOTrainer
from hmpo.trainer.power_mean import HMPOTrainer
from tests.environments.games import Endless

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


def data(folder: Path, overlong: str) -> Task:
    """Prompts of 4 and of 13 tokens, of which 6 are allowed."""
    rows = [{"prompt": "1" * (3 if n % 2 else 12) + ">", "answer": "1"} for n in range(60)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "b.jsonl").write_text('{"prompt": "2>", "answer": "2"}\n')
    files = {"train": str(folder / "a.jsonl"), "held_out": str(folder / "b.jsonl")}
    limits = {"max_prompt_length": 6, "overlong": overlong}
    return make_task(TaskConfig(name="data", options=files | limits))


def test_prompts_that_a_task_does_not_allow_are_left_out_cut_or_refused_as_in_a_run(
    tmp_path: Path,
) -> None:
    drops = data(tmp_path, "drop")
    own = trainer(stop=drops.stop)
    own.fit(drops, 1, prompts_per_rollout=8)
    assert {sample["prompt"] for sample in own.samples} == {"111>"}
    (event,) = [e for e in own.drain_events() if e.name == "prompts_left_out"]
    assert event.data == {"dropped_train": 30}
    cuts = data(tmp_path, "truncate_left")
    with pytest.raises(ConfigError, match=r"^max_tokens: got None for the trainer and 6 for task"):
        trainer(stop=cuts.stop).fit(cuts, 1)
    own = trainer(stop=cuts.stop, prompt_options=PromptOptions(max_tokens=6))
    own.fit(cuts, 1, prompts_per_rollout=8)
    assert own.samples and own.batch is not None
    assert int(own.batch.rollout.prompt_mask.sum(1).max()) == 6
    with pytest.raises(TaskError, match=r"a\.jsonl, line 1: prompt of 1\d tokens, expected"):
        trainer(stop=drops.stop).fit(data(tmp_path, "error"), 1)


def test_a_trainer_that_would_not_read_what_the_task_was_made_with_is_refused() -> None:
    told = {"brief": True}
    asked = make_task(TaskConfig(name="sort", chat=True, template_options=told))
    with pytest.raises(ConfigError, match=r"^template_options: got \{\} for the trainer and \{'br"):
        trainer(stop=asked.stop).fit(asked, 1)
    read = trainer(stop=asked.stop, prompt_options=PromptOptions(template=told))
    assert read.fit(asked, 0) == []
    spec = "tests.environments.games:Endless"
    talks = make_task(TaskConfig(name="sort", environment=spec, max_turns=3))
    with pytest.raises(ConfigError, match=f"^environment: got none for the trainer and {spec}"):
        trainer().fit(talks, 1)
    tokenizer = load_policy(PolicyConfig(path="tiny-sort")).tokenizer
    for turns, refused in ((16, True), (3, False)):
        given = Environments(Endless, tokenizer=tokenizer, max_turns=turns)
        own = trainer(environment=given)
        if refused:
            with pytest.raises(ConfigError, match=r"^max_turns: got 16 for the trainer and 3 for"):
                own.fit(talks, 0)
        else:
            assert own.fit(talks, 0) == []
