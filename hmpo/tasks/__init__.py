"""Verifiable tasks: built-in ones, reasoning-gym, and prompts and conversations of your own."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

from hmpo.config import TaskConfig
from hmpo.config.run import VERIFIERS
from hmpo.errors import HmpoError, TaskError
from hmpo.rewards.loading import check_object, load_object, nearest
from hmpo.rewards.messages import is_conversation
from hmpo.rewards.values import one_line, shown
from hmpo.tasks.alphabet import ALPHABET
from hmpo.tasks.base import Example, Task
from hmpo.tasks.carry import carry_task
from hmpo.tasks.chat import as_configured, is_chat
from hmpo.tasks.countdown import countdown_task
from hmpo.tasks.data import DataTask
from hmpo.tasks.digits import reverse_task, sort_task
from hmpo.tasks.gym import PREFIX, gym_task
from hmpo.tasks.jsonl import JsonlTask
from hmpo.tasks.key import key_task
from hmpo.tasks.largest import largest_task
from hmpo.tasks.verifiers import VerifiersTask, refuse_missing

__all__ = [
    "ALPHABET",
    "BUILT_IN",
    "Example",
    "Task",
    "check_name",
    "is_chat",
    "made_from",
    "make_task",
]

BUILT_IN: dict[str, Callable[[TaskConfig, int], Task]] = {
    "sort": sort_task,
    "reverse": reverse_task,
    "countdown": countdown_task,
    "largest": largest_task,
    "key": key_task,
    "carry": carry_task,
    "jsonl": JsonlTask,
    "data": DataTask,
}
"""Built-in tasks by name."""
MADE_FROM = "_hmpo_made_from"
"""Attribute of a task that holds its settings."""


def make_task(config: TaskConfig, seed: int = 0) -> Task:
    """The task that `config` names.

    Args:
        config: name, level, shots, options, stop strings, and whether it asks conversations.
        seed: seed of the training prompts; held-out prompts do not depend on it.

    Raises:
        TaskError: an unknown name, level or option, in one line with a hint.
    """
    check_name(config)
    inner = config
    if config.chat and config.name != "data":
        # the template ends a turn, and solved examples are turns
        stop = () if config.stop is None else config.stop
        inner = dataclasses.replace(config, shots=0, stop=stop)
    make = BUILT_IN.get(config.name) or _named_maker(config.name)
    task = as_configured(make(inner, seed), config, seed, lambda: make(inner, 0))
    with contextlib.suppress(AttributeError):  # one of a user's own may have no room for it
        object.__setattr__(task, MADE_FROM, config)
    return task


def made_from(task: Task) -> TaskConfig | None:
    """The settings that a task was made from, where `make_task` made it."""
    found = getattr(task, MADE_FROM, None)
    return found if isinstance(found, TaskConfig) else None


def check_name(config: TaskConfig) -> None:
    """Refuse what needs no task to be seen: an unknown name, empty stop strings, a missing file.

    Raises:
        TaskError: one line that names the setting.
    """
    if config.shots < 0:
        raise TaskError(f"task.shots: got {config.shots}, expected an integer >= 0")
    if any(text == "" for text in config.stop or ()):
        raise TaskError(f"task.stop: got {config.stop!r}, expected strings that are not empty")
    if config.name == "jsonl" and config.chat:
        raise TaskError(
            'task.chat: got true, expected false: jsonl asks texts; task.name = "data" with '
            "task.options.train asks them as conversations"
        )
    if config.max_turns < 1:
        raise TaskError(f"task.max_turns: got {config.max_turns}, expected an integer >= 1")
    if config.environment:
        check_object(config.environment, "task.environment", TaskError)
    if config.name.startswith(VERIFIERS):
        refuse_missing()
        return
    if config.name in BUILT_IN or config.name.startswith(PREFIX):
        return
    if ":" not in config.name:
        known = [*BUILT_IN, f"{PREFIX}NAME", f"{VERIFIERS}ID", "module:name"]
        raise TaskError(f"task.name: got {config.name!r}; {nearest(config.name, known)}")
    check_object(config.name, "task", TaskError)


def _named_maker(name: str) -> Callable[[TaskConfig, int], Task]:
    """What makes the tasks whose names begin like this one."""
    if name.startswith(VERIFIERS):
        return VerifiersTask
    return gym_task if name.startswith(PREFIX) else _own_task


def _own_task(config: TaskConfig, seed: int) -> Task:
    """A user's own task: `module:name` names a function of (config, seed) that makes it."""
    factory = load_object(config.name, "task", TaskError)
    if not callable(factory):
        raise TaskError(f"task.name: {config.name} is no function of (config, seed)")
    with _named(config.name):
        task = factory(config, seed)
    if not isinstance(task, Task):
        parts = [part for part in Task.__annotations__ if part not in dir(task)]
        parts += [part for part in ("train", "heldout", "reward") if part not in dir(task)]
        raise TaskError(f"task.name: {config.name} made no task; it lacks {', '.join(parts)}")
    for split in ("train", "heldout"):
        with _named(f"{config.name}, {split}(0),"):
            example = getattr(task, split)(0)
        prompt = getattr(example, "prompt", None)
        sound = isinstance(prompt, str) or is_conversation(prompt)
        if not sound or not isinstance(getattr(example, "columns", None), dict):
            raise TaskError(
                f"task.name: {config.name}, {split}(0) gave {shown(example, 60)}, expected an "
                "Example with a prompt (text, or messages) and columns (a dict)"
            )
    return task


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Whatever a user's own code raises inside, as one line that names it."""
    try:
        yield
    except HmpoError:
        raise
    except (Exception, SystemExit) as error:
        text = f"{type(error).__name__}: {one_line(error)}"
        raise TaskError(f"task.name: {what} raised {text}; mend it") from error
