"""regex, json_schema, format_tags: tables of cases, and texts that are hard to read."""

import json

import numpy as np
import pytest

from hmpo import errors
from hmpo.errors import ConfigError, MissingDependencyError, RewardError
from hmpo.rewards import Rewards
from hmpo.rewards.library import format_tags, json_schema, regex
from hmpo.rewards.library.base import fenced
from hmpo.rewards.library.structure import last_json
from tests.rewards.library.cases import HARD

NEEDS_A = {"type": "object", "required": ["a"]}


@pytest.mark.parametrize(
    ("options", "text", "answer", "reward"),
    [
        ({"pattern": r"\d+"}, "is 42", None, 1.0),
        ({"pattern": r"\d+"}, "none", None, 0.0),
        ({"pattern": r"\d+", "whole": True}, " 42\n", None, 1.0),
        ({"pattern": r"\d+", "whole": True}, "is 42", None, 0.0),
        ({"pattern": "(?i)ANSWER"}, "answer", None, 1.0),
        ({"pattern": r"= (\d+)", "column": "answer"}, "= 1 = 42", "42", 1.0),
        ({"pattern": r"= (\d+)", "column": "answer"}, "= 42 = 1", "42", 0.0),
        ({"pattern": r"\d+", "column": "answer"}, "= 42", 42, 1.0),
        ({"pattern": r"(x)?y", "column": "answer"}, "y", "", 1.0),
        ({"pattern": r"\d+", "column": "answer"}, "", "42", 0.0),
        ({"pattern": r"\d+", "column": "answer"}, "42", None, None),
        ({"pattern": r"\d+", "column": "answer"}, "42", [], None),
        ({"pattern": r"\d+", "column": "answer"}, "42", np.array(["41", "42"]), 1.0),
    ],
)
def test_regex_finds_a_pattern_or_compares_its_last_match(options, text, answer, reward):
    assert regex(**options)(completions=[text], answer=[answer]) == [reward]


@pytest.mark.parametrize("pattern", ["(", "*", "a{99999999999999999999}"])
def test_a_pattern_that_is_none_is_one_line(pattern):
    with pytest.raises(ConfigError, match=r"regex\.pattern: got") as caught:
        regex(pattern=pattern)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "text", "reward"),
    [
        ({}, "<think>a</think><answer>b</answer>", 1.0),
        ({}, " <think>\n</think>\n\n<answer></answer>\n", 1.0),
        ({}, "<think>a</think>so <answer>b</answer>", 0.0),
        ({"around": True}, "<think>a</think>so <answer>b</answer>.", 1.0),
        ({}, "<answer>b</answer><think>a</think>", 0.0),
        ({"around": True}, "<answer>b</answer><think>a</think>", 0.0),
        ({}, "<think>a<answer>b</answer></think>", 0.0),
        ({}, "<think>a</think><think>a</think><answer>b</answer>", 0.0),
        ({"around": True}, "<think>a</think><answer>b</answer><answer>", 0.0),
        ({}, "<think>a</think><answer>b", 0.0),
        ({}, "a</think><answer>b</answer>", 0.0),
        ({"opened": True}, "a</think><answer>b</answer>", 1.0),
        ({"opened": True}, "<think>a</think><answer>b</answer>", 0.0),
        ({"tags": ["x"]}, "<x><script></x>", 1.0),
        ({}, "", 0.0),
        ({}, None, 0.0),
    ],
)
def test_format_tags_wants_each_once_and_in_order(options, text, reward):
    assert format_tags(**options)(completions=[text]) == [reward]


@pytest.mark.parametrize("tags", [[], ["a", "a"], ["a b"], ["<a>"]])
def test_tags_that_are_none_are_one_line(tags):
    with pytest.raises(ConfigError, match=r"format_tags\.tags: got"):
        format_tags(tags=tags)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1}', {"a": 1}),
        (" 42 ", 42),
        ("null", None),
        ('x {"a": 1} y {"b": [2, "}"]} z', {"b": [2, "}"]}),
        ('```json\n{"a": 2}\n```\nand {"a": 3}', {"a": 2}),
        ('```json\nthe value {"a": 2}\n```', {"a": 2}),
        ("```\n[1]\n```\n~~~\n[2]\n~~~", [2]),
        ('[1] says "{" but [2, {"c": {}}]', [2, {"c": {}}]),
        ('see [1], {"a": "' + "b" * 9000 + '"}', {"a": "b" * 9000}),
        ('{"a": 1} {"b": ', {"a": 1}),
    ],
)
def test_the_last_json_value_of_a_text(text, value):
    assert last_json(text) == [value]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no",
        '{"a": NaN}',
        "[Infinity]",
        "NaN",
        '{"a": ',
        "{a: 1}",
        "[" + "9" * 5000,
        "1e400",
        "[1.0, -1e999]",
        '```json\n{"a": 1e400}\n```',
        '{"b": 1} and {"a": 1e400}',
    ],
)
def test_texts_without_a_json_value(text):
    assert last_json(text) == []


