"""Prompts from a JSONL file of your own: one object a line, with a prompt and any columns."""

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hmpo.config import TaskConfig
from hmpo.config.formats import file_kind
from hmpo.errors import TaskError
from hmpo.tasks.base import Example, check_rows, is_heldout, same_stripped
from hmpo.tasks.options import read_options, require_option, stop_strings

RESERVED = ("prompts", "completions", "completion_ids")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row(Example):
    """An example with its place."""

    place: str
    """File and line, for messages."""


class JsonlTask:
    """Examples of a file (implements `Task`), each once an epoch in an order of its own.

    Options: `path`; `heldout_path`, a second file, else one prompt in eight is held out by its
    hash; `prompt_field` ("prompt") and `answer_field` ("answer"). Every other field becomes a
    column, None where a line lacks it. With answers, the default reward is an exact match up
    to white space at both ends; without, give reward functions of your own.
    """

    level = 1
    levels = 1

    def __init__(self, config: TaskConfig, seed: int) -> None:
        options = read_options(
            config,
            {"path": "", "heldout_path": "", "prompt_field": "prompt", "answer_field": "answer"},
        )
        if config.level not in (None, 1):
            raise TaskError(
                f"task.level: got {config.level}, expected none: a file of prompts has no levels"
            )
        require_option(bool(options["path"]), "path", options["path"], "the path of a JSONL file")
        self.name = config.name
        self.stop = stop_strings(config)
        self.seed = seed
        self.shots = config.shots
        rows = _read(options["path"], options["prompt_field"], options["answer_field"])
        if options["heldout_path"]:
            held = _read(options["heldout_path"], options["prompt_field"], options["answer_field"])
            self._train, self._heldout = rows, held
            self._refuse_overlap(options)
        else:
            self._train = [row for row in rows if not is_heldout(self.name, row.prompt)]
            self._heldout = [row for row in rows if is_heldout(self.name, row.prompt)]
        for split, examples in (("training", self._train), ("held-out", self._heldout)):
            if not examples:
                raise TaskError(
                    f"task {self.name}: no {split} prompts among the {len(rows)} of "
                    f"{options['path']}; add prompts, or give task.options.heldout_path"
                )
        _square([*self._train, *self._heldout])
        answers = [row.columns.get("answer") for row in [*self._train, *self._heldout]]
        self._has_answers = None not in answers
        if self.shots and not self._has_answers:
            raise TaskError("task.shots: got solved examples, expected an answer in every line")
        if self.shots >= len(self._train):
            raise TaskError(f"task.shots: got {self.shots}, expected < {len(self._train)} prompts")
        longest = max((len(str(answer)) for answer in answers), default=0)
        self.max_new_tokens = longest + 2 if self._has_answers else 256
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def heldout_size(self) -> int:
        """Number of held-out examples; they repeat beyond it."""
        return len(self._heldout)

    def train(self, index: int) -> Example:
        """Training example number `index` >= 0: a function of (seed, index) alone."""
        require_option(index >= 0, "index", index, "an integer >= 0")
        epoch, place = divmod(index, len(self._train))
        if self._order[0] != epoch:
            order = list(range(len(self._train)))
            random.Random(f"jsonl/{self.seed}/{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._with_shots(self._train[self._order[1][place]], f"{self.seed}/{index}")

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

    def every_prompt(self) -> Iterator[tuple[str, str]]:
        """(file and line, prompt as it is asked) of all examples, in their first epoch."""
        for index, row in enumerate(self._heldout):
            yield row.place, self.heldout(index).prompt
        for index in range(len(self._train)):
            example = self.train(index)
            yield self._train[self._order[1][index]].place, example.prompt

    def _with_shots(self, row: _Row, key: str) -> Example:
        """The example behind solved ones of the training split."""
        if not self.shots:
            return row
        rng = random.Random(f"jsonl/shots/{key}")
        others = rng.sample(self._train, self.shots + 1)
        solved = [other for other in others if other.prompt != row.prompt][: self.shots]
        end = (self.stop or ("\n",))[0]
        text = "".join(f"{o.prompt}{o.columns['answer']}{end}" for o in solved)
        return dataclasses.replace(row, prompt=text + row.prompt)

    def _refuse_overlap(self, options: dict[str, Any]) -> None:
        heldout = {row.prompt for row in self._heldout}
        for row in self._train:
            if row.prompt in heldout:
                raise TaskError(
                    f"task.options.heldout_path: prompt {row.prompt[:60]!r} is also in "
                    f"{options['path']}, expected disjoint files; remove it from one"
                )


def _read(path: str, prompt_field: str, answer_field: str) -> list[_Row]:
    """The examples of a file; errors name its line."""
    try:
        place = Path(path).expanduser()
        if place.exists() and not (place.is_file() or place.is_dir()):
            raise TaskError(f"task.options: {path} is no regular file; give a file of JSON lines")
        data = place.read_bytes()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TaskError(f"task.options: cannot read {path}: {reason}") from None
    kind = file_kind(data)
    if kind is not None:
        raise TaskError(f"task.options: {path} is {kind}, expected JSONL; convert it")
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        reason = "it is not UTF-8 text"
        raise TaskError(f"task.options: cannot read {path}: {reason}") from None
    examples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TaskError(f"{where}: not JSON ({error}); write one object a line") from None
        if not isinstance(row, dict):
            raise TaskError(f"{where}: got a {type(row).__name__}, expected an object")
        prompt = row.pop(prompt_field, None)
        if not isinstance(prompt, str) or not prompt:
            raise TaskError(f"{where}: {prompt_field} is {prompt!r}, expected text")
        for name in RESERVED:
            if name in row:
                raise TaskError(f"{where}: the field {name!r} is taken; rename it")
        if answer_field in row:
            row["answer"] = row.pop(answer_field)
        examples.append(_Row(prompt=prompt, columns=row, place=where))
    return examples


def _square(examples: list[_Row]) -> None:
    """Give every example the same columns, None where a line had no such field."""
    names = dict.fromkeys(name for example in examples for name in example.columns)
    for example in examples:
        for name in names:
            example.columns.setdefault(name, None)
