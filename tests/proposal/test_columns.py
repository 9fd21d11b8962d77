"""Columns are told by their names, then by what is in them, and never by chance."""

import pytest

from hmpo.proposal.columns import NoColumn, answer_column, as_messages, prompt_column

TURN = [{"role": "user", "content": "hi"}]
PROMPTS = {
    "the task's own name": ({"question": "a", "prompt": "b"}, "prompt"),
    "as others call it": ({"id": 3, "problem": "a", "level": "b"}, "problem"),
    "in another case": ({"Question": "a", "Answer": "b"}, "Question"),
    "messages": ({"id": "x", "messages": TURN}, "messages"),
    "messages before text": ({"text": "x", "messages": TURN}, "messages"),
    "the only text": ({"n": 3, "stem": "a", "answer": "b"}, "stem"),
    "a name that holds numbers is none": ({"question": 3, "stem": "a"}, "stem"),
}
ANSWERS = {
    "the task's own name": ({"solution": "long", "answer": "b"}, "answer"),
    "as others call it": ({"solution": "b", "level": 3}, "solution"),
    "in camel case": ({"answerKey": "B"}, "answerKey"),
    "inside a table": ({"extra_info": {"answer": "3"}}, "extra_info.answer"),
    "verl's, which the task finds": ({"reward_model": {"ground_truth": "3"}}, ""),
    "none": ({"level": 3}, ""),
    "an empty one is none": ({"answer": None, "target": "3"}, "target"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_the_prompt_is(name):
    row, expected = PROMPTS[name]
    assert prompt_column([row], "f")[0] == expected


@pytest.mark.parametrize("name", ANSWERS)
def test_the_answer_is(name):
    row, expected = ANSWERS[name]
    assert answer_column([row | {"prompt": "p"}], "prompt") == expected


@pytest.mark.parametrize("row", [{"a": "x", "b": "y"}, {"a": 3}, {"a": ""}])
def test_what_cannot_be_told_is_refused_with_the_names(row):
    with pytest.raises(NoColumn, match=r"columns\.prompt=NAME") as caught:
        prompt_column([row], "f.csv")
    assert caught.value.names == list(row) and "\n" not in str(caught.value)


def test_messages_may_stand_as_json_in_a_text():
    assert as_messages('[{"role": "user", "content": "hi"}]') == TURN == as_messages(TURN)
    assert as_messages("[1, 2]") is None and as_messages('["role"') is None
