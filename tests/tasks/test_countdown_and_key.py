"""Countdown's parser against brute force, its rule, and the one position that counts in key."""

import ast
import itertools
import operator
import random
import re
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hmpo.config import TaskConfig
from hmpo.errors import TaskError
from hmpo.tasks import make_task
from hmpo.tasks.arithmetic import evaluate

SYMBOLS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def by_syntax_tree(text):
    """Independent oracle: Python's own parser restricted to the grammar, over fractions."""
    if not re.fullmatch(r"[0-9+*/()-]{1,64}", text) or re.search(r"(?<![0-9])0[0-9]", text):
        return None
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, RecursionError):
        return None

    def value(node):
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in SYMBOLS:
            return SYMBOLS[type(node.op)](value(node.left), value(node.right))
        raise ValueError

    try:
        return value(tree), [int(n) for n in re.findall("[0-9]+", text)]
    except (ValueError, ZeroDivisionError):
        return None


numbers = st.integers(0, 40).map(str)
expressions = st.recursive(
    numbers,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map("".join), inner.map(lambda e: f"({e})")
    ),
    max_leaves=8,
)


@given(expressions)
def test_parser_agrees_with_brute_force_on_random_expressions(text):
    assert evaluate(text) == by_syntax_tree(text)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@given(st.text("0123456789+-*/()", max_size=9))
@example("2**3")
@example("7//2")
@example("-3")
@example("+3")
@example("3-+2")
@example("1/0")
@example("07")
@example("0")
@example("()")
@example("2(3)")
def test_parser_agrees_with_brute_force_on_random_strings(text):
    assert evaluate(text) == by_syntax_tree(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " 1",
        "1 +2",
        "1+2 ",
        "1.5",
        "1e3",
        "1_0",
        "x",
        "__import__('os')",
        "1=1",
        "\u0663",
        "\u00b2",
    ],
)
def test_parser_refuses_everything_outside_its_grammar(text):
    assert evaluate(text) is None


def test_parser_bounds_length_and_depth_without_reading_on():
    assert evaluate("(" * 31 + "7" + ")" * 31) == (Fraction(7), [7])
    assert evaluate("(" * 100_000 + "7" + ")" * 100_000) is None
    assert evaluate("9" * 65) is None


def grade(task, text, given_numbers, target):
    columns = {"answer": [""], "numbers": [given_numbers], "target": [target]}
    return task.reward(["p"], [text], [[]], **columns)[0]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("3*(7+8)\n", 1.0),
        ("(7+8)*3", 1.0),
        ("8*3+7*3", 0.0),  # 3 and more than once
        ("45", 0.0),  # not one of the numbers
        ("3*15", 0.0),
        ("3*(7+8", 0.0),
        ("3*7+8", 0.0),  # 29
        ("3*(7+8)=45", 0.0),
        (" 3*(7+8)", 0.0),
        ("", 0.0),
    ],
)
def test_countdown_accepts_exact_solutions_that_use_each_number_at_most_once(text, right):
    task = make_task(TaskConfig(name="countdown"))
    assert grade(task, text, [3, 7, 8], 45) == right


def test_countdown_allows_unused_numbers_repeated_givens_and_exact_fractions():
    task = make_task(TaskConfig(name="countdown", level=4))
    assert grade(task, "5*9", [5, 9, 2, 2, 1], 45) == 1.0
    assert grade(task, "2+2", [2, 2, 5, 9, 1], 4) == 1.0
    assert grade(task, "8/(3-8/3)", [8, 8, 3, 3], 24) == 1.0


@given(st.integers(0, 10**9), st.integers(1, 4))
def test_countdown_prompts_are_solvable_and_their_answer_uses_every_number(index, level):
    row = make_task(TaskConfig(name="countdown", level=level)).train(index).columns
    value, used = evaluate(row["answer"])
    assert value == row["target"]
    assert sorted(used) == sorted(row["numbers"])
    assert row["target"] not in row["numbers"]
    assert len(row["numbers"]) == level + 1
    assert 1 <= row["target"] <= 60


def test_countdown_reward_agrees_with_an_enumeration_of_all_two_number_expressions():
    task = make_task(TaskConfig(name="countdown", level=1))
    rng = random.Random(0)
    for _ in range(30):
        row = task.train(rng.randrange(10**6)).columns
        for a, b in itertools.permutations(row["numbers"]):
            for symbol, apply in zip("+-*/", SYMBOLS.values()):
                right = float(apply(Fraction(a), Fraction(b)) == row["target"])
                assert grade(task, f"{a}{symbol}{b}", row["numbers"], row["target"]) == right


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_number": 1}, "task.options.max_number: got 1"),
        ({"max_target": 100_000}, "task.options.max_target: got 100000"),
        ({"numbers": 3}, "unknown to countdown"),
    ],
)
def test_wrong_countdown_options_give_one_clear_line(options, words):
    with pytest.raises(TaskError, match=re.escape(words)):
        make_task(TaskConfig(name="countdown", options=options))


@given(st.integers(0, 10**6), st.text("abcdefghij", min_size=8, max_size=8))
def test_key_rewards_exactly_one_position_of_the_response(index, guess):
    task = make_task(TaskConfig(name="key"))
    row = task.train(index).columns
    at, answer = row["position"], row["answer"]
    columns = {"answer": [answer], "position": [at]}

    def reward(text):
        return task.reward(["p"], [text], [[]], **columns)[0]

    assert reward(guess) == float(guess[at] == answer[at])
    assert reward(guess[:at] + answer[at]) == 1.0
    assert reward(guess[:at]) == 0.0
    assert reward(guess[:at] + "\n" + answer[at:]) == 0.0
