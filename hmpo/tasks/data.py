"""Prompts and conversations of your own: files of many forms, data sets, layouts of others."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hmpo.config import TaskConfig
from hmpo.errors import TaskError
from hmpo.rewards.messages import is_conversation
from hmpo.tasks.base import Example, is_heldout
from hmpo.tasks.chat import conversation
from hmpo.tasks.files import read_file
from hmpo.tasks.hub import read_split
from hmpo.tasks.layouts import examples_of
from hmpo.tasks.options import read_options, require_option, stop_strings
from hmpo.tasks.rows import Count, RowExample, RowTask

DEFAULTS: dict[str, Any] = {
    "train": (),
    "held_out": (),
    "dataset": "",
    "subset": "",
    "revision": "",
    "columns": {},
    "limit": 0,
    "shuffle": True,
    "max_prompt_length": 0,
    "overlong": "drop",
    "overlap": "error",
}
CHOICES = {"overlong": ("drop", "truncate_left", "error"), "overlap": ("error", "drop")}


class DataTask(RowTask):
    """Examples of files or of a data set (implements `Task`).

    Options: `train` and `held_out`, a file each or a list of files; or `dataset`, a folder or an id
    that `datasets` reads, whose splits they name then, with `subset` and `revision`. Without
    `held_out` one prompt in eight is held out by its hash. `columns` says which columns hold prompt
    and answer; `limit` takes the first so many training prompts; `shuffle = false` keeps their
    order. A prompt of more than `max_prompt_length` tokens is treated as `overlong` says, a
    training prompt that is also held out as `overlap` says.
    """

    def __init__(self, config: TaskConfig, seed: int) -> None:
        if config.level not in (None, 1):
            raise TaskError(
                f"task.level: got {config.level}, expected none: a file of prompts has no levels"
            )
        options = _options(config)
        self.name, self.seed, self.shots = config.name, seed, config.shots
        self.shuffle = options["shuffle"]
        self.max_prompt_length: int = options["max_prompt_length"]
        self.overlong: str = options["overlong"]
        self.told: dict[str, int] = {}
        """How many prompts were left out or cut, by reason."""
        train, heldout = _splits(options, config.name)
        train = self._apart(train, heldout, options)
        train = train[: options["limit"] or None]
        for split, rows in (("training", train), ("held-out", heldout)):
            if not rows:
                raise TaskError(
                    f"task {config.name}: no {split} prompts in {_source(options)}; add prompts, "
                    "or give task.options.held_out"
                )
        self.chat = _is_chat([*train, *heldout], config)
        self.system = config.system
        own = () if self.chat or not config.shots else ("\n",)
        self.stop = stop_strings(config, own)
        self.content = _content(options, [*train, *heldout])
        self._pool = train
        self._take(train, heldout)
        if self.chat:
            _refuse_system([*train, *heldout], config.system)

    @property
    def truncate_at(self) -> int | None:
        """Tokens that a prompt keeps at most; None where none is cut."""
        return self.max_prompt_length if self.overlong == "truncate_left" else None

    def fit(self, count: Count) -> dict[str, int]:
        """Treat prompts of more than `max_prompt_length` tokens as `overlong` says.

        Args:
            count: tokens of prompts, as the policy's tokenizer has them.

        Returns:
            How many were left out or cut, by reason; empty where none was.

        Raises:
            TaskError: one line with the prompt's place, or no prompt is left.
        """
        limit = self.max_prompt_length
        for split in ("train", "heldout") if limit else ():
            rows: list[RowExample] = getattr(self, f"_{split}")
            tokens = count([self._with_shots(row, split).prompt for row in rows])
            over = [n for n, length in enumerate(tokens) if length > limit]
            if over and self.overlong == "error":
                raise TaskError(
                    f"{rows[over[0]].place}: prompt of {tokens[over[0]]} tokens, expected at most "
                    f"task.options.max_prompt_length = {limit}; shorten it, or set overlong"
                )
            if over and self.overlong == "drop":
                left = [row for n, row in enumerate(rows) if tokens[n] <= limit]
                if not left:
                    raise TaskError(
                        f"task.options.max_prompt_length: got {limit}, but all {len(rows)} prompts "
                        f"are longer, the shortest has {min(tokens)} tokens"
                    )
                setattr(self, f"_{split}", left)
                self._order = (-1, [])  # that of so many rows as there were
            if over:
                verb = "cut" if self.overlong == "truncate_left" else "dropped"
                self.told[f"{verb}_{split}"] = len(over)
        return self.told

    def examples(self) -> list[RowExample]:
        """The training examples in the order of the file, without solved ones before them."""
        return list(self._train)

    def inputs(self) -> Iterator[tuple[str, str]]:
        """(name, hash) of what was read that is no file with a place of its own."""
        if self.content:
            yield "task.options.dataset: rows", self.content

    def _with_shots(self, row: RowExample, key: str) -> Example:
        """The example as it is asked; it has the same solved ones each time.

        Wherever its file is, and a held-out one (`key` says so) for whatever seed.
        """
        who = "heldout" if key.startswith("heldout") else self.seed
        solved = self._solved(self._pool, row, f"{who}/{row.key}") if self.shots else []
        if not self.chat:
            end = (self.stop or ("\n",))[0]
            text = "".join(f"{o.prompt}{o.columns['answer']}{end}" for o in solved)
            return dataclasses.replace(row, prompt=f"{text}{row.prompt}")
        pairs = [(o.prompt, str(o.columns["answer"])) for o in solved]
        return dataclasses.replace(row, prompt=conversation(row.prompt, pairs, self.system))

    def _apart(
        self, train: list[RowExample], heldout: list[RowExample], options: Mapping[str, Any]
    ) -> list[RowExample]:
        """The training examples that are not held out."""
        keys = {row.key for row in heldout}
        shared = [row for row in train if row.key in keys]
        if not shared:
            return train
        if options["overlap"] == "error":
            raise TaskError(
                f"{shared[0].place}: {len(shared)} of {len(train)} training prompts are also held "
                f"out, the first is {shared[0].key[:60]!r}; take them out of one, or set "
                'task.options.overlap = "drop"'
            )
        self.told["overlap"] = len(shared)
        return [row for row in train if row.key not in keys]


def _options(config: TaskConfig) -> dict[str, Any]:
    """The options of `config`, checked."""
    given = dict(config.options)
    for name in ("train", "held_out"):
        value = given.get(name, [])
        names = [value] if isinstance(value, str) else value
        texts = isinstance(names, list | tuple) and all(isinstance(n, str) and n for n in names)
        require_option(texts, name, value, "a file, or a list of files")
        given[name] = tuple(names)
    options = read_options(dataclasses.replace(config, options=given), DEFAULTS)
    columns = options["columns"]
    require_option(
        all(isinstance(column, str) and column for column in columns.values()),
        "columns",
        columns,
        'names of columns, such as { prompt = "question" }',
    )
    for name in ("limit", "max_prompt_length"):
        require_option(options[name] >= 0, name, options[name], "an integer >= 0")
    for name, choices in CHOICES.items():
        expected = "one of " + ", ".join(map(repr, choices))
        require_option(options[name] in choices, name, options[name], expected)
    _refuse_unread(config.options, options)
    return options


def _refuse_unread(given: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuse what other options leave without effect, and what names no data."""
    if options["dataset"]:
        for name in ("train", "held_out"):
            splits = list(options[name])
            require_option(len(splits) <= 1, name, splits, "the name of one split")
        revision = options["revision"]
        local = Path(options["dataset"]).expanduser().is_dir()
        require_option(not (local and revision), "revision", revision, "none of a folder")
    else:
        files = 'a file, such as "prompts.jsonl", or a data set by task.options.dataset'
        require_option(bool(options["train"]), "train", list(options["train"]), files)
        for name in ("subset", "revision"):
            require_option(not options[name], name, options[name], "none without `dataset`")
    if not options["max_prompt_length"]:
        alone = "overlong" not in given
        require_option(alone, "overlong", options["overlong"], "a max_prompt_length beside it")
    if not options["held_out"]:
        alone = "overlap" not in given
        require_option(alone, "overlap", options["overlap"], "a held_out beside it")


