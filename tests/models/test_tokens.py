"""Tokens: the alphabet there and back, left padding, stop tokens, decoded responses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hmpo.errors import ModelError
from hmpo.models import character_tokenizer, decode_responses, encode_prompts, stop_token_ids
from hmpo.models.paths import TINY_SORT
from hmpo.models.tokens import end_token_ids, pad_token_id
from hmpo.sampling.stop import StopStrings
from hmpo.tasks import ALPHABET
from tests.support import tiny_causal, tiny_llama

TOKENIZER = AutoTokenizer.from_pretrained(TINY_SORT, local_files_only=True)
NEWLINE = TOKENIZER.convert_tokens_to_ids("\n")


def byte_level(words, **special):
    """A small tokenizer with byte-level tokens of several characters."""
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@given(st.text(alphabet=ALPHABET, max_size=40))
def test_every_text_over_the_alphabet_comes_back(text):
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


def test_the_bundled_tokenizer_is_that_of_the_alphabet():
    made = character_tokenizer(ALPHABET)
    assert made.get_vocab() == TOKENIZER.get_vocab()
    assert len(TOKENIZER) == len(ALPHABET) + 4
    assert (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (0, 1, 2)


def test_prompts_are_padded_on_the_left_and_start_with_bos():
    ids, mask = encode_prompts(TOKENIZER, ["31>", "3141>"])
    digit = TOKENIZER.convert_tokens_to_ids
    assert ids.tolist() == [
        [0, 0, 1, digit("3"), digit("1"), digit(">")],
        [1, *map(digit, "3141>")],
    ]
    assert mask.tolist() == [[False, False, True, True, True, True], [True] * 6]
    assert ids.dtype == torch.int64


def test_a_tokenizer_without_bos_adds_none_and_pads_with_eos_when_it_must():
    tokenizer = byte_level(["?", "a", "b", "end"], eos_token="end", unk_token="?")
    ids, mask = encode_prompts(tokenizer, ["a", "a"])
    assert ids.tolist() == [[1], [1]] and mask.all()
    assert tokenizer.pad_token_id is None
    assert encode_prompts(tokenizer, ["b"])[0].tolist() == [[2]]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts: got none, expected at least one"),
        (["1>", "A>"], "prompt 'A>': holds characters the tokenizer does not know"),
    ],
)
def test_prompts_that_cannot_be_encoded(prompts, message):
    with pytest.raises(ModelError) as caught:
        encode_prompts(TOKENIZER, prompts)
    assert str(caught.value) == message


def test_an_empty_prompt_needs_a_start_token():
    assert encode_prompts(TOKENIZER, [""])[0].tolist() == [[1]]
    with pytest.raises(ModelError, match="empty prompt"):
        encode_prompts(byte_level(["?", "a"], eos_token="a", unk_token="?"), [""])


def test_a_tokenizer_without_pad_and_end_is_refused():
    with pytest.raises(ModelError, match="neither a pad token nor an end token"):
        encode_prompts(byte_level(["?", "a"], unk_token="?"), ["a"])


def test_stop_tokens_are_eos_and_every_token_that_contains_the_stop():
    assert stop_token_ids(TOKENIZER, ["\n"]) == (2, NEWLINE)
    assert stop_token_ids(TOKENIZER, []) == (2,)
    # In byte-level vocabularies a new line is written as U+010A and a space as U+0120.
    words = ["?", "a", "\u010a", ".\u010a\u010a", "\u0120b", "end", "a."]
    tokenizer = byte_level(words, eos_token="end", unk_token="?")
    assert stop_token_ids(tokenizer, ["\n"]) == (2, 3, 5)
    assert stop_token_ids(tokenizer, ["\n", "."]) == (2, 3, 5, 6)
    assert stop_token_ids(tokenizer, [" b"]) == (4, 5)


def test_stop_strings_that_end_nothing_are_refused():
    with pytest.raises(ModelError, match="empty string"):
        stop_token_ids(TOKENIZER, ["\n", ""])
    with pytest.raises(ModelError, match="no token ends a response"):
        stop_token_ids(byte_level(["?", "a"], unk_token="?"), ["b"])


def test_responses_are_cut_at_the_first_stop_and_lose_special_tokens():
    eos = TOKENIZER.eos_token_id
    texts = ["12\n3", "12,3", "", "1 2"]
    rows = [TOKENIZER(text, add_special_tokens=False).input_ids for text in texts]
    rows[1].append(eos)
    length = max(map(len, rows))
    ids = torch.tensor([row + [4] * (length - len(row)) for row in rows])
    mask = torch.tensor([[i < len(row) for i in range(length)] for row in rows])
    assert decode_responses(TOKENIZER, ids, mask, ["\n"]) == ["12", "12,3", "", "1 2"]
    assert decode_responses(TOKENIZER, ids, mask, ["\n", ",", "2"]) == ["1", "1", "", "1 "]
    assert decode_responses(TOKENIZER, ids, mask, []) == ["12\n3", "12,3", "", "1 2"]


@given(st.lists(st.text(alphabet=ALPHABET, min_size=1, max_size=12), min_size=1, max_size=5))
def test_encoded_prompts_decode_to_themselves(prompts):
    ids, mask = encode_prompts(TOKENIZER, prompts)
    assert decode_responses(TOKENIZER, ids, mask, []) == prompts
    lengths = mask.sum(1)
    assert lengths.tolist() == [len(prompt) + 1 for prompt in prompts]
    assert (mask.int().diff(dim=1) >= 0).all()


SPECIAL = ("<pad>", "<s>", "</s>", "<|im_end|>", "[gMASK]", "<sop>")


def with_special(prefix: str = "<s> $A", **names):
    """One token for each letter and for each of `SPECIAL`, with a start prefix of its own."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *"0123>ab\n"))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(list(SPECIAL))
    backend.post_processor = processors.TemplateProcessing(
        single=prefix, special_tokens=[(t, vocabulary[t]) for t in prefix.split() if t != "$A"]
    )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"} | names
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def word_pieces():
    words = ["[UNK]", "[CLS]", "[SEP]", "0", "##ing", "#", "go"]
    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", sep_token="[SEP]")


