"""Which column of rows holds the prompt, and which the answer: by name, then by what is in it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hmpo.errors import TaskError
from hmpo.rewards.messages import is_conversation

PROMPTS = (
    "prompt", "question", "problem", "instruction", "messages", "query", "input", "text",
    "conversation", "conversations", "dialogue",
)  # fmt: skip
"""Names under which others keep what is asked, the likeliest first."""
ANSWERS = (
    "answer", "final_answer", "expected_answer", "correct_answer", "ground_truth", "target", "gold",
    "expected", "label", "answerKey", "solution", "reference", "output", "response", "completion",
    "extra_info.answer",
)  # fmt: skip
"""Names under which they keep what is right."""
TESTS = ("tests", "test_list", "test", "unit_tests", "test_cases", "test_code")
CHOICES = ("choices", "options")
PARTS = ("input", "context", "passage")
"""Names of what others put beside a question that cannot be answered without it."""
SCHEMAS = ("schema", "json_schema", "response_schema")


class NoColumn(TaskError):
    """No column holds the prompts by its name or by what is in it.

    Args:
        line: what to say.
        names: the columns that there are.
    """

    def __init__(self, line: str, names: Sequence[str]) -> None:
        super().__init__(line)
        self.names = list(names)


def prompt_column(rows: Sequence[Mapping[str, Any]], source: str) -> tuple[str, str]:
    """Name of the column of the prompts, and why it is that one.

    Args:
        rows: the first ones.
        source: the file or data set, for messages.

    Raises:
        NoColumn: none, or several, could be it.
    """
    names = names_of(rows)
    for name in PROMPTS:
        own = _spelled(name, names)
        if own and all(is_prompt(row.get(own)) for row in rows):
            return own, ""
    texts = [n for n in names if all(is_prompt(row.get(n)) for row in rows)]
    texts = [n for n in texts if not any(_spelled(a, [n]) for a in (*ANSWERS, *TESTS))]
    if len(texts) == 1:
        return texts[0], "the only column of texts"
    raise NoColumn(
        f"{source}: which of its columns {', '.join(names)[:200]} is the prompt cannot be told; "
        "name it: --set task.options.columns.prompt=NAME",
        names,
    )


def answer_column(rows: Sequence[Mapping[str, Any]], prompt: str) -> str:
    """Name of the column of the answers; empty where none has a name like that.

    Args:
        rows: the first ones.
        prompt: the column of the prompts, which it is not.
    """
    names = [name for name in names_of(rows) if name != prompt]
    for name in ANSWERS:
        own = _spelled(name, names)
        if own and any(row.get(own) is not None for row in rows):
            return own
        if "." in name and any(inner(row, name) is not None for row in rows):
            return name
        if name == "answer" and any(inner(row, "reward_model.ground_truth") for row in rows):
            return ""  # verl's layout, which the task reads of itself
    return ""


def names_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the columns of rows, in order."""
    return list(dict.fromkeys(str(name) for row in rows for name in row))


def inner(row: Any, name: str) -> Any:
    """What a row holds under a dotted name; None without it."""
    for part in name.split("."):
        row = row.get(part) if isinstance(row, Mapping) else None
    return row


def is_prompt(value: Any) -> bool:
    """Whether a value is text or messages, also as JSON, and not empty."""
    return bool(value) and (isinstance(value, str) or is_conversation(value))


def as_messages(value: Any) -> Sequence[Mapping[str, Any]] | None:
    """The messages that a value is or holds as JSON; None of a text."""
    if isinstance(value, str) and value.startswith("[") and '"role"' in value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if is_conversation(value) else None


def _spelled(name: str, names: Sequence[str]) -> str:
    """The one of some names that is spelled so, whatever its case; empty without one."""
    plain = name.lower().replace("_", "")
    return next((n for n in names if n.lower().replace("_", "").replace(" ", "") == plain), "")
