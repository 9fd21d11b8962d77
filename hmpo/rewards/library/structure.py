"""Rewards of an answer's structure: regex, json_schema, format_tags."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hmpo.errors import ConfigError, require, require_installed
from hmpo.rewards.library.base import (
    TextReward,
    answers_of,
    fenced,
    require_column,
)
from hmpo.rewards.values import UsageError, one_line

OPENING = re.compile(r"[\[{]")
WINDOW = 4096
"""Characters in which an object or list is looked for first."""
EDGE = 16
"""An error so near to the window's end may be one of the window."""
ATTEMPT = 200
"""What an attempt costs besides the characters that it reads."""
NO_ANSWER = object()


def regex(*, pattern: str, column: str = "", whole: bool = False) -> TextReward:
    r"""1 where the pattern is found in the completion, else 0.

    r = [pattern found], by Python's `re`; `(?i)` and its kin in the pattern set flags. With a
    column: r = [the last match's first group, or the match, is the answer], up to white space at
    both ends. Some patterns take exponential time on some texts, such as `(a+)+b`: nothing here
    stops them, so set `trainer.reward_timeout`, or write possessive quantifiers (`a++`).

    Args:
        pattern: the regular expression.
        column: holds the answer that the match must be; empty without one.
        whole: the pattern must match the whole text, without white space at its ends.
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"reward regex.pattern: got {pattern[:100]!r} ({one_line(error)}), expected a regular "
            "expression of Python's re"
        ) from None
    if column:
        require_column("regex", column)
    return TextReward("regex", partial(_regex, pattern=compiled, whole=whole), column or None)


def _regex(text: str, answer: Any = NO_ANSWER, *, pattern: re.Pattern[str], whole: bool) -> float:
    if whole:
        match = pattern.fullmatch(text.strip())
    elif answer is NO_ANSWER:
        match = pattern.search(text)
    else:
        match = None
        for match in pattern.finditer(text):  # noqa: B007
            pass
    if match is None or answer is NO_ANSWER:
        return float(match is not None)
    found = match[1 if pattern.groups else 0] or ""
    return float(found.strip() in {one.strip() for one in answers_of(answer)})


def format_tags(
    *, tags: Sequence[str] = ("think", "answer"), opened: bool = False, around: bool = False
) -> TextReward:
    r"""1 where the completion is `<think>...</think><answer>...</answer>`, else 0.

    The format reward of DeepSeek-R1 (Guo et al., 2025): each tag opens and closes once, in this
    order, none inside another, with nothing but white space between and around them. What is in
    them is free, also nothing.

    Args:
        tags: the names, in order.
        opened: the prompt ends with the first opening tag, as some chat templates do.
        around: text between and around them is free as well.
    """
    fits = len(tags) > 0 and all(re.fullmatch(r"[\w.:-]+", tag) for tag in tags)
    require(fits and len({*tags}) == len(tags), "reward format_tags.tags", tags, "different names")
    score = partial(_format_tags, tags=tuple(tags), opened=opened, around=around)
    return TextReward("format_tags", score)


def _format_tags(text: str, *, tags: tuple[str, ...], opened: bool, around: bool) -> float:
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    if opened:
        text = marks[0] + text
    place = 0
    for i, mark in enumerate(marks):
        at = text.find(mark, place)
        if at < 0 or text.count(mark) != 1:
            return 0.0
        if i % 2 == 0 and not around and text[place:at].strip():
            return 0.0
        place = at + len(mark)
    return float(around or not text[place:].strip())


def json_schema(*, schema: Mapping[str, Any] | None = None, schema_file: str = "") -> TextReward:
    r"""1 where the last JSON value of the completion fits the schema, else 0.

    r = [value fits schema], by jsonschema (the draft that `$schema` names, else 2020-12). The value
    is the whole text, or the last fenced block, or else the last object or list in the text. NaN
    and Infinity are not JSON, nor is a number that no float holds, such as 1e400. Schemas are never
    fetched: a `$ref` outside of the schema is refused. Without a schema every value fits. Needs
    `pip install 'hmpo[rewards]'`.

    Args:
        schema: a table of the schema.
        schema_file: a JSON file that holds it, in its place.
    """
    require_installed("jsonschema", "reward json_schema", "rewards")
    if schema and schema_file:
        raise ConfigError("reward json_schema: got schema and schema_file, expected one of them")
    given = dict(schema or {})
    if schema_file:
        try:
            given = json.loads(Path(schema_file).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, RuntimeError) as error:
            reason = one_line(getattr(error, "strerror", None) or error)
            raise ConfigError(
                f"reward json_schema.schema_file: cannot read {schema_file} ({reason}); give a "
                "JSON file"
            ) from None
    _refuse_bad_schema(given)
    return TextReward("json_schema", partial(_json_schema, schema=given))


def _validator(schema: Any) -> Any:
    from jsonschema import Draft202012Validator
    from jsonschema.validators import validator_for
    from jsonschema_specifications import REGISTRY

    kind = validator_for(schema, default=Draft202012Validator)
    return kind(schema, registry=REGISTRY)  # a registry of ours fetches nothing


def _refuse_bad_schema(schema: Any) -> None:
    from jsonschema.exceptions import SchemaError
    from jsonschema_specifications import REGISTRY

    try:
        _validator(schema).check_schema(schema)
    except SchemaError as error:
        place = "/".join(map(str, error.absolute_path)) or "it"
        raise ConfigError(
            f"reward json_schema: no JSON schema ({place}: {one_line(error.message)}); correct it"
        ) from None
    except RecursionError:
        raise ConfigError("reward json_schema: the schema is nested too deeply") from None
    tables = list(_tables(schema))
    own = {table["$id"] for table in tables if isinstance(table.get("$id"), str)}
    for table in tables:
        ref = table.get("$ref")
        base = ref.partition("#")[0] if isinstance(ref, str) else ""
        if base and base not in REGISTRY and not any(one.endswith(base) for one in own):
            raise ConfigError(
                f"reward json_schema: $ref {ref!r} lies outside of the schema, and nothing is "
                "fetched; put it into $defs"
            )


def _tables(value: Any) -> Iterator[Mapping[str, Any]]:
    """All objects in a JSON value."""
    rest = [value]
    while rest:
        one = rest.pop()
        if isinstance(one, Mapping):
            yield one
            rest += one.values()
        elif isinstance(one, list | tuple):
            rest += one


def _json_schema(text: str, *, schema: Any) -> float:
    from referencing.exceptions import Unresolvable

    found = last_json(text)
    if not found:
        return 0.0
    try:
        return float(_validator(schema).is_valid(found[0]))
    except Unresolvable as error:
        raise UsageError(f"reward json_schema: {one_line(error)}; put it into $defs") from None
    except (RecursionError, ArithmeticError, ValueError):  # deeper or larger than any answer is
        return 0.0


def last_json(text: str) -> list[Any]:
    """The last JSON value of a text in a list; an empty list without one.

    The whole text, or the last fenced block, may be any value; inside of other text objects and
    lists are looked for. Time is in proportion to the text's length: where no end is found to ever
    new beginnings, the search ends.
    """
    blocks = [body for _, body in fenced(text)]
    odd: list[str] = []

    def number(text: str) -> float:
        value = float(text)
        if math.isinf(value):
            odd.append(text)
        return value

    decoder = json.JSONDecoder(parse_constant=odd.append, parse_float=number)
    for whole in (text, *blocks[-1:]):
        value, end, fine = _decoded(whole.strip(), decoder, odd)
        if end == len(whole.strip()) and end > 0:
            return [value] if fine else []
    inner = blocks[-1] if blocks else text
    place, left, last = 0, 20 * len(inner) + 100_000, []
    while left > 0 and (begin := OPENING.search(inner, place)):
        value, end, cost, fine = _nested(inner, begin.start(), decoder, odd)
        left -= cost
        place = begin.start() + 1
        if end >= 0:
            place, last = begin.start() + end, [value] if fine else []
    return last if left > 0 else []


def _nested(
    text: str, start: int, decoder: json.JSONDecoder, odd: list[str]
) -> tuple[Any, int, int, bool]:
    """(value, its length or -1, characters read, whether it is JSON) of what begins at `start`.

    It is read in windows that grow, since an error costs time in proportion to the whole text.
    """
    size, cost = WINDOW, 0
    while True:
        window = text[start : start + size]
        value, end, fine = _decoded(window, decoder, odd)
        cost += end if end >= 0 else ATTEMPT - end
        if end >= 0 or -1 - end < len(window) - EDGE or start + size >= len(text):
            return value, end, cost, fine
        size *= 4


def _decoded(text: str, decoder: json.JSONDecoder, odd: list[str]) -> tuple[Any, int, bool]:
    """(value, end, whether it is JSON without NaN), or end = -1 - characters read in vain.

    The decoder puts NaN and its kin, and numbers beyond every float, into `odd`.
    """
    odd.clear()
    try:
        value, end = decoder.raw_decode(text)
    except json.JSONDecodeError as error:
        at = len(text) if error.msg.startswith("Unterminated") else error.pos
        return None, -1 - at, False
    except (RecursionError, ValueError):  # too deep, or a number of thousands of digits
        return None, -1 - min(len(text), 10_000), False
    return value, end, not odd