def _splits(options: Mapping[str, Any], name: str) -> tuple[list[RowExample], list[RowExample]]:
    """(training, held-out) examples."""
    train = _read(options, options["train"] or ("train",), alone=bool(options["held_out"]))
    if options["held_out"]:
        return train, _read(options, options["held_out"], alone=False)
    held = [is_heldout(name, row.key) for row in train]
    parts = [[row for row, out in zip(train, held) if out is part] for part in (False, True)]
    return parts[0], parts[1]


def _read(options: Mapping[str, Any], names: tuple[str, ...], *, alone: bool) -> list[RowExample]:
    """The examples of some files, or of one split."""
    columns, dataset = options["columns"], options["dataset"]
    if not dataset:
        return [row for path in names for row in examples_of(read_file(path), columns, path)]
    exact = alone and options["overlap"] == "error"  # else some of the first may be left out
    rows = read_split(
        dataset,
        names[0],
        subset=options["subset"],
        revision=options["revision"],
        limit=options["limit"] if exact else 0,
    )
    return examples_of(rows, columns, f"{dataset} {names[0]}")


def _is_chat(rows: list[RowExample], config: TaskConfig) -> bool:
    """Whether the prompts are conversations, all of them or none."""
    first = is_conversation(rows[0].prompt)
    for row in rows:
        if is_conversation(row.prompt) is not first:
            kinds = ("text", "messages") if first else ("messages", "text")
            raise TaskError(
                f"{row.place}: prompt is {kinds[0]}, expected {kinds[1]} as in {rows[0].place}"
            )
    if first and config.chat:
        raise TaskError(
            f"task.chat: got true, expected false: the prompts of {config.name} are messages"
        )
    return first or config.chat


def _refuse_system(rows: list[RowExample], system: str) -> None:
    """Refuse a system turn that every conversation has already."""
    if system and all(
        is_conversation(row.prompt) and row.prompt[0]["role"] == "system"  # type: ignore[index]
        for row in rows
    ):
        raise TaskError(
            f"task.system: got {system[:60]!r}, expected none: every conversation has a system "
            "turn of its own; leave it out, or take those out of the data"
        )


def _content(options: Mapping[str, Any], rows: list[RowExample]) -> str:
    """SHA-256 of the rows of a data set, whose files nobody hashes; empty for files."""
    if not options["dataset"]:
        return ""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.prompt, row.columns], sort_keys=True).encode())
    return f"sha256:{digest.hexdigest()}"


def _source(options: Mapping[str, Any]) -> str:
    return options["dataset"] or ", ".join(options["train"])
