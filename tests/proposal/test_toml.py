"""What is written is read as what was meant, whatever is in it."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmpo.proposal.toml import literal, written

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
numbers = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    texts | st.booleans() | numbers,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(values)
def test_a_value_is_read_back(value):
    assert tomllib.loads(f"value = {literal(value)}") == {"value": value}


@given(st.dictionaries(texts, values, max_size=4))
def test_tables_are_read_back(tables):
    plain = {k: v for k, v in tables.items() if not isinstance(v, dict)}
    filled = {k: v for k, v in tables.items() if isinstance(v, dict) and v}
    assert tomllib.loads(written(plain | filled, {}, "head")) == plain | filled


def test_comments_stand_behind_short_lines_and_above_long_ones():
    comments = {"a": "short", "t.b": "word " * 40, "t.c": "inner"}
    text = written({"a": 1, "t": {"b": 2, "c": {"x": 1}, "d": 3}}, comments, "one\ntwo")
    lines = text.splitlines()
    assert lines[:2] == ["# one", "# two"] and lines[2] == f"{'a = 1':33} # short"
    assert all(len(line) <= 100 for line in lines)
    assert lines[lines.index("b = 2") - 1].startswith("# word") and "d = 3" in lines
    assert f"{'c = { x = 1 }':33} # inner" in lines


def test_small_numbers_are_written_as_people_do():
    numbers = [1e-4, 3e-6, 1.5e-5, 0.05, 32.0, 0.0, 1e-7 / 3]
    assert [literal(n) for n in numbers[:6]] == ["1e-4", "3e-6", "1.5e-5", "0.05", "32.0", "0.0"]
    assert float(literal(numbers[6])) == numbers[6]


def test_what_toml_has_not_is_refused():
    with pytest.raises(TypeError):
        literal(None)
