"""Each row of the table names the module (or room) that writes it, and that one really does."""

import ast
import functools
import re
from pathlib import Path

import pytest

import hmpo
from hmpo.telemetry.fields import FIELDS

PACKAGE = Path(hmpo.__file__).parent


@functools.cache
def sources(module: str) -> tuple[ast.Module, ...]:
    """The module, or every module of the room."""
    place = PACKAGE.joinpath(*module.split("."))
    files = sorted(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    return tuple(ast.parse(file.read_text(encoding="utf-8")) for file in files)


@functools.cache
def written(module: str) -> tuple[frozenset[str], tuple[re.Pattern[str], ...]]:
    """Texts and keyword arguments of the code, and what its f-strings can make."""
    texts, patterns = set(), []
    for node in (node for tree in sources(module) for node in ast.walk(tree)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.add(node.value)
        elif isinstance(node, ast.keyword) and node.arg:
            texts.add(node.arg)
        elif isinstance(node, ast.JoinedStr):
            parts = [
                re.escape(part.value) if isinstance(part, ast.Constant) else "(.+)"
                for part in node.values
            ]
            if "/" in "".join(parts) and "/" in parts[0]:
                patterns.append(re.compile("".join(parts)))
    return frozenset(texts), tuple(patterns)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_the_producer_of_a_field_writes_its_name(field) -> None:
    texts, patterns = written(field.producer)
    if field.producer == "adapters.trl.log" and "rewards/" in texts:
        return  # TRL's own value, renamed
    made = (pattern.fullmatch(field.name) for pattern in patterns)
    assert field.name in texts or any(
        match and all("<" in part or part in texts for part in match.groups()) for match in made
    ), f"{field.name}: not written by hmpo.{field.producer}"
