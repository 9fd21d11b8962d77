"""The precision of a policy: as stored, as trained, and saved as it came."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from hmpo.config import PolicyConfig
from hmpo.errors import ModelError
from hmpo.models import character_tokenizer, load_policy, save_policy, tiny_llama
from hmpo.tasks import ALPHABET
from tests.models.families import family

NAMES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def folder(place, dtype: torch.dtype, *, norm: torch.dtype | None = None, tied: bool = False):
    """A policy that is stored in a precision, its last norm perhaps in another."""
    tokenizer = character_tokenizer(ALPHABET)
    if tied:
        model = family("llama", vocab_size=len(tokenizer), tie_word_embeddings=True)
    else:
        model = tiny_llama(len(tokenizer), seed=3, hidden_size=16, layers=1, heads=2)
    path = save_policy(model.to(dtype), tokenizer, place)
    if norm is not None:
        weights = load_file(path / "model.safetensors")
        weights["model.norm.weight"] = weights["model.norm.weight"].to(norm)
        save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize("stored", NAMES)
@pytest.mark.parametrize("setting", ["auto", "float32", "bfloat16"])
def test_weights_are_trained_as_the_setting_says_and_it_is_told(tmp_path, caplog, stored, setting):
    path = folder(tmp_path / "a", stored)
    with caplog.at_level(logging.WARNING, logger="hmpo"):
        loaded = load_policy(PolicyConfig(path=str(path), dtype=setting))
    as_stored = "bfloat16" if stored == torch.bfloat16 else "float32"
    wanted = as_stored if setting == "auto" else setting
    assert {NAMES[p.dtype] for p in loaded.model.parameters()} == {wanted}
    told = f"stored as {NAMES[stored]}, trained as {wanted}" in caplog.text
    assert told == (NAMES[stored] != wanted)


@pytest.mark.parametrize("stored", NAMES)
@pytest.mark.parametrize("setting", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_policy_has_the_precision_of_its_source(tmp_path, stored, setting, tied):
    path = folder(tmp_path / "a", stored, tied=tied)
    loaded = load_policy(PolicyConfig(path=str(path), dtype=setting))
    saved = save_policy(loaded.model, loaded.tokenizer, tmp_path / "b")
    before, after = (load_file(p / "model.safetensors") for p in (path, saved))
    assert before.keys() == after.keys()
    exact = setting == "float32" or stored == torch.bfloat16
    for name, value in after.items():
        assert value.dtype == stored
        assert torch.equal(value, before[name] if exact else before[name].bfloat16().to(stored))
    assert json.loads((saved / "config.json").read_text())["dtype"] == NAMES[stored]


def test_single_weights_of_another_precision_keep_it(tmp_path):
    path = folder(tmp_path / "a", torch.bfloat16, norm=torch.float32)
    loaded = load_policy(PolicyConfig(path=str(path)))
    with torch.no_grad():
        loaded.model.model.norm.weight.fill_(1 + 2**-12)  # bfloat16 would round it away
    saved = load_file(
        save_policy(loaded.model, loaded.tokenizer, tmp_path / "b") / "model.safetensors"
    )
    assert saved["model.norm.weight"].dtype == torch.float32
    assert (saved["model.norm.weight"] == 1 + 2**-12).all()
    assert saved["model.embed_tokens.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("setting", ["float32", "bfloat16", "auto"])
def test_a_tied_head_is_stored_once_whatever_precision_its_embedding_has(tmp_path, setting):
    """The files of a tied model have the embedding alone; here in another precision than most."""
    path = folder(tmp_path / "a", torch.bfloat16, tied=True)
    weights = load_file(path / "model.safetensors")
    name = "model.embed_tokens.weight"
    assert "lm_head.weight" not in weights
    weights[name] = weights[name].float()
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    loaded = load_policy(PolicyConfig(path=str(path), dtype=setting))
    saved = save_policy(loaded.model, loaded.tokenizer, tmp_path / "b")
    found = load_file(saved / "model.safetensors")
    assert {n: v.dtype for n, v in found.items()} == {n: v.dtype for n, v in weights.items()}


def test_recomputing_layers_is_refused_where_there_are_none_in_one_line(tmp_path):
    tokenizer = character_tokenizer(ALPHABET)
    path = save_policy(family("openai-gpt", vocab_size=len(tokenizer)), tokenizer, tmp_path / "gpt")
    with pytest.raises(ModelError, match=r"^policy.gradient_checkpointing: got True") as caught:
        load_policy(PolicyConfig(path=str(path), gradient_checkpointing=True))
    assert "\n" not in str(caught.value)
