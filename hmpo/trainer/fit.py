"""A trainer and a task, without a run: for a notebook, a script, a first look."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hmpo.errors import ConfigError, require
from hmpo.tasks import Task
from hmpo.tasks.base import gather_columns
from hmpo.types import Metrics

if TYPE_CHECKING:
    from hmpo.trainer.base import Trainer


def fit(
    trainer: "Trainer[Any]",
    task: Task,
    updates: int,
    *,
    prompts_per_rollout: int = 16,
    on_update: Callable[[Metrics], object] | None = None,
) -> list[Metrics]:
    """Train on the prompts of a task without a run around it; a method of every trainer.

    Args:
        trainer: any trainer, with a tokenizer where prompts are text.
        task: whose training prompts are asked, in its order, going on where the last call ended.
        updates: optimizer updates to make, 0 or more.
        prompts_per_rollout: prompts of one rollout; each gets `config.group_size` responses.
        on_update: called with the metrics of each update, after it.

    Returns:
        Metrics of each update by telemetry name.

    Raises:
        ConfigError: a number out of range, or a trainer whose responses end elsewhere than the
            task's do.
    """
    require(updates >= 0, "updates", updates, "an integer >= 0")
    expected = "an integer >= 1"
    require(prompts_per_rollout >= 1, "prompts_per_rollout", prompts_per_rollout, expected)
    ends = trainer.collector.stop
    if tuple(task.stop) != ends:
        raise ConfigError(
            f"stop: got {ends} for the trainer and {tuple(task.stop)} for task {task.name}, "
            "expected one for both; give the trainer stop=task.stop"
        )
    records = []
    while len(records) < updates:
        if not trainer.pending_updates:
            begin = trainer.rollouts * prompts_per_rollout
            examples = [task.train(begin + i) for i in range(prompts_per_rollout)]
            trainer.begin_rollout([e.prompt for e in examples], gather_columns(examples))
        record = trainer.next_update()
        records.append(record)
        if on_update is not None:
            on_update(record)
    return records
