"""A trainer and a task, without a run: for a notebook, a script, a first look."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hmpo.errors import ConfigError, require
from hmpo.models.chat import PromptOptions
from hmpo.tasks import Task, made_from
from hmpo.tasks.base import gather_columns
from hmpo.trainer.prompts import fit_prompts
from hmpo.trainer.rollout import Collector
from hmpo.types import Event, Metrics

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
        task: whose training prompts are asked, in its order, going on where the last call ended;
            it leaves out those that are longer than it allows, which is an event.
        updates: optimizer updates to make, 0 or more.
        prompts_per_rollout: prompts of one rollout; each gets `config.group_size` responses.
        on_update: called with the metrics of each update, after it.

    Returns:
        Metrics of each update by telemetry name.

    Raises:
        ConfigError: a number out of range, or a trainer that would not read what the task was
            made with: ends of responses, template options, a length to cut prompts to, an
            environment.
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
    _refuse_unread(trainer.collector, task)
    if trainer.collector.tokenizer is not None:
        options = trainer.collector.prompt_options or PromptOptions()
        told = fit_prompts(task, trainer.collector.tokenizer, options)
        if told and not trainer.rollouts:
            trainer.events.append(Event(name="prompts_left_out", step=trainer.step, data=told))
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


def _refuse_unread(collector: Collector, task: Task) -> None:
    """Refuse a trainer that reads prompts, or talks, otherwise than the task was told to."""
    options, talks = collector.prompt_options or PromptOptions(), collector.environments
    limit = getattr(task, "truncate_at", None)
    pairs: list[tuple[str, Any, Any, str]] = [
        ("max_tokens", options.max_tokens, limit, "prompt_options=PromptOptions(max_tokens=...)")
    ]
    config = made_from(task)
    if config is not None:
        own = dict(options.template)
        asked = config.template_options or None
        pairs.append(("template_options", own, asked, "prompt_options=PromptOptions(template=...)"))
    if config is not None and config.talks_with:
        if talks is None:
            raise ConfigError(
                f"environment: got none for the trainer and {config.talks_with} for task "
                f"{task.name}, expected one for both; give the trainer environment=..."
            )
        pairs.append(("max_turns", talks.max_turns, config.max_turns, "max_turns=..."))
    for name, got, asked, remedy in pairs:
        if asked is not None and got != asked:
            raise ConfigError(
                f"{name}: got {got!r} for the trainer and {asked!r} for task {task.name}, expected "
                f"one for both; give the trainer {remedy}"
            )
