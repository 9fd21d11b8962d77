"""A saved policy is its source but for the values of its weights."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from hmpo.config import PolicyConfig
from hmpo.errors import ModelError
from hmpo.models import load_policy, save_policy
from hmpo.models.paths import base_of
from hmpo.models.source import lasting_name, whole_policy
from tests.models.families import family

LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
GEMMA = ("<pad>", "<eos>", "<bos>", "<unk>", "<end_of_turn>")
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def tokenizer_files(folder, special, settings, *, start="", sentencepiece=False) -> None:
    """tokenizer.json and tokenizer_config.json as such models have them, one token a byte."""
    backend = Tokenizer(models.BPE(byte_fallback=sentencepiece, fuse_unk=sentencepiece))
    if sentencepiece:
        backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        vocabulary = [*special, *(f"<0x{i:02X}>" for i in range(256))]
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special]
    data = json.loads(backend.to_str())
    data["model"]["vocab"] = {token: index for index, token in enumerate(vocabulary)}
    data["added_tokens"] = [
        {"id": vocabulary.index(token), "content": token, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": True}
        for token in special
    ]  # fmt: skip
    backend = Tokenizer.from_str(json.dumps(data))
    if start:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, vocabulary.index(start))]
        )
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def written(folder, kind: str, dtype=torch.bfloat16, generation=None, **changes) -> None:
    """Weights and configuration as an older transformers wrote them."""
    model = family(kind, vocab_size=270, **changes).to(dtype)
    model.generation_config = GenerationConfig(**generation or {})
    model.save_pretrained(folder)
    if generation is None:
        (folder / "generation_config.json").unlink()
    place = folder / "config.json"
    settings = json.loads(place.read_text())
    rope = settings.pop("rope_parameters", None)
    if rope and "rope_theta" in rope:
        settings["rope_theta"] = 500000.0
    settings["torch_dtype"] = settings.pop("dtype")
    settings["transformers_version"] = "4.44.0"
    place.write_text(json.dumps(settings, indent=4))


def llama(folder) -> None:
    """A start token, two end tokens, the template among the tokenizer's settings."""
    ends = {"eos_token_id": [257, 258], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    written(folder, "llama", generation={"bos_token_id": 256} | ends, bos_token_id=256)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": LLAMA[0], "eos_token": LLAMA[2],
        "chat_template": TEMPLATE, "model_max_length": 131072, "padding_side": "right",
        "clean_up_tokenization_spaces": True, "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip
    tokenizer_files(folder, LLAMA, settings, start=LLAMA[0])
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": LLAMA[2]}))
    (folder / "LICENSE").write_text("a license\n")


def qwen(folder) -> None:
    """A tied head, no start token, a template in a file of its own and another beside it."""
    written(folder, "qwen3", generation={"eos_token_id": [256, 258], "do_sample": True},
            tie_word_embeddings=True, head_dim=8)  # fmt: skip
    settings = {
        "tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": QWEN[2],
        "pad_token": QWEN[0], "add_prefix_space": False, "errors": "replace", "unk_token": None,
        "additional_special_tokens": list(QWEN[1:]), "split_special_tokens": False,
    }  # fmt: skip
    tokenizer_files(folder, QWEN, settings)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("tools")


def gemma(folder) -> None:
    """Bytes for lack of words, a start token, no generation_config.json, one weight in float32."""
    written(folder, "gemma2", head_dim=8, pad_token_id=0, bos_token_id=2, eos_token_id=1)
    settings = {
        "tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>",
        "pad_token": "<pad>", "unk_token": "<unk>", "add_bos_token": True,
        "sp_model_kwargs": {}, "spaces_between_special_tokens": False, "chat_template": TEMPLATE,
    }  # fmt: skip
    tokenizer_files(folder, GEMMA, settings, start="<bos>", sentencepiece=True)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(weights) if name.endswith("norm.weight"))
    from safetensors.torch import save_file

    weights[name] = weights[name].float()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


KINDS = {"llama": llama, "qwen": qwen, "gemma": gemma}


@pytest.fixture(params=KINDS)
def source(request, tmp_path):
    folder = tmp_path / request.param
    folder.mkdir()
    KINDS[request.param](folder)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "README.md").write_text("of the source")
    return folder


