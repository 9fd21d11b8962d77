"""What a policy's folder says is kept: its attention as far as it has one, its tokenizer whole."""

import json
import logging

import pytest

from hmpo.config import PolicyConfig
from hmpo.errors import ModelError
from hmpo.models import character_tokenizer, load_policy, save_policy, stop_token_ids
from hmpo.tasks import ALPHABET
from tests.models.families import family

TOKENIZER = character_tokenizer(ALPHABET)


def folder(tmp_path, kind: str):
    model = family(kind, vocab_size=len(TOKENIZER))
    return str(save_policy(model, TOKENIZER, tmp_path / kind))


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss", "gptj", "mpt", "llama", "mamba"])
def test_attention_is_the_best_that_the_model_has(kind: str, tmp_path, caplog) -> None:
    path = folder(tmp_path, kind)
    with caplog.at_level(logging.INFO, logger="hmpo"):
        loaded = load_policy(PolicyConfig(path=path))
    chosen = loaded.model.config._attn_implementation
    assert ("as it has no sdpa" in caplog.text) == (chosen == "eager")
    assert chosen == ("sdpa" if type(loaded.model)._supports_sdpa else "eager")


def test_attention_is_a_setting(tmp_path) -> None:
    path = folder(tmp_path, "llama")
    for name in ("eager", "sdpa"):
        loaded = load_policy(PolicyConfig(path=path, attention=name))
        assert loaded.model.config._attn_implementation == name
    for kind, name in (("llama", "nonsense"), ("gpt_oss", "sdpa")):
        with pytest.raises(ModelError, match=r"cannot be loaded \(.+\)$") as caught:
            load_policy(PolicyConfig(path=folder(tmp_path, kind), attention=name))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", ["left", "right", None])
def test_a_saved_tokenizer_has_the_settings_of_its_source(side, tmp_path) -> None:
    source = tmp_path / "llama"
    settings = source / "tokenizer_config.json"
    folder(tmp_path, "llama")
    found = json.loads(settings.read_text())
    found.pop("padding_side", None)
    settings.write_text(json.dumps(found if side is None else found | {"padding_side": side}))
    loaded = load_policy(PolicyConfig(path=str(source)))
    assert loaded.tokenizer.padding_side == "left"
    save_policy(loaded.model, loaded.tokenizer, tmp_path / "saved")
    assert loaded.tokenizer.padding_side == "left"
    again = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert again == json.loads(settings.read_text())


def test_end_tokens_of_the_model_come_with_the_tokenizer_that_was_loaded_beside_it(tmp_path):
    source = tmp_path / "llama"
    folder(tmp_path, "llama")
    settings = source / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": [2, 9]}))
    loaded = load_policy(PolicyConfig(path=str(source)))
    assert stop_token_ids(loaded.tokenizer, ()) == (2, 9)
    assert stop_token_ids(TOKENIZER, ()) == (2,)