def own_settings(generation, own):
    """A model with end tokens in its generation_config and in its config."""
    model = tiny_llama(20)
    model.generation_config.eos_token_id, model.config.eos_token_id = generation, own
    return model


def test_end_tokens_are_those_of_tokenizer_generation_config_and_config() -> None:
    tokenizer = with_special()
    assert stop_token_ids(tokenizer, ()) == (2,)
    assert stop_token_ids(tokenizer, (), own_settings([2, 3], None)) == (2, 3)
    assert stop_token_ids(tokenizer, (), own_settings(None, 4)) == (2, 4)
    assert stop_token_ids(tokenizer, (), own_settings([5], [4, 3])) == (2, 3, 4, 5)
    assert end_token_ids(None, own_settings(3, 50256)) == (3,), "an id beyond the vocabulary"
    assert end_token_ids(None, tiny_causal()) == ()


def test_a_special_token_as_stop_string_is_its_id() -> None:
    tokenizer = with_special(extra_special_tokens=["<|im_end|>"])
    assert stop_token_ids(tokenizer, ("<|im_end|>",)) == (2, 3)
    assert stop_token_ids(tokenizer, ("a<|im_end|>",)) == (2,), "of several tokens: by its text"


def test_a_stop_string_is_looked_for_in_what_a_token_adds_to_other_text() -> None:
    tokenizer = word_pieces()
    assert stop_token_ids(tokenizer, ("#",), own_settings(None, 2)) == (2, 5)
    assert stop_token_ids(tokenizer, ("ing",), own_settings(None, 2)) == (2, 4)


@pytest.mark.parametrize("stop", ["a<|im_end|>", "<|im_end|>b", "<|im_end|>"])
def test_text_is_cut_at_a_stop_string_that_holds_a_special_token(stop: str) -> None:
    tokenizer = with_special()
    text = "12a<|im_end|>b3"
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    mask = torch.ones_like(ids, dtype=torch.bool)
    assert decode_responses(tokenizer, ids, mask, [stop]) == [text[: text.find(stop)]]
    watch = StopStrings(tokenizer, (stop,), rows=1)
    found = [watch.completes(0, token) for token in ids[0].tolist()]
    end = text.find(stop) + len(stop)
    count = len(tokenizer(text[:end], add_special_tokens=False).input_ids)
    assert found.index(True) == count - 1


def test_a_rendered_chat_template_does_not_begin_twice() -> None:
    tokenizer = with_special()
    assert encode_prompts(tokenizer, ["<s>12", "12"])[0].tolist() == [[1, 7, 8]] * 2


def test_the_whole_prefix_of_the_tokenizer_is_put_before_a_prompt() -> None:
    tokenizer = with_special("[gMASK] <sop> $A", bos_token=None)
    assert encode_prompts(tokenizer, ["12"])[0].tolist() == [tokenizer("12").input_ids]
    assert encode_prompts(tokenizer, ["[gMASK]<sop>12"])[0].tolist() == [[4, 5, 7, 8]]
    assert encode_prompts(with_special("$A </s>"), ["12"])[0].tolist() == [[7, 8]]


def test_a_lone_surrogate_is_one_line() -> None:
    with pytest.raises(ModelError, match=r"^prompt '1.ud83d': holds a lone surrogate") as caught:
        encode_prompts(with_special(), ["1", "1\ud83d"])
    assert "\n" not in str(caught.value) and str(caught.value).isascii()


def test_padding_is_filled_by_what_exists() -> None:
    assert pad_token_id(with_special()) == 0
    assert pad_token_id(with_special(pad_token=None)) == 2
    assert pad_token_id(with_special(pad_token=None, eos_token=None)) == 0
    assert pad_token_id(None, tiny_llama(20, pad_token_id=9)) == 9
