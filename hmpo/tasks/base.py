"""What a task is, and the generated tasks: endless prompts with a train/held-out split.

The split is by construction: SHA-256 of the canonical instance says on which side it lies,
whatever the seed, the level or the index. Two prompts that ask the same (a permutation of the
numbers to sort, say) have one canonical form, so they never lie on different sides.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from hmpo.config import TaskConfig
from hmpo.errors import RewardError, TaskError
from hmpo.rewards.messages import last_text

HELDOUT_SHARE = 8
"""One instance in so many is held out."""
DRAWS = 2000
"""Draws without success after which a split counts as exhausted."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt and what its check needs.

    Example: `Example(prompt="3141592653>", columns={"answer": "1123345569"})`.
    """

    prompt: str | list[dict[str, Any]]
    """Text the policy continues, solved examples included; or a conversation, a list of messages
    with `role` and `content`, that it answers."""
    columns: dict[str, Any]
    """JSON-able values passed to reward functions by name. Where there is an `answer`,
    prompt + answer + stop[0] is a right solution (prompt + answer where nothing stops it)."""


@runtime_checkable
class Task(Protocol):
    """A source of prompts whose answers can be checked.

    `level` counts from 1 (easiest) to `levels`; `stop` holds the strings that end a response;
    `max_new_tokens` is a hint, in characters, that leaves room for every right answer.
    """

    name: str
    level: int
    levels: int
    stop: tuple[str, ...]
    max_new_tokens: int

    def train(self, index: int) -> Example:
        """Training example number `index` >= 0: a function of (seed, index) alone."""
        ...

    def heldout(self, index: int) -> Example:
        """Held-out example number `index` >= 0: the same for every seed."""
        ...

    def reward(
        self, prompts: list, completions: list, completion_ids: list, **columns: Any
    ) -> list[float]:
        """1.0 for each right completion, else 0.0; the signature of reward functions.

        A task that gives less than 1.0, but not 0.0, for a part of an answer says so.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One problem before solved examples are put in front.

    Example: `Instance(canonical="112", prompt="121>", answer="112")`.
    """

    canonical: str
    """What the split is taken on: equal for problems that ask the same."""
    prompt: str
    answer: str
    columns: dict[str, Any] = field(default_factory=dict)
    """Further columns; `answer` is added."""


def gather_columns(examples: Sequence[Example]) -> dict[str, list[Any]]:
    """Columns of several examples, side by side; a column that one lacks holds None there."""
    names = sorted({name for example in examples for name in example.columns})
    return {name: [example.columns.get(name) for example in examples] for name in names}


def is_heldout(name: str, canonical: str) -> bool:
    """On which side of the split of task `name` the instance lies."""
    digest = hashlib.sha256(
        f"split 1\n{name}\n{canonical}".encode("utf-8", "surrogatepass")
    ).digest()
    return int.from_bytes(digest[:8], "big") % HELDOUT_SHARE == 0


def before_stop(completion: object, stop: Sequence[str], name: str) -> str:
    """The completion up to the first stop string (all of it where there is none).

    Of messages, as completions of conversations are, it is what the assistant said last.

    Raises:
        RewardError: the completion is not text.
    """
    completion = last_text(completion)
    if not isinstance(completion, str):
        raise RewardError(
            f"task {name}: got a completion of type {type(completion).__name__}, "
            "expected text; give the trainer a tokenizer"
        )
    ends = [at for text in stop if (at := completion.find(text)) >= 0]
    return completion[: min(ends)] if ends else completion


def check_rows(
    check: Callable[[str, dict[str, Any]], float],
    completions: Sequence[Any],
    columns: dict[str, list],
    stop: Sequence[str],
    name: str,
) -> list[float]:
    """What `check(text before the stop, row of columns)` says of each completion, as a number."""
    if "answer" not in columns:
        raise RewardError(
            f"task {name}: its reward got the columns {sorted(columns)}, expected 'answer'; "
            "pass on the columns of the task's examples, or give reward functions of your own"
        )
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    if len(rows) != len(completions):
        raise RewardError(f"task {name}: {len(completions)} completions, {len(rows)} answers")
    return [
        float(check(before_stop(text, stop, name), row)) for text, row in zip(completions, rows)
    ]


def same_text(text: str, row: dict[str, Any]) -> bool:
    """Strict check: the text is the answer, character by character."""
    return text == row["answer"]


def same_stripped(text: str, row: dict[str, Any]) -> bool:
    """Check up to white space at both ends."""
    return text.strip() == str(row["answer"]).strip()


@dataclass(kw_only=True)
class GeneratedTask:
    """A task whose instances are drawn from a generator (implements `Task`).

    Held-out prompts are distinct until the split is exhausted; then they repeat in order.
    """

    name: str
    level: int
    levels: int
    stop: tuple[str, ...]
    max_new_tokens: int
    generate: Callable[[random.Random], Instance]
    """Draws one instance; all randomness comes from its argument."""
    check: Callable[[str, dict[str, Any]], float] = same_text
    """Says whether the text before the stop is right, given the row of columns: 1 (or true) where
    it is. A wrong answer gets 0, or a part of 1 where the task was asked for it."""
    seed: int = 0
    shots: int = 0
    """Solved examples in front of each prompt; always from the training split."""
    _found: list[Instance] = field(default_factory=list, init=False, repr=False)
    _seen: set[str] = field(default_factory=set, init=False, repr=False)
    _exhausted: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        self._stream = random.Random(self._key("heldout"))

    def train(self, index: int) -> Example:
        """Training example number `index` >= 0: a function of (seed, index) alone."""
        _check_index(index)
        rng = random.Random(self._key("train", self.seed, index))
        return self._example(self._draw_train(rng, avoid=set()), rng)

    def heldout(self, index: int) -> Example:
        """Held-out example number `index` >= 0, the same for every seed.

        Distinct prompts for index < `heldout_size`; beyond the last one they repeat.
        """
        _check_index(index)
        while len(self._found) <= index and not self._exhausted:
            self._find_heldout()
        if not self._found:
            raise TaskError(
                f"task {self.name}: no held-out prompt at level {self.level}; "
                "take a higher level or wider options"
            )
        index %= len(self._found)
        return self._example(self._found[index], random.Random(self._key("shots", index)))

    @property
    def heldout_size(self) -> int:
        """Number of distinct held-out prompts, counted up to 1024."""
        while len(self._found) < 1024 and not self._exhausted:
            self._find_heldout()
        return min(len(self._found), 1024)

    def reward(
        self, prompts: list, completions: list, completion_ids: list, **columns: Any
    ) -> list[float]:
        """1.0 for each right completion, else what `check` gives it, up to the stop."""
        return check_rows(self.check, completions, columns, self.stop, self.name)

    def _key(self, *parts: object) -> str:
        return "/".join(map(str, (self.name, self.level, *parts)))

    def _draw_train(self, rng: random.Random, avoid: set[str]) -> Instance:
        for _ in range(DRAWS):
            instance = self.generate(rng)
            if instance.canonical in avoid or is_heldout(self.name, instance.canonical):
                continue
            return instance
        raise TaskError(
            f"task {self.name}: level {self.level} has too few training prompts for "
            f"{self.shots} shots; take a higher level, fewer shots or wider options"
        )

    def _find_heldout(self) -> None:
        """Add the next unseen held-out instance of the stream, or mark it exhausted."""
        for _ in range(DRAWS):
            instance = self.generate(self._stream)
            if instance.prompt not in self._seen and is_heldout(self.name, instance.canonical):
                self._seen.add(instance.prompt)
                self._found.append(instance)
                return
        self._exhausted = True

    def _example(self, instance: Instance, rng: random.Random) -> Example:
        """The instance behind `shots` solved ones, none of them the instance itself."""
        text, used = "", {instance.canonical}
        for _ in range(self.shots):
            solved = self._draw_train(rng, avoid=used)
            used.add(solved.canonical)
            text += solved.prompt + solved.answer + (self.stop or ("\n",))[0]
        return Example(
            prompt=text + instance.prompt, columns={"answer": instance.answer, **instance.columns}
        )


def _check_index(index: int) -> None:
    if index < 0:
        raise TaskError(f"example index: got {index}, expected an integer >= 0")


def pick_level(config: TaskConfig, *, default: int, levels: int) -> int:
    """The level of `config`, or a TaskError that names the range."""
    level = default if config.level is None else config.level
    if not 1 <= level <= levels:
        raise TaskError(f"task.level: got {level}, expected 1 to {levels} for {config.name}")
    return level
