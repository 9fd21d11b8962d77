"""Verifiable tasks: built-in ones, reasoning-gym, and prompts from a JSONL file."""

from collections.abc import Callable

from hmpo.config import TaskConfig
from hmpo.errors import TaskError
from hmpo.rewards.loading import load_object, nearest
from hmpo.tasks.alphabet import ALPHABET
from hmpo.tasks.base import Example, Task
from hmpo.tasks.countdown import countdown_task
from hmpo.tasks.digits import reverse_task, sort_task
from hmpo.tasks.gym import PREFIX, gym_task
from hmpo.tasks.jsonl import JsonlTask
from hmpo.tasks.key import key_task
from hmpo.tasks.largest import largest_task

__all__ = ["ALPHABET", "BUILT_IN", "Example", "Task", "make_task"]

BUILT_IN: dict[str, Callable[[TaskConfig, int], Task]] = {
    "sort": sort_task,
    "reverse": reverse_task,
    "countdown": countdown_task,
    "largest": largest_task,
    "key": key_task,
    "jsonl": JsonlTask,
}
"""Built-in tasks by name."""


def make_task(config: TaskConfig, seed: int = 0) -> Task:
    """The task that `config` names.

    Args:
        config: name, level, shots, options and stop strings.
        seed: seed of the training prompts; held-out prompts do not depend on it.

    Raises:
        TaskError: an unknown name, level or option, in one line with a hint.
    """
    if config.shots < 0:
        raise TaskError(f"task.shots: got {config.shots}, expected an integer >= 0")
    if any(text == "" for text in config.stop or ()):
        raise TaskError(f"task.stop: got {config.stop!r}, expected strings that are not empty")
    if config.name in BUILT_IN:
        return BUILT_IN[config.name](config, seed)
    if config.name.startswith(PREFIX):
        return gym_task(config, seed)
    if ":" in config.name:
        return _own_task(config, seed)
    known = [*BUILT_IN, f"{PREFIX}NAME", "module:name"]
    raise TaskError(f"task.name: got {config.name!r}; {nearest(config.name, known)}")


def _own_task(config: TaskConfig, seed: int) -> Task:
    """A user's own task: `module:name` names a function of (config, seed) that makes it."""
    factory = load_object(config.name, "task", TaskError)
    if not callable(factory):
        raise TaskError(f"task.name: {config.name} is no function of (config, seed)")
    task = factory(config, seed)
    if not isinstance(task, Task):
        parts = [part for part in Task.__annotations__ if part not in dir(task)]
        parts += [part for part in ("train", "heldout", "reward") if part not in dir(task)]
        raise TaskError(f"task.name: {config.name} made no task; it lacks {', '.join(parts)}")
    return task
