"""What a file or a data set of prompts is: its columns, its splits, and the task that reads it."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hmpo.config import TaskConfig
from hmpo.errors import HmpoError, TaskError
from hmpo.proposal.columns import answer_column, as_messages, inner, names_of, prompt_column
from hmpo.rewards.values import nearest
from hmpo.tasks import make_task
from hmpo.tasks.data import DataTask
from hmpo.tasks.files import read_file
from hmpo.tasks.hub import read_split, split_names, subset_names
from hmpo.tasks.rows import RowExample

FIRST = 200
"""Rows from which columns and answers are told."""
ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
"""Of files of prompts, each also behind a `.gz`."""
HELD_OUT = ("test", "validation", "valid", "val", "eval", "dev", "heldout", "held_out")
"""Names of held-out splits, the likeliest first."""
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """A file or data set that the task `data` reads.

    Example: `DataFacts(options={"train": "train.jsonl"}, chat=False, prompt="question", ...)`.
    """

    options: Mapping[str, Any]
    """`task.options`, but for the length of prompts."""
    notes: Mapping[str, str]
    """By name of an option, what was guessed and why."""
    rows: int
    """Training prompts."""
    held: int
    """Held-out prompts."""
    chat: bool
    """Whether the prompts are messages."""
    system: bool
    """Whether some of them have a system turn."""
    prompt: str
    """Column of the prompts."""
    answer: str
    """Column of the answers, before it is called `answer`; empty without one."""
    columns: Sequence[str]
    """Names of all columns in the file."""
    examples: Sequence[RowExample]
    """The first training prompts with their columns, as reward functions get them."""
    task: DataTask

    @property
    def counts(self) -> str:
        """How many prompts there are, and how they were parted."""
        by_hash = "" if "held_out" in self.options else " (one in eight, by its hash)"
        return f"{self.rows} training and {self.held} held-out prompts{by_hash}"

    @property
    def kind(self) -> str:
        """What the prompts are."""
        return "messages" if self.chat else "text"

    def __str__(self) -> str:
        """In a line."""
        answers = f"answers in {self.answer!r}" if self.answer else "no answers"
        return f"{self.counts}; {self.kind} in {self.prompt!r}, {answers}"


def look_at_data(source: str, given: Mapping[str, Any]) -> DataFacts:
    """Read a file or data set as a run would.

    Args:
        source: a file, a folder, or an id of a data set.
        given: options of the task that are decided already, such as `columns`.

    Raises:
        HmpoError: one line; it is not there, or is nothing that the task reads.
    """
    options, notes = _places(source, dict(given))
    rows = _first_rows(options)
    columns = dict(options.pop("columns", {}))
    prompt = columns.get("prompt")
    if prompt is None:
        prompt, why = prompt_column(rows, source)
        notes["columns"] = why and f"prompt: {why}"
    _refuse_answered(rows, prompt, source)
    answer = columns.get("answer") or answer_column(rows, prompt)
    wanted = {"prompt": prompt, "answer": answer}
    columns |= {name: own for name, own in wanted.items() if own and own != name}
    if columns:
        options["columns"] = columns
    task = _task(options, notes)
    examples = task.examples()[:FIRST]
    answers = any(example.columns.get("answer") is not None for example in examples)
    prompts = [example.prompt for example in examples if not isinstance(example.prompt, str)]
    return DataFacts(
        options=options,
        notes={name: note for name, note in notes.items() if note},
        rows=len(task.examples()),
        held=task.heldout_size,
        chat=task.chat,
        system=any(turn["role"] == "system" for turns in prompts for turn in turns),
        prompt=prompt,
        answer=answer or ("reward_model.ground_truth" if answers else ""),
        columns=names_of(rows),
        examples=examples,
        task=task,
    )


def _places(source: str, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The options that say where the prompts are, and what was guessed of them."""
    notes: dict[str, str] = {}
    path = Path(source)
    with contextlib.suppress(OSError, RuntimeError):
        path = path.expanduser()
    if path.is_file() or str(path).lower().endswith((*ENDINGS, ".gz")):
        _refuse_missing(path, source)
        options = {"train": source, **options}
        if "held_out" not in options and (beside := _beside(path)):
            options["held_out"] = str(Path(source).with_name(beside))
            notes["held_out"] = "found beside it"
        return options, notes
    if not path.is_dir() and not NAME.fullmatch(source):
        _refuse_missing(path, source)
    options = {"dataset": source, **options}
    if "subset" not in options and (subset := _subset(source, options)):
        options["subset"] = subset
    revision, subset = options.get("revision", ""), options.get("subset", "")
    splits = split_names(source, subset=subset, revision=revision)
    if "train" not in options and splits and "train" not in splits:
        options["train"] = splits[0]
        notes["train"] = f"of the splits {', '.join(splits)}"
    if "held_out" not in options and (held := [n for n in HELD_OUT if n in splits]):
        options["held_out"] = held[0]
        notes["held_out"] = f"of the splits {', '.join(splits)}"
    return options, notes


