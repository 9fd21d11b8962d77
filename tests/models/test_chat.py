"""Conversations as ids: those of the template, once; what it refuses; where a turn ends."""

import itertools

import pytest
from transformers import PreTrainedTokenizerFast

from hmpo.errors import ConfigError, ModelError
from hmpo.models import character_tokenizer
from hmpo.models.chat import PromptOptions, prompt_rows, refuse_options, render, turn_end_ids
from hmpo.models.tokens import encode_prompts
from tests.models.chat_tokenizers import FAMILIES, gemma, llama, made, plain, qwen

USER = {"role": "user", "content": "2 + 2 = ?"}
SYSTEM = {"role": "system", "content": "Be brief."}
SHOT = [{"role": "user", "content": "1 + 1 = ?"}, {"role": "assistant", "content": "2"}]
BEGUN = {"role": "assistant", "content": "The answer is "}
LAYOUTS = {
    "one turn": [USER],
    "system": [SYSTEM, USER],
    "shots": [*SHOT, USER],
    "system and shots": [SYSTEM, *SHOT, USER],
    "begun": [USER, BEGUN],
    "shots and begun": [*SHOT, USER, BEGUN],
}
OPTIONS = {"no option": {}, "no thinking": {"enable_thinking": False}}


def written_out(tokenizer, messages, options) -> list[int]:
    """The slow way: the text of the template, cut after a begun turn, tokenized without more."""
    open_turn = messages[-1]["role"] == "assistant"
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=not open_turn, **options
    )
    if open_turn:
        begun = messages[-1]["content"]
        found = begun if begun in text else begun.strip()
        text = text[: text.rindex(found) + len(found)]
    return tokenizer(text, add_special_tokens=False).input_ids


TABLE = list(itertools.product(FAMILIES, LAYOUTS, OPTIONS))


@pytest.mark.parametrize(("family", "layout", "option"), TABLE)
def test_every_layout_has_the_ids_of_the_template_or_one_line(family, layout, option) -> None:
    tokenizer, messages, options = FAMILIES[family](), LAYOUTS[layout], OPTIONS[option]
    knows = not options or "enable_thinking" in tokenizer.chat_template
    if not knows or (family == "gemma" and SYSTEM in messages):
        with pytest.raises(ModelError) as caught:
            render(tokenizer, messages, options=options)
        wanted = "System role not supported" if knows else "enable_thinking: the tokenizer's chat"
        assert wanted in str(caught.value) and "\n" not in str(caught.value)
        return
    ids = render(tokenizer, messages, options=options)
    assert ids == written_out(tokenizer, messages, options)
    assert tokenizer.bos_token_id is None or ids.count(tokenizer.bos_token_id) <= 1
    assert (
        prompt_rows(tokenizer, [messages, messages], PromptOptions(template=options)) == [ids] * 2
    )
    if option == "no thinking" and messages[-1] is USER:
        assert "</think>" in tokenizer.decode(ids)
        assert ids != render(tokenizer, messages)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_rendered_text_gets_no_second_start_token(family: str) -> None:
    tokenizer = FAMILIES[family]()
    text = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    ids, _ = encode_prompts(tokenizer, [text])
    assert ids[0].tolist() == render(tokenizer, [USER])
    assert ids[0].tolist()[0] == tokenizer.bos_token_id


