"""Prompts from a JSONL file of your own: one object a line, with a prompt and any columns."""

import json
from pathlib import Path
from typing import Any

from hmpo.config import TaskConfig
from hmpo.config.formats import file_kind
from hmpo.errors import TaskError
from hmpo.tasks.base import is_heldout
from hmpo.tasks.options import read_options, require_option, stop_strings
from hmpo.tasks.rows import RESERVED, RowExample, RowTask


class JsonlTask(RowTask):
    """Examples of a file (implements `Task`), each once an epoch in an order of its own.

    Options: `path`; `heldout_path`, a second file, else one prompt in eight is held out by its
    hash; `prompt_field` ("prompt") and `answer_field` ("answer"). Every other field becomes a
    column, None where a line lacks it. With answers, the default reward is an exact match up
    to white space at both ends; without, give reward functions of your own.
    """

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
            self._train = [row for row in rows if not is_heldout(self.name, row.key)]
            self._heldout = [row for row in rows if is_heldout(self.name, row.key)]
        for split, examples in (("training", self._train), ("held-out", self._heldout)):
            if not examples:
                raise TaskError(
                    f"task {self.name}: no {split} prompts among the {len(rows)} of "
                    f"{options['path']}; add prompts, or give task.options.heldout_path"
                )
        self._take(self._train, self._heldout)

    def _refuse_overlap(self, options: dict[str, Any]) -> None:
        heldout = {row.key for row in self._heldout}
        for row in self._train:
            if row.key in heldout:
                raise TaskError(
                    f"task.options.heldout_path: prompt {row.key[:60]!r} is also in "
                    f"{options['path']}, expected disjoint files; remove it from one"
                )


def _read(path: str, prompt_field: str, answer_field: str) -> list[RowExample]:
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
            hint = '; task.name = "data" takes messages' if isinstance(prompt, list) else ""
            raise TaskError(f"{where}: {prompt_field} is {prompt!r}, expected text{hint}")
        for name in RESERVED:
            if name in row:
                raise TaskError(f"{where}: the field {name!r} is taken; rename it")
        if answer_field in row:
            row["answer"] = row.pop(answer_field)
        examples.append(RowExample(prompt=prompt, columns=row, place=where))
    return examples
