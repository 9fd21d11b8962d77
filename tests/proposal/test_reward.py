"""The reward that is suggested fits the answers, and gives 1 to a right response."""

import dataclasses
import importlib.util
import json

import pytest

from hmpo.config import PolicyConfig
from hmpo.proposal.data import look_at_data
from hmpo.proposal.policy import look_at_policy
from hmpo.proposal.reward import known_options, suggest
from hmpo.rewards.library.options import make

SCHEMA = {"type": "object", "required": ["name"]}
CASES = {
    "numbers": ([{"answer": str(n)} for n in range(20)], "last_number", "I say 0", {}),
    "numbers of a table": ([{"answer": n + 0.5} for n in range(20)], "last_number", "0.5", {}),
    "prices": ([{"answer": f"${n},000.50"} for n in range(1, 9)], "last_number", "1000.5", {}),
    "fractions": ([{"answer": f"1/{n}"} for n in range(1, 20)], "last_number", "1/1", {}),
    "GSM8K's": ([{"answer": f"So.\n#### {n}"} for n in range(20)], "last_number", "0", {}),
    "boxes": ([{"solution": f"so \\boxed{{{n}}}"} for n in range(20)], "math", "\\boxed{0}", {}),
    "formulas": (
        [{"answer": f"\\frac{{{n}}}{{7}}"} for n in range(1, 20)], "math", "\\boxed{1/7}", {},
    ),
    "letters": ([{"answer": "ABCD"[n % 4]} for n in range(20)], "choice", "Answer: A", {}),
    "many letters": (
        [{"answer": "(" + "ABCDEFGH"[n % 8] + ")"} for n in range(20)], "choice", "Answer: A",
        {"letters": "ABCDEFGH"},
    ),
    "indices": (
        [{"answer": n % 4, "choices": ["w", "x", "y", "z"]} for n in range(20)], "choice",
        "Answer: A", {},
    ),
    "tests": (
        [{"test_list": ["assert f() == 1", "assert f()"]}] * 20, "unit_tests",
        "```python\ndef f():\n    return 1\n```", {"column": "test_list"},
    ),
    "a schema": ([{"schema": SCHEMA}] * 20, "json_schema", '{"name": 1}', {"schema": SCHEMA}),
    "words": (
        [{"answer": ["Paris", "Rome"][n % 2]} for n in range(20)], "contains", "it is paris.",
        {"casefold": True, "words": True},
    ),
}  # fmt: skip


def facts(tmp_path, rows):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": f"question {n}?"} | row for n, row in enumerate(rows)]))
    return look_at_data(str(path), {})


@pytest.fixture(scope="module")
def policy(place):
    return look_at_policy(PolicyConfig(path=str(place / "llama")))


@pytest.mark.parametrize("name", CASES)
def test_the_suggestion_scores_a_right_response_by_1(tmp_path, policy, name):
    rows, function, right, options = CASES[name]
    data = facts(tmp_path, rows)
    found = suggest(data, policy)
    assert (found.function, dict(found.options)) == (function, options), found.why
    first = rows[0] | {"answer": rows[0].get(data.answer)}
    columns = {key: [value] for key, value in first.items()}
    scored = make(function, options)
    assert scored(completions=[right], prompts=["?"], completion_ids=[[1]], **columns) == [1.0]
    assert found.safe == (function != "unit_tests")


def test_choices_that_no_prompt_shows_are_told(tmp_path, policy):
    rows, *_ = CASES["indices"]
    assert "put them there" in suggest(facts(tmp_path, rows), policy).note
    shown = [row | {"prompt": f"w x y z? {n}"} for n, row in enumerate(rows * 3)]
    assert suggest(facts(tmp_path, shown), policy).note == ""


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([{"level": n} for n in range(20)], "no column of answers among prompt, level"),
        ([{"answer": "a long story " * 20}] * 20, "texts of up to 259 characters"),
        ([{"test": "def check(f):\n    assert f() == 1"}] * 20, "no column of answers"),
    ],
    ids=["no answers", "long answers", "tests that assert nothing when they run"],
)
def test_where_nothing_fits_nothing_is_suggested(tmp_path, policy, rows, why):
    found = suggest(facts(tmp_path, rows), policy)
    assert found.function == "" and why in found.why


def test_a_model_without_a_template_is_asked_for_the_answer_alone(tmp_path, policy):
    rows, *_ = CASES["words"]
    base = dataclasses.replace(policy, template=False)
    assert suggest(facts(tmp_path, rows), base).function == "exact"


def test_without_math_verify_boxes_are_compared_as_texts(tmp_path, policy, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "math_verify" else find(name)
    )
    found = suggest(facts(tmp_path, CASES["boxes"][0]), policy)
    assert found.function == "boxed" and "hmpo[rewards]" in found.why


def test_a_chosen_function_gets_the_options_that_its_rows_call_for(tmp_path, policy):
    data = facts(tmp_path, CASES["tests"][0])
    assert known_options("unit_tests", data, policy).options == {"column": "test_list"}
    assert known_options("unit_tests", data, policy).safe
    thinker = dataclasses.replace(policy, thinks=True)
    assert known_options("format_tags", data, thinker).options == {"opened": True}
    assert known_options("mine.py:f", data, policy).function == "mine.py:f"
