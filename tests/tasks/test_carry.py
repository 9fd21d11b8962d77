"""Long additions against Python's integers, and what a wrong answer earns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmpo.config import EvalConfig, TaskConfig
from hmpo.tasks import ALPHABET, make_task

DIGITS = 6


def carry(**options):
    level = options.pop("level", None)
    return make_task(TaskConfig(name="carry", level=level, options=options))


def grade(task, text, answer):
    return task.reward(["p"], [text], [[]], answer=[answer])[0]


def number(row):
    """The integer that a row of marks and digits writes."""
    return int(row[1::2][::-1])


def oracle(prompt, level):
    """The answer from whole integers: a column is carried into where the part below overflows."""
    first, second = prompt[:-1].split(",")
    digits, rows = len(first) // 2, []
    values = [number(first), number(second)]
    for _ in range(level):
        one, other = values[-2:]
        total = (one + other) % 10**digits
        row = ""
        for column in range(digits):
            below = 10**column
            row += "+" if one % below + other % below >= below else "."
            row += str(total // below % 10)
        rows.append(row)
        values.append(total)
    return ",".join(rows)


@given(st.integers(0, 10**9), st.integers(1, 20), st.integers(2, 20))
def test_answers_agree_with_whole_integers_at_every_level_and_width(index, level, digits):
    task = carry(level=level, digits=digits)
    for example in (task.train(index), task.heldout(index % 3)):
        assert example.columns["answer"] == oracle(example.prompt, level)
        assert len(example.prompt) == 4 * digits + 2


@pytest.mark.parametrize("level", range(1, 21))
def test_the_length_of_an_answer_is_what_its_level_says(level):
    task = carry(level=level)
    lengths = {len(f(i).columns["answer"]) for f in (task.train, task.heldout) for i in range(4)}
    assert lengths == {level * (2 * DIGITS + 1) - 1}
    assert task.max_new_tokens == level * (2 * DIGITS + 1)


def test_answers_at_the_default_level_have_at_least_128_characters():
    assert len(carry().train(0).columns["answer"]) >= 128


def test_the_documented_examples_hold():
    assert oracle(".7.5,.6.6>", 2) == ".3+2,.9.8"
    assert oracle(".4.1.3,.9.5.1>", 2) == ".3+7.4,.2+3+6"


@given(st.data(), st.integers(0, 10**6), st.booleans())
def test_any_other_text_is_wrong_and_earns_its_right_beginning_only_where_asked(
    data, index, partial
):
    task = carry(level=2, partial=partial)
    answer = task.train(index).columns["answer"]
    at = data.draw(st.integers(0, len(answer)))
    tail = data.draw(st.text(ALPHABET.replace("\n", ""), max_size=30))
    text = answer[:at] + tail
    if text == answer:
        return
    right = 0
    for got, want in zip(text, answer):
        if got != want:
            break
        right += 1
    earned = grade(task, text + "\n" + answer[at:], answer)
    assert earned == (right / (len(answer) + 1) if partial else 0.0)
    assert earned < EvalConfig().success
    assert grade(task, answer + "\n" + tail, answer) == grade(task, answer, answer) == 1.0


@given(st.integers(0, 10**6), st.integers(0, 128), st.sampled_from("0123456789.+,"))
def test_one_changed_character_makes_an_answer_of_the_default_level_wrong(index, at, other):
    task = carry()
    answer = task.train(index).columns["answer"]
    text = answer[:at] + other + answer[at + 1 :]
    assert grade(task, text, answer) == float(other == answer[at])
    partial = grade(carry(partial=True), text, answer)
    assert partial == (1.0 if other == answer[at] else at / 130)


def test_every_character_follows_from_three_at_fixed_distances_before_it():
    task, row = carry(), 2 * DIGITS + 1
    seen = {}
    for index in range(300):
        example = task.train(index)
        text = example.prompt.replace(">", ",") + example.columns["answer"]
        for at in range(2 * row, len(text)):
            column = at % row
            upper = [text[at - row], text[at - 2 * row]]
            if column == 2 * DIGITS:
                known = (",",)
            elif column % 2:
                known = ("digit", text[at - 1], *upper)
            elif column == 0:
                known = (".",)
            else:
                known = ("mark", text[at - 2], text[at - row - 1], text[at - 2 * row - 1])
            assert seen.setdefault(known, text[at]) == text[at]