def _refuse_missing(path: Path, source: str) -> None:
    """Refuse what is not there, with the nearest file that is."""
    if path.exists():
        return
    beside = [str(Path(source).with_name(p.name)) for p in files_in(path.parent)]
    hint = nearest(source, beside) if beside else "give a file, a folder or a data set's id"
    raise TaskError(f"--data: {source}: no such file; {hint}")


def files_in(folder: Path) -> list[Path]:
    """Files of a folder that may hold prompts, by name."""
    with contextlib.suppress(OSError):
        ends = tuple(end + zipped for end in ENDINGS for zipped in ("", ".gz"))
        return sorted(p for p in folder.iterdir() if p.name.endswith(ends) and p.is_file())
    return []


def _beside(path: Path) -> str:
    """Name of the file with held-out prompts beside one of training prompts; empty without one."""
    if "train" not in path.name:
        return ""
    names = [path.name.replace("train", held) for held in HELD_OUT]
    return next((name for name in names if path.with_name(name).is_file()), "")


def _subset(source: str, options: Mapping[str, Any]) -> str:
    """The configuration of a data set that has several; empty where it has one.

    Raises:
        TaskError: none of them is the usual one.
    """
    names = subset_names(source, revision=options.get("revision", ""))
    if len(names) < 2 or "default" in names:
        return ""
    if "main" in names:
        return "main"
    raise TaskError(
        f"--data: {source} has the subsets {', '.join(names)[:200]}; "
        "choose one: --set task.options.subset=NAME"
    )


def _first_rows(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first training rows as they are in the file."""
    if "dataset" not in options:
        train = options["train"]
        rows = read_file(train if isinstance(train, str) else train[0])
    else:
        rows = read_split(
            options["dataset"],
            options.get("train", "train"),
            subset=options.get("subset", ""),
            revision=options.get("revision", ""),
            limit=FIRST,
        )
    if not rows:
        raise TaskError(f"--data: {options.get('dataset') or options['train']} has no rows")
    return [row for _, row in rows[:FIRST]]


def _refuse_answered(rows: Sequence[Mapping[str, Any]], prompt: str, source: str) -> None:
    """Refuse conversations that hold the answer that the policy is to find."""
    turns = as_messages(inner(rows[0], prompt) or rows[0].get(prompt))
    if turns and len(turns) > 1 and turns[-1].get("role") == "assistant":
        raise TaskError(
            f"{source}: the messages in {prompt!r} end with the assistant's turn, which the policy "
            "would go on with; take it out of them, and keep it as `answer` beside"
        )


def _task(options: dict[str, Any], notes: dict[str, str]) -> DataTask:
    """The task of these options, training prompts that are held out too taken out of it."""
    tried = dict(options)
    if options.get("held_out"):
        tried.setdefault("overlap", "drop")
    task = _made(tried)
    shared = task.told.get("overlap", 0)
    if shared and "overlap" not in options:
        options["overlap"] = "drop"
        notes["overlap"] = f"{shared} training prompts are held out too"
    return task


def _made(options: Mapping[str, Any]) -> DataTask:
    try:
        task = make_task(TaskConfig(name="data", options=dict(options)))
    except TaskError as error:
        by = " by --set" if str(error).endswith("give task.options.held_out") else ""
        raise TaskError(f"{error}{by}") from None
    if not isinstance(task, DataTask):
        raise HmpoError("task data: is wrapped")
    return task
