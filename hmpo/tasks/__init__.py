"""Verifiable tasks: built-in ones, reasoning-gym, and prompts from a JSONL file."""

from collections.abc import Callable

from hmpo.config import TaskConfig
from hmpo.errors import TaskError
from hmpo.rewards.loading import nearest
from hmpo.tasks.alphabet import ALPHABET
from hmpo.tasks.base import Example, Task
from hmpo.tasks.countdown import countdown_task
from hmpo.tasks.digits import reverse_task, sort_task
from hmpo.tasks.key import key_task
from hmpo.tasks.largest import largest_task

__all__ = ["ALPHABET", "BUILT_IN", "Example", "Task", "make_task"]

BUILT_IN: dict[str, Callable[[TaskConfig, int], Task]] = {
    "sort": sort_task,
    "reverse": reverse_task,
    "countdown": countdown_task,
    "largest": largest_task,
    "key": key_task,
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
    if any(text == "" for text in config.stop):
        raise TaskError(f"task.stop: got {config.stop!r}, expected strings that are not empty")
    if config.name in BUILT_IN:
        return BUILT_IN[config.name](config, seed)
    raise TaskError(f"task.name: got {config.name!r}; {nearest(config.name, BUILT_IN)}")
