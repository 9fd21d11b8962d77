"""Which function of the library checks the answers that rows have, and why that one."""

import ast
import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hmpo.proposal.columns import CHOICES, SCHEMAS, TESTS
from hmpo.proposal.data import DataFacts
from hmpo.proposal.policy import PolicyFacts
from hmpo.rewards.library.base import answers_of, is_missing
from hmpo.rewards.library.text import last_box, number_in
from hmpo.rewards.messages import as_text

MOST = 0.9
"""Share of the answers that a form must have."""
SHORT = 60
"""Characters of an answer that a completion can be asked to contain."""
NUMBER = re.compile(r"[-+]?\\?\$?[\d,]*\.?\d+(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?\s*\\?%?\.?")
LETTER = re.compile(r"\(?([A-Z])[).:]*")
LATEX = re.compile(r"\\[a-zA-Z]+|\^|_\{|\$")
FORMULA = re.compile(r"(?:\\[a-zA-Z]+|[A-Za-z](?![A-Za-z])|[\d\s{}()\[\]|^_+\-*/=<>.,:;!$%\\&])+")
BOX = "Think step by step, and put the final answer into \\boxed{}."
LETTERED = "End with a line `Answer: ` and the letter of the right choice."
CODE = "Answer with one block of Python code."


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A reward function for some rows.

    Example: `Suggestion(function="last_number", why="numbers in all of the first 200 answers")`.
    """

    function: str
    """Its name; empty where no function of the library fits."""
    why: str
    """What was seen, or why none fits."""
    options: Mapping[str, Any] = field(default_factory=dict)
    system: str = ""
    """A system turn that asks for the form of the answer that the function reads."""
    safe: bool = True
    """Whether it may be taken without being asked for."""
    worked: bool = False
    """Whether the answers are whole solutions, as long as a response should be."""
    note: str = ""
    """What the user should mend, in a line."""


def suggest(data: DataFacts, policy: PolicyFacts) -> Suggestion:
    """The function that fits the first rows best.

    Args:
        data: what was read.
        policy: what answers.
    """
    columns = _columns(data)
    for found in (_tests(columns), _schema(columns)):
        if found is not None:
            return found
    values = [v for v in columns.get("answer", []) if not is_missing(v)]
    answers = [one.strip() for v in values for one in answers_of(v)]
    if not answers:
        names = ", ".join(data.columns)[:200]
        return Suggestion(
            function="",
            why=f"no column of answers among {names}; name it by "
            "--set task.options.columns.answer=NAME, or give --reward file.py:function",
        )
    found = _choice(columns, values, answers) or _mathematics(answers) or _texts(answers, policy)
    return replace(found, why=f"{data.answer!r}: {found.why}") if found.function else found


def known_options(function: str, data: DataFacts, policy: PolicyFacts) -> Suggestion:
    """A function that the user has chosen, with the options that its rows call for."""
    likely = suggest(data, policy)
    columns = _columns(data)
    values = [v for v in columns.get("answer", []) if not is_missing(v)]
    answers = [one.strip() for v in values for one in answers_of(v)]
    found: dict[str, Callable[[], Suggestion | None]] = {
        likely.function: lambda: likely,
        "unit_tests": lambda: _tests(columns),
        "json_schema": lambda: _schema(columns),
        "choice": lambda: _choice(columns, values, answers),
    }
    known = found.get(function, lambda: None)()
    if known is not None:
        return replace(known, safe=True)
    options = {"opened": True} if function == "format_tags" and policy.thinks else {}
    worked = bool(answers) and _mostly(answers, lambda a: last_box(a) is not None or "####" in a)
    systems = {"boxed": BOX, "math": BOX, "choice": LETTERED, "unit_tests": CODE}
    system = systems.get(function, "")
    return Suggestion(function=function, why="", options=options, system=system, worked=worked)


def _columns(data: DataFacts) -> dict[str, list[Any]]:
    """The first values of every column, and the prompts as text under `prompt`."""
    names = dict.fromkeys(name for e in data.examples for name in e.columns)
    found = {name: [e.columns.get(name) for e in data.examples] for name in names}
    return found | {"prompt": [as_text(e.prompt) for e in data.examples]}


def _tests(columns: Mapping[str, list[Any]]) -> Suggestion | None:
    for name in TESTS:
        values = [value for value in columns.get(name, []) if value]
        if values and all(map(_asserts, values)):
            return Suggestion(
                function="unit_tests",
                why=f"column `{name}` holds tests; what the policy writes is run (docs/rewards.md)",
                options={} if name == "tests" else {"column": name},
                system=CODE,
                safe=False,
            )
    return None


def _asserts(value: Any) -> bool:
    """Whether a value is Python code, or pieces of it, that asserts when it is run."""
    pieces = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(piece, str) for piece in pieces):
        return False
    try:
        body = ast.parse("\n".join(pieces)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(isinstance(line, ast.Assert) for line in body)


def _schema(columns: Mapping[str, list[Any]]) -> Suggestion | None:
    for name in SCHEMAS:
        values = [_table(value) for value in columns.get(name, [])]
        if not values or any(value is None for value in values):
            continue
        if importlib.util.find_spec("jsonschema") is None:
            return None
        one = all(value == values[0] for value in values) and not _holds_none(values[0])
        note = "" if one else "the rows have schemas of their own: any JSON fits now"
        why = f"column `{name}` holds a JSON schema"
        options = {"schema": values[0]} if one else {}
        return Suggestion(function="json_schema", why=why, options=options, note=note)
    return None


def _table(value: Any) -> Any:
    """A JSON schema: a table, or a text that holds one; else None."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    known = {"type", "properties", "$ref", "anyOf", "oneOf", "enum", "$schema"}
    return value if isinstance(value, Mapping) and known & {*value} else None


