"""What tasks that list their prompts share: order by epoch, held-out part, answers, places."""

import dataclasses
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hmpo.errors import TaskError
from hmpo.tasks.base import Example, check_rows, same_stripped
from hmpo.tasks.options import require_option

RESERVED = ("prompts", "completions", "completion_ids")
"""Names that reward functions get from the trainer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowExample(Example):
    """An example with its place."""

    place: str
    """File and line, for messages."""

    @property
    def key(self) -> str:
        """The prompt as text: what tells it from others, and what the split is taken on."""
        prompt = self.prompt
        return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


class RowTask:
    """Listed examples, each once an epoch in an order of its own (implements `Task`).

    A subclass sets name, stop, seed and shots, and calls `_take`.
    """

    level = 1
    levels = 1
    name: str
    stop: tuple[str, ...]
    seed: int
    shots: int
    shuffle = True
    """Whether each epoch has an order of its own; else it is that of the file."""
    _train: list[RowExample]
    _heldout: list[RowExample]

    def _take(self, train: list[RowExample], heldout: list[RowExample]) -> None:
        """Take the examples, with the same columns in all of them."""
        self._train, self._heldout = train, heldout
        square([*train, *heldout])
        answers = [row.columns.get("answer") for row in [*train, *heldout]]
        self._has_answers = None not in answers
        if self.shots and not self._has_answers:
            raise TaskError("task.shots: got solved examples, expected an answer in every line")
        different = len({row.key for row in train}) if self.shots else 0
        if self.shots and self.shots >= different:
            raise TaskError(
                f"task.shots: got {self.shots}, expected < {different} prompts that differ"
            )
        longest = max((len(str(answer)) for answer in answers), default=0)
        self.max_new_tokens = longest + 2 if self._has_answers else 256
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def heldout_size(self) -> int:
        """Number of held-out examples; they repeat beyond it."""
        return len(self._heldout)

    @property
    def train_size(self) -> int:
        """Number of training examples, of which each comes once an epoch."""
        return len(self._train)

    def train_key(self, index: int) -> str:
        """What tells the training example at `index` from others: its own prompt."""
        return self._train[self._place(index)].key

    def train(self, index: int) -> Example:
        """Training example number `index` >= 0: a function of (seed, index) alone."""
        require_option(index >= 0, "index", index, "an integer >= 0")
        return self._with_shots(self._train[self._place(index)], f"{self.seed}/{index}")

    def heldout(self, index: int) -> Example:
        """Held-out example number `index` >= 0, in the order of the file."""
        require_option(index >= 0, "index", index, "an integer >= 0")
        index %= len(self._heldout)
        return self._with_shots(self._heldout[index], f"heldout/{index}")

    def reward(
        self, prompts: list, completions: list, completion_ids: list, **columns: Any
    ) -> list[float]:
        """1.0 where the completion is the answer, else 0.0; needs answers in the file."""
        self.refuse_own_reward()
        return check_rows(same_stripped, completions, columns, self.stop, self.name)

    def refuse_own_reward(self) -> None:
        """Refuse to check answers that the file does not have.

        Raises:
            TaskError: the first line without an answer.
        """
        for row in (*self._train, *self._heldout):
            if row.columns.get("answer") is None:
                raise TaskError(
                    f"{row.place}: no answer; task {self.name} checks answers, so give each line "
                    "one, or give rewards.functions"
                )

    def every_prompt(self) -> Iterator[tuple[str, Any]]:
        """(file and line, prompt as it is asked) of all examples, in their first epoch."""
        for index, row in enumerate(self._heldout):
            yield row.place, self.heldout(index).prompt
        for index in range(len(self._train)):
            example = self.train(index)
            yield self._train[self._place(index)].place, example.prompt

    def _place(self, index: int) -> int:
        """Which of the training examples comes at `index`."""
        epoch, place = divmod(index, len(self._train))
        if not self.shuffle:
            return place
        if self._order[0] != epoch:
            order = list(range(len(self._train)))
            random.Random(f"jsonl/{self.seed}/{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1][place]

    def _with_shots(self, row: RowExample, key: str) -> Example:
        """The example behind solved ones of the training split."""
        if not self.shots:
            return row
        solved = self._solved(self._train, row, key)
        end = (self.stop or ("\n",))[0]
        text = "".join(f"{o.prompt}{o.columns['answer']}{end}" for o in solved)
        return dataclasses.replace(row, prompt=f"{text}{row.prompt}")

    def _solved(self, rows: list[RowExample], row: RowExample, key: str) -> list[RowExample]:
        """As many of these as there are shots, all different, none of them the example itself."""
        rng = random.Random(f"jsonl/shots/{key}")
        drawn = {other.key: other for other in rng.sample(rows, self.shots + 1)}
        found = [other for key, other in drawn.items() if key != row.key][: self.shots]
        if len(found) < self.shots:  # some are in the file more than once
            rest = {o.key: o for o in rows if o.key not in drawn and o.key != row.key}
            found += rng.sample(list(rest.values()), self.shots - len(found))
        return found


def square(examples: Sequence[Example]) -> None:
    """Give every example the same columns, None where a line had no such field."""
    names = dict.fromkeys(name for example in examples for name in example.columns)
    for example in examples:
        for name in names:
            example.columns.setdefault(name, None)


Count = Callable[[Sequence[Any]], list[int]]
"""Tokens of each of some prompts."""
