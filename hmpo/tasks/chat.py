"""Prompts as conversations: a system turn, solved examples as turns, text as a user's turn."""

import dataclasses
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hmpo.config import TaskConfig
from hmpo.errors import TaskError
from hmpo.rewards.messages import content_text, is_conversation, last_text
from hmpo.tasks.base import Example, GeneratedTask, Task
from hmpo.tasks.rows import RowTask

Prompt = str | list[dict[str, Any]]
FAR = 2**40
"""Index from which the solved examples of a generated task are drawn, far from its prompts."""


def conversation(
    prompt: Prompt, solved: Sequence[tuple[Prompt, str]] = (), system: str = ""
) -> list[dict[str, Any]]:
    """A prompt as messages, solved ones before it.

    Args:
        prompt: text, which becomes a user's turn, or messages.
        solved: pairs of a prompt and its answer: turns of the user and of the assistant.
        system: the system turn, where the prompt has none of its own.
    """
    turns = _turns(prompt)
    own = turns[:1] if turns[0]["role"] == "system" else []
    before = own or ([{"role": "system", "content": system}] if system else [])
    shots = [turn for asked, answer in solved for turn in _answered(asked, answer)]
    return [*before, *shots, *turns[len(own) :]]


def _turns(prompt: Prompt) -> list[dict[str, Any]]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [dict(turn) for turn in prompt]


def _answered(prompt: Prompt, answer: str) -> list[dict[str, Any]]:
    """The turns of a solved example, without the system's; one that is left open is completed."""
    turns = [turn for turn in _turns(prompt) if turn["role"] != "system"]
    begun = turns.pop() if turns and turns[-1]["role"] == "assistant" else None
    text = answer if begun is None else content_text(begun) + answer
    return [*turns, {"role": "assistant", "content": text}]


class ChatTask:
    """A task of texts, asked as conversations (implements `Task`).

    Args:
        inner: the task, without solved examples of its own.
        config: system turn and number of solved examples.
        seed: of the solved examples.
        unseeded: makes the task of seed 0, whose training examples held-out ones are shown,
            whatever the seed.
    """

    def __init__(
        self, inner: Task, config: TaskConfig, seed: int, unseeded: Callable[[], Task]
    ) -> None:
        self.unseeded = functools.cache(unseeded)
        self.inner, self.system, self.shots, self.seed = inner, config.system, config.shots, seed
        self.name, self.level, self.levels = inner.name, inner.level, inner.levels
        self.stop, self.max_new_tokens = inner.stop, inner.max_new_tokens
        self.chat = True
        self.of_text = isinstance(inner.train(0).prompt, str)
        if self.shots and "answer" not in inner.train(0).columns:
            raise TaskError(
                f"task.shots: got {self.shots}, expected 0: task {self.name} has no `answer` "
                "column to show"
            )

    @property
    def heldout_size(self) -> int:
        """Number of held-out examples of the task, where it knows."""
        return self.inner.heldout_size  # type: ignore[attr-defined]

    def train(self, index: int) -> Example:
        """Training example number `index` >= 0: a function of (seed, index) alone."""
        return self._asked(self.inner.train(index), f"{self.seed}/{index}", self.inner)

    def heldout(self, index: int) -> Example:
        """Held-out example number `index` >= 0: the same for every seed."""
        shown = self.unseeded() if self.shots and self.seed else self.inner
        return self._asked(self.inner.heldout(index), f"heldout/{index}", shown)

    def reward(
        self, prompts: list, completions: list, completion_ids: list, **columns: Any
    ) -> list[float]:
        """What the task itself says of the texts."""
        if self.of_text:
            prompts = [content_text(p[-1]) if is_conversation(p) else p for p in prompts]
            completions = list(map(last_text, completions))
        return self.inner.reward(prompts, completions, completion_ids, **columns)

    def _asked(self, example: Example, key: str, shown: Task) -> Example:
        shots = self._solved(example, key, shown)
        solved = [(shot.prompt, str(shot.columns["answer"])) for shot in shots]
        prompt = conversation(example.prompt, solved, self.system)
        return dataclasses.replace(example, prompt=prompt)

    def _solved(self, example: Example, key: str, shown: Task) -> Iterator[Example]:
        """Solved examples of a task, all different, none of them the example itself."""
        rng = random.Random(f"chat/shots/{self.name}/{key}")
        seen = [example.prompt]
        for _ in range(100 * self.shots):
            if len(seen) > self.shots:
                return
            shot = shown.train(FAR + rng.randrange(FAR))
            if shot.prompt not in seen:
                seen.append(shot.prompt)
                yield shot
        if len(seen) <= self.shots:
            raise TaskError(
                f"task {self.name}: too few training prompts for {self.shots} shots; take fewer"
            )


def as_configured(task: Task, config: TaskConfig, seed: int, unseeded: Callable[[], Task]) -> Task:
    """The task, asked as conversations where `config` says so.

    Args:
        task: made without solved examples where `config.chat`.
        config: `chat`, `system` and `template_options`.
        seed: of solved examples.
        unseeded: makes the task as it is with seed 0.

    Raises:
        TaskError: a setting that nothing would read.
    """
    asks = is_chat(task)
    if asks and config.chat and not getattr(task, "chat", False):
        raise TaskError(f"task.chat: got true, expected false: task {task.name} asks messages")
    if not asks and not config.chat:
        for name in ("system", "template_options"):
            value = getattr(config, name)
            if value:
                raise TaskError(
                    f"task.{name}: got {value!r}, expected none: the prompts are text, and "
                    "task.chat = true makes conversations of them"
                )
        return task
    if getattr(task, "chat", False) or (asks and not config.system):
        return task
    if asks:
        config = dataclasses.replace(config, shots=0)  # they are the task's own
    return ChatTask(task, config, seed, unseeded)


def is_chat(task: Task) -> bool:
    """Whether a task asks conversations."""
    if isinstance(task, GeneratedTask | RowTask | ChatTask):
        return getattr(task, "chat", False)
    return is_conversation(task.train(0).prompt)