def test_text_does_not_go_through_the_template() -> None:
    tokenizer = llama()
    (row,) = prompt_rows(tokenizer, ["2 + 2 ="], PromptOptions())
    assert row == tokenizer("2 + 2 =").input_ids and row[0] == tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("family", "end"),
    [
        ("llama", "<|eot_id|>"),
        ("qwen", "<|im_end|>"),
        ("gemma", "<end_of_turn>"),
        ("plain", None),
        ("chatml of added tokens", "<|im_end|>"),
    ],
)
def test_a_turn_ends_where_the_template_ends_it(family: str, end: str | None) -> None:
    tokenizer = FAMILIES[family]()
    wanted = () if end is None else (tokenizer.convert_tokens_to_ids(end),)
    assert turn_end_ids(tokenizer) == wanted == turn_end_ids(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    assert turn_end_ids(tokenizer) == (tokenizer.eos_token_id,), "another template is read anew"
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert turn_end_ids(tokenizer) == ()
    tokenizer.chat_template = None
    assert turn_end_ids(tokenizer) == ()


def test_tools_reach_the_template() -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    tokenizer = qwen()
    text = tokenizer.decode(render(tokenizer, [SYSTEM, USER], tools=[tool]))
    assert '"name"' in text and text.count("<|im_start|>system") == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"enable_thinkin": False}, "template_options.enable_thinkin: the tokenizer's chat"),
        ({"custom_option": 1}, "template_options.custom_option: the tokenizer's chat"),
        ({"tokenize": False}, "template_options.tokenize: is decided by the task"),
        ({"messages": []}, "template_options.messages: is decided by the task"),
        ({"add_generation_prompt": False}, "template_options.add_generation_prompt: is decided"),
    ],
)
def test_an_option_that_nothing_reads_is_refused(options, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        render(qwen(), [USER], options=options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_option_of_one_of_several_templates_is_accepted() -> None:
    tokenizer = made({"default": "{{ messages[0].content }}{{ mood }}", "tool_use": "{{ style }}"},
                     ["</s>"], eos="</s>")  # fmt: skip
    refuse_options(tokenizer, {"mood": "!", "style": 1})
    assert tokenizer.decode(render(tokenizer, [USER], options={"mood": "!"})) == "2 + 2 = ?!"


MESSAGES = [
    ([], "got [], expected a list of"),
    ("2 + 2", "got '2 + 2', expected a list of"),
    ([[USER]], "expected a list of"),
    (
        [{"from": "human", "value": "2"}],
        "message 0: has from, value, expected 'role' and 'content'",
    ),
    ([USER, {"role": "assistant"}], "message 1: its content is None, expected text"),
    ([{"role": "user", "content": 3}], "message 0: its content is 3, expected text"),
    ([{"role": "user", "content": [{"type": "image"}]}], "has the part {'type': 'image'}"),
    ([{"role": "user", "content": "\ud83d"}], "message 0: holds a lone surrogate"),
    ([{"role": "user", "content": "\u00a7"}], "holds characters the tokenizer does not know"),
]


@pytest.mark.parametrize(("messages", "words"), MESSAGES)
def test_messages_of_another_form_are_one_line(messages, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        render(qwen(), messages)
    assert words in str(caught.value) and str(caught.value).isprintable()


def test_a_template_that_cannot_take_the_messages_is_one_line() -> None:
    with pytest.raises(ModelError, match=r"chat template: refuses .*\(Roles must alternate\)"):
        render(gemma(), [USER, USER])
    parts = [{"role": "user", "content": [{"type": "text", "text": "2"}]}]
    with pytest.raises(ModelError, match=r"chat template: refuses .*; change the messages"):
        render(qwen(), parts)
    with pytest.raises(ModelError, match="makes no token of"):
        render(made("{{ '' }}", ["</s>"], eos="</s>"), [USER])


def test_no_template_is_one_line() -> None:
    for act in (lambda t: render(t, [USER]), lambda t: refuse_options(t, {})):
        with pytest.raises(ModelError, match="has no chat template, so messages cannot be asked"):
            act(character_tokenizer("2 +=?"))


def test_a_tokenizer_that_renders_without_a_template_is_asked_itself() -> None:
    class Own(PreTrainedTokenizerFast):
        def apply_chat_template(self, conversation, **kwargs):
            ids = self("".join(turn["content"] for turn in conversation)).input_ids
            return {"input_ids": ids}

    tokenizer = Own(tokenizer_object=llama().backend_tokenizer, bos_token="<|begin|>")
    assert render(tokenizer, [USER]) == tokenizer(USER["content"]).input_ids
    with pytest.raises(ModelError, match="Own renders messages without a template"):
        render(tokenizer, [USER], options={"enable_thinking": False})


def test_a_limit_cuts_on_the_left_and_keeps_the_start_token() -> None:
    for tokenizer in (llama(), qwen(), gemma(), plain()):
        (whole,) = prompt_rows(tokenizer, [[USER]], PromptOptions())
        (same,) = prompt_rows(tokenizer, [[USER]], PromptOptions(max_tokens=len(whole)))
        (cut,) = prompt_rows(tokenizer, [[USER]], PromptOptions(max_tokens=7))
        kept = [tokenizer.bos_token_id] if whole[0] == tokenizer.bos_token_id else []
        assert same == whole and cut == [*kept, *whole[len(whole) - 7 + len(kept) :]]
        (text,) = prompt_rows(tokenizer, ["2 + 2 ="], PromptOptions(max_tokens=3))
        assert len(text) == 3 and tokenizer.decode(text[-1:]) == "="
    assert len(prompt_rows(llama(), ["22"], PromptOptions(max_tokens=1))[0]) == 1
    with pytest.raises(ConfigError, match="max_tokens: got 0"):
        PromptOptions(max_tokens=0)


def test_texts_and_messages_do_not_stand_side_by_side() -> None:
    with pytest.raises(ModelError, match="got texts beside messages"):
        prompt_rows(llama(), ["2", [USER]], PromptOptions())
