"""Whatever an environment returns is read, or refused in one line."""

import math

import pytest

from hmpo.environments import Environment, Environments
from hmpo.environments.protocol import answer, chosen, messages_of, opening
from hmpo.errors import ConversationError
from tests.environments.games import Echo, Odd
from tests.models.templates import byte_tokenizer

USER = [{"role": "user", "content": "hi"}]


def test_the_protocol_is_what_environments_have():
    assert isinstance(Echo(), Environment) and not isinstance(object(), Environment)


def test_a_conversation_begins_with_the_prompt_or_what_reset_says():
    assert opening("a", None, chat=False) == "a"
    assert opening("a", "b", chat=False) == "ab"
    assert opening("a", "b", chat=True) == [{"role": "user", "content": "ab"}]
    assert opening(USER, " you", chat=False) == [{"role": "user", "content": "hi you"}]
    assert opening("a", USER, chat=False) == USER and USER == [{"role": "user", "content": "hi"}]
    for told in (3, [], [1], [{"role": "user"}]):
        with pytest.raises(ConversationError, match=r"^reset(: got|, message 0:)"):
            opening("a", told, chat=False)
    odd = {"role": "user", "content": "\udfff"}
    for prompt, told in (
        ("a", "\ud800"),
        (USER, "\ud800"),
        (USER, [{}]),
        ("a", [odd]),
        ([odd], None),
    ):
        with pytest.raises(ConversationError, match=r"^(reset|prompt)") as info:
            opening(prompt, told, chat=False)
        assert "\n" not in str(info.value)


def test_an_answer_is_text_or_messages_as_the_conversation_is():
    assert answer(("x", 1, False), chat=False) == ("x", 1.0, False)
    assert answer(("x", 1, False), chat=True)[0] == [{"role": "user", "content": "x"}]
    assert answer((USER, 0.5, False), chat=True) == (USER, 0.5, False)
    assert answer((None, 0.5, True), chat=False) == ("", 0.5, True), "nothing is read at the end"
    for returned in (
        ("\ud800", 0, False),
        None,
        ("x", 1),
        ("x", math.nan, False),
        ("x", "much", True),
    ):
        with pytest.raises(ConversationError, match="step: got"):
            answer(returned, chat=False)
    with pytest.raises(ConversationError, match="in a conversation of text"):
        answer((USER, 0, False), chat=False)
    with pytest.raises(ConversationError, match="at least one message"):
        answer(([], 0, False), chat=True)
    for message in ({"role": "user", "content": 3}, {"role": "user", "content": "\ud800"}):
        with pytest.raises(ConversationError, match="step, message 0"):
            answer(([message], 0, False), chat=True)


def test_columns_go_where_they_are_named():
    def named(prompt, b=2):
        return None

    assert chosen(named, {"prompt": "p", "a": 1}, "reset") == {"prompt": "p"}
    assert chosen(lambda **columns: None, {"prompt": "p", "a": 1}, "reset") == {
        "prompt": "p",
        "a": 1,
    }
    with pytest.raises(ConversationError, match="parameter 'prompt' is none of a"):
        chosen(named, {"a": 1}, "reset")


def test_what_an_environment_raises_is_one_line_with_its_name():
    (session,) = Environments(Odd, tokenizer=byte_tokenizer(None)).take(1)
    session.open("a", {})
    session.instance.returned = 3
    with pytest.raises(ConversationError, match="step: got 3, expected"):
        session.step("x", [], [])
    session.instance.get_reward = lambda: "much"
    with pytest.raises(ConversationError, match=r"Odd\.get_reward: got the reward 'much'"):
        session.end()
    session.instance.step = lambda text: 1 / 0
    with pytest.raises(ConversationError, match=r"Odd\.step: raised ZeroDivisionError"):
        session.step("x", [], [])


def test_messages_are_copied():
    given = [{"role": "user", "content": "hi"}]
    found = messages_of(given, "step")
    found[0]["content"] = "changed"
    assert given == USER