def _holds_none(value: Any) -> bool:
    """Whether null is somewhere in a value, which TOML cannot hold."""
    inner = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, Mapping | list | tuple):
        return any(map(_holds_none, inner))
    return value is None


def _choice(
    columns: Mapping[str, list[Any]], values: Sequence[Any], answers: Sequence[str]
) -> Suggestion | None:
    """Letters, or indices beside a column of choices."""
    listed = next((name for name in CHOICES if columns.get(name)), "")
    letters = [m[1] for m in map(LETTER.fullmatch, answers) if m]
    indices = [v for v in values if type(v) is int and 0 <= v < 10]
    if len(letters) == len(answers) and letters and max(letters) <= "J":
        last, what = max(letters), "letters"
    elif listed and len(indices) == len(values):
        last, what = "ABCDEFGHIJ"[max(indices)], f"indices of column `{listed}`"
    else:
        return None
    options = {"letters": "ABCDEFGHIJ"[: ord(last) - ord("A") + 1]} if last > "E" else {}
    note = ""
    if listed and not _shown(columns["prompt"], columns[listed]):
        note = f"the choices stand in column `{listed}` and not in the prompts: put them there"
    why = f"{what} in all of {_first(answers)}"
    return Suggestion(function="choice", why=why, options=options, system=LETTERED, note=note)


def _shown(prompts: Sequence[str], choices: Sequence[Any]) -> bool:
    """Whether the first prompt that has choices shows them."""
    for prompt, value in zip(prompts, choices):
        texts = value.get("text") if isinstance(value, Mapping) else value
        if isinstance(texts, list | tuple) and texts:
            return all(str(text) in prompt for text in texts)
    return True


def _mathematics(answers: Sequence[str]) -> Suggestion | None:
    """Numbers, formulas, and solutions that end with one."""
    verify = importlib.util.find_spec("math_verify") is not None
    marked = [a for a in answers if "####" in a and number_in(a) is not None]
    numbers = [a for a in answers if NUMBER.fullmatch(a)]
    boxes = [a for a in answers if last_box(a) is not None]
    if _most(marked, answers):
        why = f"`#### number` at the end of {_share(marked, answers)}"
        return Suggestion(function="last_number", why=why, worked=True)
    if _most(numbers, answers):
        return Suggestion(function="last_number", why=f"numbers in {_share(numbers, answers)}")
    formulas = [a for a in answers if len(a) <= SHORT * 2 and FORMULA.fullmatch(a)]
    if not _most(boxes, answers) and not (
        _most(formulas, answers) and any(map(LATEX.search, formulas))
    ):
        return None
    found, what = (boxes, "\\boxed") if _most(boxes, answers) else (formulas, "formulas")
    why = f"{what} in {_share(found, answers)}"
    if not verify:
        why += "; math would compare values: pip install 'hmpo[rewards]'"
    function = "math" if verify else "boxed"
    return Suggestion(function=function, why=why, system=BOX, worked=found is boxes)


def _texts(answers: Sequence[str], policy: PolicyFacts) -> Suggestion:
    """Short texts, which a completion can be or contain."""
    short = [a for a in answers if a and len(a) <= SHORT and "\n" not in a]
    if not _most(short, answers):
        longest = max(map(len, answers))
        return Suggestion(
            function="",
            why=f"the answers are texts of up to {longest} characters, which no function of the "
            "library compares; give --reward file.py:function, or judge (docs/rewards.md)",
        )
    what = f"short texts in {_share(short, answers)}"
    if not policy.template:
        return Suggestion(function="exact", why=what)
    options = {"casefold": True, "words": True}
    why = f"{what}; a response that lists many answers is right too"
    return Suggestion(function="contains", why=why, options=options)


def _mostly(answers: Sequence[str], holds: Callable[[str], bool]) -> bool:
    return _most([a for a in answers if holds(a)], answers)


def _most(found: Sequence[str], answers: Sequence[str]) -> bool:
    return len(found) >= MOST * len(answers)


def _share(found: Sequence[str], answers: Sequence[str]) -> str:
    """How many of the answers were found to be so, in words."""
    return f"{'all' if len(found) == len(answers) else len(found)} of {_first(answers)}"


def _first(answers: Sequence[str]) -> str:
    return f"the first {len(answers)}"
