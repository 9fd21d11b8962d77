"""exact, contains, last_number, boxed, choice: tables of cases, and texts that are hard to read."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmpo.errors import ConfigError
from hmpo.rewards.library import boxed, choice, contains, exact, last_number
from hmpo.rewards.library.text import chosen, last_box, number_in
from tests.oracles.rewards import box
from tests.rewards.library.cases import HARD


def score(function, text, answer):
    return function(completions=[text], answer=[answer])[0]


@pytest.mark.parametrize(
    ("options", "text", "answer", "reward"),
    [
        ({}, " 42\n", "42", 1.0),
        ({}, "42.", "42", 0.0),
        ({}, "Paris", "paris", 0.0),
        ({"casefold": True}, "STRASSE", "stra\u00dfe", 1.0),
        ({}, "b", ["a", "b"], 1.0),
        ({}, "7", 7, 1.0),
        ({}, "", "", 1.0),
        ({}, None, "a", 0.0),
        ({}, "a", None, None),
        ({}, "nan", math.nan, None),
        ({}, "a", [], None),
        ({}, "a", [None, math.nan], None),
        ({}, "", [""], 1.0),
        ({}, "b", np.array(["a", "b"]), 1.0),
        ({}, "b", np.array([np.array(["a"]), np.array(["b"])]), 0.0),
        ({}, "7", np.int64(7), 1.0),
        ({}, "b", np.str_("b"), 1.0),
        ({}, "nan", np.float32("nan"), None),
        ({}, "a", np.array([]), None),
        ({}, "2", torch.tensor([1, 2]), 1.0),
        ({}, "<script>", "<script>", 1.0),
    ],
)
def test_exact_compares_stripped_texts(options, text, answer, reward):
    assert score(exact(**options), text, answer) == reward


@pytest.mark.parametrize(
    ("options", "text", "answer", "reward"),
    [
        ({}, "it is 42 now", "42", 1.0),
        ({}, "it is 142", "42", 1.0),
        ({"words": True}, "it is 142", "42", 0.0),
        ({"words": True}, "it is 42.", "42", 1.0),
        ({"words": True}, "(a+b)*c", "a+b", 1.0),
        ({}, "Paris", "paris", 0.0),
        ({"casefold": True}, "in PARIS", "paris", 1.0),
        ({"casefold": True, "words": True}, "in PARISH", "paris", 0.0),
        ({}, "a", ["x", "a"], 1.0),
        ({}, "anything", "", None),
        ({}, "", "a", 0.0),
    ],
)
def test_contains_looks_for_the_answer(options, text, answer, reward):
    assert score(contains(**options), text, answer) == reward


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72.", 72),
        ("1,234.50", Fraction("1234.5")),
        ("-3", -3),
        ("+3", 3),
        ("\u22125", -5),
        ("5-3", 3),
        ("x=-3", -3),
        ("(2)-1", 1),
        ("10-20", 20),
        ("- 5", 5),
        ("3/4", Fraction(3, 4)),
        ("-3 / 4", Fraction(-3, 4)),
        ("1 1/2", Fraction(3, 2)),
        ("-1 1/2", Fraction(-3, 2)),
        ("$5", 5),
        ("-$5", -5),
        ("\\$1,000", 1000),
        ("6e3", 6000),
        ("1.5e-2", Fraction(3, 200)),
        ("25%", 25),
        (".5", Fraction(1, 2)),
        ("1,2", 2),
        ("1,2345", 2345),
        ("1,234,567", 1234567),
        ("1,234,2345", 2345),
        ("1,234,56", 56),
        ("12,345.5,000", 0),
        ("v1.2", None),
        ("H2O", None),
        ("5kg", 5),
        ("3/0", None),
        ("", None),
        ("a - b", None),
        ("\u0663", None),
        ("NaN", None),
        ("inf", None),
        ("9" * 500, None),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert number_in(text) == number


@pytest.mark.parametrize(
    ("options", "text", "answer", "reward"),
    [
        ({}, "so 70 + 2 = 72", "2 * 36 = 72\n#### 72", 1.0),
        ({}, "0.75", "3/4", 1.0),
        ({}, "25%", "0.25", 0.0),
        ({}, "25%", "25", 1.0),
        ({}, "none", "72", 0.0),
        ({}, "72", "none", None),
        ({}, "72", [71, 72], 1.0),
        ({}, "0.1", 0.1, 1.0),
        ({}, "0.3333", "1/3", 0.0),
        ({"tolerance": 1e-3}, "0.3333", "1/3", 1.0),
        ({"tolerance": 0.1}, "1.1", "1", 1.0),
        ({}, "3", math.inf, None),
        ({}, "3", [], None),
        ({}, "5", np.array([3, 5]), 1.0),
        ({}, "0.5", np.float64(0.5), 1.0),
    ],
)
def test_last_number_compares_exactly_or_within_the_tolerance(options, text, answer, reward):
    assert score(last_number(**options), text, answer) == reward


@given(st.text("\\boxed{} a", max_size=40))
def test_the_last_box_is_that_of_a_count_of_braces(text):
    assert last_box(text) == box(text)


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        ("\\boxed{42}", "42", 1.0),
        ("\\boxed{1} then \\boxed{ 42 }", "42", 1.0),
        ("\\boxed{42} then \\boxed{1}", "42", 0.0),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1} {2}", 1.0),
        ("\\boxed{\\{1\\}}", "\\{1\\}", 1.0),
        ("\\boxed{x = \\boxed{3}}", "3", 1.0),
        ("\\fbox {3}", "3", 1.0),
        ("\\boxed{42", "42", 0.0),
        ("\\boxed 42", "42", 0.0),
        ("42", "42", 0.0),
        ("\\boxed{}", "", 1.0),
        ("\\boxed{42}", "thus \\boxed{42}.", 1.0),
        ("\\boxed{0.5}", "1/2", 0.0),
        ("\\boxed{0.5}", [], None),
        ("\\boxed{2}", np.array(["1", "2"]), 1.0),
    ],
)
def test_boxed_compares_what_the_last_box_holds(text, answer, reward):
    assert score(boxed(), text, answer) == reward


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Answer: B", "B"),
        ("the answer is (C).", "C"),
        ("**Answer:** *d*", "D"),
        ("Option E because", "E"),
        ("\\boxed{\\text{D}}", "D"),
        ("Answer: A. Wait, answer: B", "B"),
        ("(A) x\n(B) y\nThe answer is A", "A"),
        ("I weigh (A) and (C)", "C"),
        ("b", "B"),
        ("**(C)**.", "C"),
        ("thinking\nB", "B"),
        ("B) Paris", "B"),
        ("A) Rome\nB) Paris", None),
        ("A) Rome B) Paris", None),
        ("I think a dog", None),
        ("The answer is a dog", None),
        ("Answer: F", None),
        ("Answer: Because", None),
        ("", None),
    ],
)
def test_the_letter_that_a_text_chooses(text, letter):
    assert chosen(text, "ABCDE") == letter


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("B", 1.0),
        ("(b)", 1.0),
        (1, 1.0),
        ("1", 1.0),
        ("A", 0.0),
        (0, 0.0),
        (9, None),
        ("?", None),
        ([], None),
        (np.int64(1), 1.0),
        (np.array([0, 1]), 1.0),
    ],
)
def test_the_expected_letter_may_be_an_index(answer, reward):
    assert score(choice(), "Answer: B", answer) == reward


def test_other_letters_can_be_chosen():
    assert score(choice(letters="FG"), "Answer: G", "G") == 1.0
    assert score(choice(letters="FG"), "Answer: A", "F") == 0.0


@pytest.mark.parametrize("factory", [exact, contains, last_number, boxed, choice])
@pytest.mark.parametrize("hard", HARD)
def test_no_text_is_too_hard(factory, hard):
    """Each is a megabyte: what took quadratic time would run into the limit of the tests."""
    answer = "B" if factory is choice else "72"
    assert score(factory(), HARD[hard], answer) in (0.0, 1.0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: last_number(tolerance=-1.0), "last_number.tolerance: got -1.0"),
        (lambda: last_number(tolerance=math.nan), "tolerance: got nan"),
        (lambda: choice(letters="abc"), "choice.letters: got 'abc'"),
        (lambda: choice(letters="A"), "choice.letters"),
        (lambda: exact(column="prompts"), "exact.column: got 'prompts'"),
        (lambda: exact(column=""), "exact.column: got ''"),
    ],
)
def test_an_option_out_of_range_is_one_line(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