@pytest.mark.parametrize(
    ("schema", "text", "reward"),
    [
        (NEEDS_A, '{"a": 1}', 1.0),
        (NEEDS_A, '{"b": 1}', 0.0),
        (NEEDS_A, "[]", 0.0),
        (NEEDS_A, "prose", 0.0),
        (None, '{"b": 1}', 1.0),
        (None, "prose", 0.0),
        ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "number"}}}, "3", 1.0),
        ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "number"}}}, '"3"', 0.0),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "const": 1}, "1", 1.0),
        ({"$ref": "https://json-schema.org/draft/2020-12/schema"}, '{"type": "string"}', 1.0),
    ],
)
def test_json_schema_validates_the_value(schema, text, reward):
    assert json_schema(schema=schema)(completions=[text]) == [reward]


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"multipleOf": 0.01}, "1e400"),
        ({"multipleOf": 0.01}, "1e308"),
        ({"multipleOf": 0.5}, "9" * 400),
        ({"multipleOf": 0.5}, "1" * 4000),
        ({"type": "integer"}, "1e400"),
        ({"maximum": 3.5}, "9" * 400),
    ],
)
def test_a_number_beyond_every_float_is_wrong_and_no_crash(schema, text):
    whole = {"properties": {"price": schema}}
    function = json_schema(schema=whole)
    texts = [f'{{"price": {text}}}', '{"price": 1}']
    assert function(completions=texts)[0] == 0.0
    assert function(completions=texts)[1] == 1.0


def test_a_schema_that_refers_to_nothing_ends_the_run_whatever_is_skipped():
    function = json_schema(schema={"$ref": "#/$defs/nowhere"})
    with (
        Rewards(function, on_error="skip") as rewards,
        pytest.raises(RewardError, match=r"step 3: .*put it into \$defs"),
    ):
        rewards(["?"], ["1"], [[1]], {}, step=3)


def test_a_value_nested_too_deeply_is_wrong_and_no_crash():
    tree = {"$ref": "#/$defs/t", "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}}
    for depth in (5, 400, 900, 100_000):
        found = json_schema(schema=tree)(completions=["[" * depth + "]" * depth])
        assert found in ([1.0], [0.0]) and (depth > 5 or found == [1.0])


def test_a_schema_of_a_file(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(NEEDS_A))
    assert json_schema(schema_file=str(path))(completions=['{"a": 1}', "{}"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schema": {"type": "objct"}}, "no JSON schema .type: 'objct' is not valid"),
        ({"schema": {"$ref": "http://127.0.0.1:9/x.json"}}, "nothing is fetched"),
        ({"schema": NEEDS_A, "schema_file": "x"}, "expected one of them"),
        ({"schema_file": "no/such.json"}, "cannot read no/such.json .No such file"),
    ],
)
def test_a_schema_that_is_none_is_one_line(options, words):
    with pytest.raises(ConfigError, match=words) as caught:
        json_schema(**options)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'hmpo\[rewards\]'"):
        json_schema()


@pytest.mark.parametrize("make", [json_schema, format_tags, lambda: regex(pattern="x+y")])
@pytest.mark.parametrize("hard", HARD)
def test_no_text_is_too_hard(make, hard):
    assert make()(completions=[HARD[hard]]) in ([0.0], [1.0])


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("a\n```python\nx\n```\nb", [("python", "x\n")]),
        ("````\n```\nx\n```\n````", [("", "```\nx\n```\n")]),
        ("~~~ {.py}\nx\n~~~", [("{.py}", "x\n")]),
        ("```py\nx", [("py", "x")]),
        ("use ``` here", []),
        ("```a` b```\nx", []),
        ("", []),
    ],
)
def test_fenced_blocks_are_those_of_commonmark(text, blocks):
    assert fenced(text) == blocks