def files(folder) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def dtypes(folder) -> dict[str, str]:
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        return {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118


def trained(source):
    loaded = load_policy(PolicyConfig(path=str(source)))
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(0.25)
    return loaded


def test_every_field_of_every_file_beside_the_weights_is_the_sources(source, tmp_path) -> None:
    loaded = trained(source)
    saved = save_policy(loaded.model, loaded.tokenizer, tmp_path / "saved", source=source)
    expected, found = files(source), files(saved)
    for other in ("trainer_state.json", "README.md"):
        expected.pop(other)
    assert found.pop("model.safetensors") != expected.pop("model.safetensors")
    assert found == expected


def test_weights_have_the_names_and_the_precision_of_the_sources_and_new_values(
    source, tmp_path
) -> None:
    loaded = trained(source)
    saved = save_policy(loaded.model, loaded.tokenizer, tmp_path / "saved", source=source)
    assert dtypes(saved) == dtypes(source)
    before = load_file(source / "model.safetensors")
    for name, value in load_file(saved / "model.safetensors").items():
        wanted = (before[name].float() + 0.25).to(value.dtype)
        assert torch.equal(value, wanted), name


def test_others_load_it_as_they_load_its_source(source, tmp_path) -> None:
    loaded = trained(source)
    saved = save_policy(loaded.model, loaded.tokenizer, tmp_path / "saved", source=source)
    first, again = (AutoModelForCausalLM.from_pretrained(f, dtype="auto") for f in (source, saved))
    assert again.config.to_diff_dict() | {"_name_or_path": ""} == first.config.to_diff_dict() | {
        "_name_or_path": ""
    }
    assert again.dtype == first.dtype == torch.bfloat16
    assert again.generation_config.to_dict() == first.generation_config.to_dict()
    one, other = (AutoTokenizer.from_pretrained(folder) for folder in (source, saved))
    assert type(one) is type(other)
    messages = [{"role": "user", "content": "sort 3 1 2"}]
    ids = one("sort 3 1 2").input_ids
    assert len(ids) >= 10 and other("sort 3 1 2").input_ids == ids
    assert one.special_tokens_map == other.special_tokens_map
    assert one.apply_chat_template(messages, tokenize=False) == other.apply_chat_template(
        messages, tokenize=False
    )


def test_weights_that_the_narrower_precision_cannot_hold_stay_as_they_are(tmp_path, caplog) -> None:
    source = tmp_path / "half"
    source.mkdir()
    written(source, "llama", dtype=torch.float16)
    tokenizer_files(source, LLAMA, {"eos_token": LLAMA[1]})
    loaded = load_policy(PolicyConfig(path=str(source)))
    with torch.no_grad():
        loaded.model.lm_head.weight[3, 5] = 1e6
    saved = save_policy(loaded.model, loaded.tokenizer, tmp_path / "saved", source=source)
    found = dtypes(saved)
    assert found.pop("lm_head.weight") == "F32" and set(found.values()) == {"F16"}
    assert "lm_head.weight: kept as torch.float32" in caplog.text


@pytest.mark.parametrize("change", [{"architectures": ["Other"]}, {"quantization_config": {}}])
def test_a_configuration_that_does_not_describe_the_model_is_not_copied(change, tmp_path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    qwen(source)
    loaded = trained(source)
    place = source / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    saved = save_policy(loaded.model, loaded.tokenizer, tmp_path / "saved", source=source)
    settings = json.loads((saved / "config.json").read_text())
    assert settings["architectures"] == ["Qwen3ForCausalLM"]
    assert "quantization_config" not in settings and settings["dtype"] == "bfloat16"
    assert set(dtypes(saved).values()) == {"BF16"}
    assert files(saved)["tokenizer_config.json"] == files(source)["tokenizer_config.json"]


def test_a_source_that_is_gone_leaves_a_policy_that_loads_and_is_told(tmp_path, caplog) -> None:
    source = tmp_path / "source"
    source.mkdir()
    llama(source)
    loaded = trained(source)
    with caplog.at_level(logging.WARNING, logger="hmpo"):
        saved = save_policy(
            loaded.model, loaded.tokenizer, tmp_path / "saved", source=tmp_path / "no"
        )
    assert "nothing is copied from the policy's source" in caplog.text
    assert load_policy(PolicyConfig(path=str(saved))).tokenizer.eos_token == LLAMA[2]


def test_adapters_get_the_tokenizer_of_their_base_and_no_configuration_of_a_model(tmp_path) -> None:
    pytest.importorskip("peft")
    source = tmp_path / "source"
    source.mkdir()
    llama(source)
    loaded = load_policy(PolicyConfig(path=str(source), lora_rank=2))
    saved = save_policy(loaded.model, loaded.tokenizer, tmp_path / "saved", source=source)
    expected, found = files(source), files(saved)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        found.pop(name)
    beside = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "LICENSE")
    assert found == {name: expected[name] for name in beside}
    assert base_of(saved) == (str(source.resolve()), "")
    assert whole_policy(PolicyConfig(path=str(saved))) == source


def test_a_base_is_named_so_that_it_is_found_from_anywhere(tmp_path, monkeypatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    llama(source)
    monkeypatch.chdir(tmp_path)
    assert lasting_name("source") == str(source.resolve())
    assert lasting_name("someone/some-model") == "someone/some-model"
    assert lasting_name("tiny-sort").startswith("/") and lasting_name("tiny-sort") != "tiny-sort"
    for text, why in (("{}", "names no base_model_name_or_path"), ("[]", "is no JSON object")):
        (source / "adapter_config.json").write_text(text)
        with pytest.raises(ModelError, match=why):
            base_of(source)
