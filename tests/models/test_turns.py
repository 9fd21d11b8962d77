"""What stands between two turns, against the rendering of the whole conversation."""

import pytest

from hmpo.errors import ModelError
from hmpo.models.chat import render
from hmpo.models.turns import ids_behind, text_ids_behind
from tests.models.templates import (
    CHATML,
    GEMMA,
    LLAMA3,
    MOVING,
    NUMBERED,
    THINKING,
    byte_tokenizer,
    metaspace_tokenizer,
)

ASK = [{"role": "user", "content": "2+3?"}]
TOOL = [{"role": "tool", "name": "add", "content": "5"}]
TWO_TOOLS = [*TOOL, {"role": "tool", "name": "add", "content": "7"}]
USER = [{"role": "user", "content": "and 4+4?"}]
FUNCTION = {"name": "add", "description": "Adds.", "parameters": {}}
SCHEMA = [{"type": "function", "function": FUNCTION}]
END = {CHATML: "<|im_end|>", THINKING: "<|im_end|>", LLAMA3: "<|eot_id|>", GEMMA: "<end_of_turn>"}


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("template", "added", "tools"),
    [
        (CHATML, TOOL, SCHEMA),
        (CHATML, TWO_TOOLS, SCHEMA),
        (CHATML, USER, None),
        (THINKING, TOOL, None),
        (LLAMA3, TOOL, None),
        (LLAMA3, USER, None),
        (GEMMA, USER, None),
        (NUMBERED, USER, None),
    ],
)
@pytest.mark.parametrize("ended", [True, False])
def test_a_conversation_by_its_parts_is_its_rendering(template, added, tools, ended):
    """Also where a turn was cut: the environment ends it as the template would."""
    tokenizer = byte_tokenizer(template)
    end = END.get(template, "") if ended else ""
    ids, messages = render(tokenizer, ASK, tools=tools), list(ASK)
    for text in ("let me see", "it is 5"):
        sampled = ids_of(tokenizer, text + end)
        ids += sampled + ids_behind(tokenizer, sampled, added, tools=tools)
        messages += [{"role": "assistant", "content": text}, *added]
    whole = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert ids == whole


def test_what_was_sampled_is_kept_where_text_would_become_other_tokens():
    """`th` as two tokens stays two tokens, though the tokenizer writes one."""
    tokenizer = byte_tokenizer(CHATML, merges=[("t", "h")])
    assert len(ids_of(tokenizer, "th")) == 1
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "th"]
    behind = ids_behind(tokenizer, letters, TOOL)
    again = ids_behind(tokenizer, ids_of(tokenizer, "th"), TOOL)
    assert behind == again and behind[0] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_another_end_token_is_followed_by_the_templates_own():
    """A turn that ended by <|endoftext|> is what the policy wrote; the turn's end comes behind."""
    tokenizer = byte_tokenizer(CHATML)
    sampled = [*ids_of(tokenizer, "5"), tokenizer.eos_token_id]
    behind = ids_behind(tokenizer, sampled, TOOL)
    assert behind[0] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_more_of_the_turns_end_that_was_sampled_is_not_written_twice():
    tokenizer = byte_tokenizer(CHATML)
    one = ids_behind(tokenizer, ids_of(tokenizer, "5<|im_end|>"), TOOL)
    two = ids_behind(tokenizer, ids_of(tokenizer, "5<|im_end|>\n"), TOOL)
    assert one == [*ids_of(tokenizer, "\n"), *two]


def test_a_template_that_drops_earlier_thinking_is_refused_where_it_does():
    tokenizer = byte_tokenizer(THINKING)
    ids_behind(tokenizer, [], TOOL)
    with pytest.raises(ModelError, match="drops or changes the thinking of earlier turns") as info:
        ids_behind(tokenizer, [], USER)
    assert "\n" not in str(info.value)


def test_a_template_that_moves_messages_is_refused():
    with pytest.raises(ModelError, match="changes earlier turns where tool follows"):
        ids_behind(byte_tokenizer(MOVING), [], TOOL)


def test_a_template_that_refuses_a_role_is_quoted_in_one_line():
    with pytest.raises(ModelError, match="roles must alternate") as info:
        ids_behind(byte_tokenizer(GEMMA), [], TOOL)
    assert "\n" not in str(info.value)


def test_a_turns_end_that_grows_together_with_the_turn_is_refused():
    tokenizer = byte_tokenizer(NUMBERED, merges=[("n", "\u010a")])
    with pytest.raises(ModelError, match="no token of its own"):
        ids_behind(tokenizer, [], USER)


def test_another_template_is_looked_at_anew():
    tokenizer = byte_tokenizer(CHATML)
    ids_behind(tokenizer, [], TOOL)
    tokenizer.chat_template = MOVING
    with pytest.raises(ModelError, match="changes earlier turns"):
        ids_behind(tokenizer, [], TOOL)


@pytest.mark.parametrize("added", [[], [{"role": "assistant", "content": "x"}]])
def test_an_environment_adds_something_and_never_speaks_as_the_policy(added):
    with pytest.raises(ModelError, match="expected at least one, and none of the assistant"):
        ids_behind(byte_tokenizer(CHATML), [], added)


def test_messages_without_a_template_are_refused():
    tokenizer = byte_tokenizer(None)
    for call in (lambda: render(tokenizer, ASK), lambda: ids_behind(tokenizer, [], USER)):
        with pytest.raises(ModelError, match="has no chat template"):
            call()


def test_an_unknown_token_that_doubles_as_the_turns_end_is_no_unknown_character():
    tokenizer = byte_tokenizer(CHATML, special=["<|im_end|>", "<|endoftext|>", "<|im_start|>"])
    expected = ids_behind(tokenizer, ids_of(tokenizer, "5<|im_end|>"), USER)
    tokenizer.unk_token = "<|im_end|>"
    assert ids_behind(tokenizer, ids_of(tokenizer, "5<|im_end|>"), USER) == expected


def test_a_variable_that_the_template_does_not_mention_is_refused_between_turns_too():
    with pytest.raises(ModelError, match=r"template_options.mood: the tokenizer's chat template"):
        ids_behind(byte_tokenizer(CHATML), [], USER, options={"mood": True})


def test_plain_text_is_encoded_as_it_is_behind_other_text():
    tokenizer = metaspace_tokenizer()
    assert tokenizer("hi").tokens() == ["\u2581hi"], "a text of its own gets a space"
    assert tokenizer.convert_ids_to_tokens(text_ids_behind(tokenizer, "hi")) == ["hi"]
    grown = byte_tokenizer(None, merges=[("0", "x")])
    assert grown.decode(text_ids_behind(grown, "xy")) == "xy"
    with pytest.raises(ModelError, match="makes no token"):
        text_ids_behind(grown, "")
    with pytest.raises(ModelError, match="characters the tokenizer does not know"):
        text_ids_behind(tokenizer, "?")
