"""Messages: what is one, and what of it is shown and checked."""

import pytest

from hmpo.errors import TaskError
from hmpo.rewards.messages import (
    as_text,
    content_text,
    is_conversation,
    last_text,
    refuse_messages,
)

USER = {"role": "user", "content": "2 + 2?"}
SAID = {"role": "assistant", "content": "4"}
PARTS = {
    "role": "user",
    "content": [{"type": "text", "text": "2 "}, {"type": "text", "text": "+ 2?"}],
}
TOLD = {"role": "tool", "content": "5"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}


@pytest.mark.parametrize("value", ["text", b"bytes", [], [1, 2], [USER, 1], USER, None, ["a"]])
def test_what_is_no_list_of_messages_is_left_as_it_is(value) -> None:
    assert not is_conversation(value)
    assert as_text(value) is value and last_text(value) is value


def test_a_conversation_is_shown_by_role_and_a_completion_by_its_text() -> None:
    assert as_text([USER, SAID]) == "user: 2 + 2?\nassistant: 4"
    assert as_text([PARTS]) == "user: 2 + 2?"
    assert as_text([SAID]) == last_text([SAID]) == last_text([USER, SAID]) == "4"
    assert as_text([CALL]) == last_text([CALL]) == ""
    assert last_text([SAID, TOLD]) == last_text([USER, SAID, USER]) == "4"
    assert last_text([USER]) == last_text([TOLD]) == ""
    assert as_text([{"x": 1}]) == "None: ", "a stranger's log may hold anything"


def test_the_text_of_parts_is_that_of_the_texts_among_them() -> None:
    odd = ["a", None, 3, {"type": "image"}, {"text": None}, {"type": "text", "text": "b"}]
    assert content_text({"content": odd}) == "ab" and content_text(CALL) == content_text({}) == ""


def test_messages_of_texts_and_calls_pass() -> None:
    refuse_messages([USER, SAID, PARTS, CALL])


def test_the_place_and_the_class_of_the_error_are_the_callers() -> None:
    with pytest.raises(
        TaskError, match=r"^a, line 3, message 1: its content is None, expected text$"
    ):
        refuse_messages([USER, {"role": "user"}], "a, line 3", TaskError)
