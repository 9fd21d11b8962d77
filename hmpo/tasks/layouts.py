"""From a row as others lay it out to a prompt and its columns.

TRL's layout is a `prompt`, text or messages, and any columns. verl's has messages beside
`data_source`, `extra_info` and `reward_model`, whose `ground_truth` is the answer.
"""

import datetime
import decimal
import json
from collections.abc import Mapping, Sequence
from typing import Any

from hmpo.errors import TaskError
from hmpo.rewards.loading import nearest
from hmpo.rewards.messages import content_text, is_conversation, refuse_messages
from hmpo.rewards.values import shown
from hmpo.tasks.files import Row
from hmpo.tasks.rows import RESERVED, RowExample

NUMBERS = (bool, int, float, type(None))


def examples_of(rows: Sequence[Row], mapping: Mapping[str, str], source: str) -> list[RowExample]:
    """The examples of rows.

    Args:
        rows: of one file or split.
        mapping: by name of ours the column that holds it, such as {"prompt": "question"}; dots
            lead into tables, as in "extra_info.answer".
        source: the file or split, for messages.

    Raises:
        TaskError: one line with the row, or with the columns that there are.
    """
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    for target, column in {"prompt": "prompt", **mapping}.items():
        if rows and column not in names and not any(_has(row, column) for _, row in rows):
            hint = nearest(column, names)
            setting = f"task.options.columns.{target}"
            if target not in mapping:
                hint = f'name the one that holds it: {setting} = "..."'
            raise TaskError(
                f"{source}: has the columns {', '.join(names)[:200]}, but no {column!r}; {hint}"
            )
    return [_example(dict(row), where, mapping) for where, row in rows]


def plain(value: Any) -> Any:
    """A value of a data set as JSON has it: lists, dicts, texts and numbers.

    Raises:
        TypeError: it is none, such as the bytes of a picture.
    """
    if isinstance(value, str) or type(value) in NUMBERS:
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # an array of NumPy, or one of its numbers
        return plain(value.tolist())
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    raise TypeError(type(value).__name__)


def _example(row: dict[str, Any], where: str, mapping: Mapping[str, str]) -> RowExample:
    taken = {target: _get(row, column) for target, column in mapping.items()}
    for column in mapping.values():
        row.pop(column, None)
    row |= taken
    graded = row.get("reward_model")
    if row.get("answer") is None and isinstance(graded, Mapping) and "ground_truth" in graded:
        row["answer"] = graded["ground_truth"]
    for name in RESERVED:
        if name in row:
            raise TaskError(
                f"{where}: the column {name!r} is taken; rename it, such as by "
                f"task.options.columns.given_{name} = {name!r}"
            )
    columns = {}
    for name, value in row.items():
        try:
            columns[name] = plain(value)
        except TypeError as error:
            raise TaskError(
                f"{where}: column {name!r} holds {error}, expected text, numbers, lists and "
                "tables; leave it out of the data"
            ) from None
    prompt = _prompt(columns.pop("prompt", None), where)
    if is_conversation(columns.get("answer")) and "role" in columns["answer"][-1]:
        columns["answer"] = content_text(columns["answer"][-1])
    return RowExample(prompt=prompt, columns=columns, place=where)


def _prompt(value: Any, where: str) -> str | list[dict[str, Any]]:
    """A text, or messages without what they leave open."""
    if isinstance(value, str) and value.startswith("[") and '"role"' in value:
        try:
            read = json.loads(value)  # a table of texts has messages as JSON
        except (ValueError, RecursionError):
            read = None
        value = read if is_conversation(read) else value
    if isinstance(value, str) and value:
        return value
    if not is_conversation(value):
        raise TaskError(f"{where}: prompt is {shown(value, 60)}, expected text or messages")
    messages = [{k: item for k, item in turn.items() if item is not None} for turn in value]
    refuse_messages(messages, where, TaskError)
    return messages


def _has(row: Mapping[str, Any], column: str) -> bool:
    return _find(row, column)[0]


def _get(row: Mapping[str, Any], column: str) -> Any:
    return _find(row, column)[1]


def _find(row: Any, column: str) -> tuple[bool, Any]:
    """Whether a row has a column, dots leading into tables, and what it holds."""
    if column in row:
        return True, row[column]
    for name in column.split("."):
        if not isinstance(row, Mapping) or name not in row:
            return False, None
        row = row[name]
    return True, row
