"""The one door for prompts: every form read rightly, every mistake one line."""

import numpy as np
import pytest
import torch

from hmpo.config import PowerMeanConfig
from hmpo.errors import ConfigError, ModelError
from hmpo.models import character_tokenizer
from hmpo.trainer.prompts import encoded, knows_padding, with_tokens
from tests.support import tiny_causal, tiny_llama

TOKENIZER = character_tokenizer("0123>")
ROWS = [[5, 6, 7], [8, 9, 10, 11, 12]]
IDS = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def read(prompts, **changes):
    options = {"tokenizer": TOKENIZER, "pad_token": 0, "vocabulary": 13} | changes
    tokenizer, pad = options.pop("tokenizer"), options.pop("pad_token")
    return encoded(prompts, tokenizer, pad, **options)


RIGHT = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]])
FORMS = {
    "lists": ROWS,
    "tuples": tuple(map(tuple, ROWS)),
    "arrays": [np.array(row) for row in ROWS],
    "tensors": [torch.tensor(row) for row in ROWS],
    "ids and mask": (IDS, MASK.bool()),
    "a pair of tensors": tuple(torch.tensor(row) for row in ROWS),
    "arrays and mask": (IDS.numpy(), MASK.numpy()),
    "ids and integer mask": (IDS, MASK),
    "padding on the right": (RIGHT, MASK.flip(1)),
    "what a tokenizer returns": {"input_ids": IDS, "attention_mask": MASK},
    "its lists": {"input_ids": IDS.tolist(), "attention_mask": MASK.tolist()},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(form: str) -> None:
    given, ids, mask, *_ = read(FORMS[form])
    assert given == ROWS
    assert torch.equal(ids, IDS) and torch.equal(mask, MASK.bool())


def test_text_and_whole_tensors_are_read() -> None:
    given, ids, mask, *_ = read(["12>", "3>"])
    assert given == ["12>", "3>"] and ids.shape == mask.shape == (2, 4)
    assert torch.equal(read(IDS[:, 2:]).ids, IDS[:, 2:])
    assert torch.equal(read(IDS[:, 2:].numpy()).ids, IDS[:, 2:])


MISTAKES = [
    ("12>", "got one str"),
    (b"12>", "got one bytes"),
    ([], "got none"),
    (torch.tensor([5, 6, 7]), "shape (3,)"),
    (torch.zeros(0, 3, dtype=torch.long), "shape (0, 3)"),
    (torch.tensor([[5.0, 6.0]]), "torch.float32"),
    (np.array([[5.0, 6.0]]), "torch.float64"),
    (IDS, "with the pad token 0 at an edge and no mask"),
    (RIGHT, "with the pad token 0 at an edge and no mask"),
    ([[5, 6.0]], "prompts[0]: got 6.0"),
    ([[5, True]], "prompts[0]: got True"),
    ([[5], []], "prompts[1]: got no token"),
    ([[5], [99]], "prompts[1]: got token id 99, expected ids from 0 to 12"),
    ([[-1]], "prompts[0]: got token id -1"),
    (["12>", [5]], "prompts[0]: got a str"),
    ([[5], None], "prompts[1]: got a NoneType"),
    ([[{"role": "user", "content": "1"}], [5]], "prompts[0]: got messages beside others"),
    ([{"role": "user", "content": "1"}], "prompts[0]: got one chat message"),
    ({"ids": [[5]]}, "got a mapping with ['ids']"),
    (7, "got a int"),
    ((IDS, MASK[:, 1:]), "got a mask of shape (2, 4)"),
    ((IDS, torch.tensor([[1, 0, 1, 1, 1]] * 2)), "got a mask with holes"),
    ((IDS, MASK * 0), "prompts[0]: got no token"),
]


@pytest.mark.parametrize(("prompts", "message"), MISTAKES)
def test_a_mistake_is_one_line(prompts, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(prompts)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_text_needs_a_tokenizer_and_characters() -> None:
    with pytest.raises(ConfigError, match="got text, expected token ids"):
        read(["12>"], tokenizer=None)
    with pytest.raises(ModelError, match="lone surrogate"):
        read(["1\ud83d>"])


def test_a_tensor_may_hold_token_0_where_no_one_says_that_it_is_padding() -> None:
    assert read(IDS, pads=False).mask.all()
    assert knows_padding(PowerMeanConfig(), tiny_llama(), None)
    assert knows_padding(PowerMeanConfig(), tiny_llama(), TOKENIZER)
    assert not knows_padding(PowerMeanConfig(), tiny_causal(), None)
    assert not knows_padding(PowerMeanConfig(), tiny_llama(pad_token_id=1), None), "also the start"


def test_token_ids_come_from_the_tokenizer_unless_they_are_given() -> None:
    model = tiny_llama(eos_token_id=7, pad_token_id=9)
    found = with_tokens(PowerMeanConfig(), model, TOKENIZER, (">",))
    assert found.stop_tokens == (2, 7, 8) and found.pad_token == 0
    assert with_tokens(PowerMeanConfig(eos_token=5, pad_token=4), model, TOKENIZER, ()) == (
        PowerMeanConfig(eos_token=5, pad_token=4)
    )
    alone = with_tokens(PowerMeanConfig(), model, None, ())
    assert (alone.stop_tokens, alone.pad_token) == ((7,), 9)
    bare = with_tokens(PowerMeanConfig(), tiny_causal(), None, ())
    assert (bare.stop_tokens, bare.pad_token) == ((2,), 0), "nothing names one"
