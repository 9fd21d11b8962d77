"""Loading and saving: the bundled policy, user folders, LoRA, and every error line."""

import hashlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch import nn

import hmpo.models.saving as saving
from hmpo.config import PolicyConfig, TaskConfig
from hmpo.errors import MissingDependencyError, ModelError, StorageError
from hmpo.models import (
    character_tokenizer,
    encode_prompts,
    load_policy,
    resolve_policy_path,
    save_policy,
    tiny_llama,
)
from hmpo.models.paths import TINY_SORT
from hmpo.tasks import ALPHABET, make_task


@pytest.fixture
def small(tmp_path):
    """A small random policy in a folder of its own."""
    tokenizer = character_tokenizer(ALPHABET)
    model = tiny_llama(len(tokenizer), seed=3, hidden_size=16, layers=1, heads=2)
    return save_policy(model, tokenizer, tmp_path / "small")


def error_line(path) -> str:
    with pytest.raises(ModelError) as caught:
        load_policy(PolicyConfig(path=str(path)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_asking_where_a_policy_is_imports_no_torch():
    code = "import sys, hmpo.models as m; m.resolve_policy_path('tiny-sort'); m.fetch_smollm2; "
    code += "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_bundled_files_are_small_and_those_of_the_card():
    files = {p.name: p for p in TINY_SORT.iterdir()}
    card = json.loads(files.pop("policy.json").read_text())
    assert sum(p.stat().st_size for p in files.values()) <= 4_000_000
    sums = {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in files.items()}
    assert sums == card["sha256"]
    assert 0.35 <= card["sampled"]["rate"] <= 0.50
    assert card["greedy"]["rate"] >= 0.55 and card["prompts"] >= 512
    settings = json.loads(files["tokenizer_config.json"].read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_bundled_policy_is_ready_to_train_and_sorts():
    policy = load_policy(PolicyConfig())
    assert policy.source == "tiny-sort" and policy.model.training
    assert all(p.dtype == torch.float32 and p.requires_grad for p in policy.model.parameters())
    assert policy.model.config._attn_implementation == "sdpa"
    task = make_task(TaskConfig(name="sort", level=10))
    examples = [task.heldout(index) for index in range(64)]
    token_ids, _ = encode_prompts(policy.tokenizer, [e.prompt for e in examples])
    for _ in range(11):
        step = policy.model(token_ids).logits[:, -1].argmax(-1, keepdim=True)
        token_ids = torch.cat([token_ids, step], dim=1)
    texts = policy.tokenizer.batch_decode(token_ids[:, -11:])
    right = sum(t == e.columns["answer"] + "\n" for t, e in zip(texts, examples))
    assert 0.4 <= right / 64 <= 0.9


def test_saved_policy_is_bit_identical_and_nothing_is_left_beside_it(small, tmp_path):
    policy = load_policy(PolicyConfig(path=str(small)))
    again = load_policy(
        PolicyConfig(path=str(save_policy(policy.model, policy.tokenizer, tmp_path / "a" / "b")))
    )
    first, second = policy.model.state_dict(), again.model.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert again.tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
    modes = {p.stat().st_mode & 0o777 for p in small.iterdir()}
    assert modes == {small.stat().st_mode & 0o666}


def test_saving_replaces_a_policy_whole(small):
    policy = load_policy(PolicyConfig(path=str(small)))
    (small / "stale.txt").write_text("x")
    with torch.no_grad():
        policy.model.model.norm.weight.fill_(2.0)
    save_policy(policy.model, policy.tokenizer, small)
    assert not (small / "stale.txt").exists()
    assert load_file(small / "model.safetensors")["model.norm.weight"][0] == 2.0
    assert [p.name for p in small.parent.iterdir()] == ["small"]


def test_a_save_that_fails_leaves_the_old_policy(small, monkeypatch):
    before = {p.name: p.read_bytes() for p in small.iterdir()}
    policy = load_policy(PolicyConfig(path=str(small)))

    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "_flush", full)
    with pytest.raises(StorageError, match=r"cannot be written \(.*No space left"):
        save_policy(policy.model, policy.tokenizer, small)
    assert {p.name: p.read_bytes() for p in small.iterdir()} == before
    assert [p.name for p in small.parent.iterdir()] == ["small"]


def test_saving_spares_what_is_not_a_policy(small, tmp_path):
    policy = load_policy(PolicyConfig(path=str(small)))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "draft.txt").write_text("x")
    for folder in (tmp_path / "thesis", tmp_path / "thesis" / "draft.txt"):
        with pytest.raises(ModelError, match="exists and is not a policy's folder"):
            save_policy(policy.model, policy.tokenizer, folder)
    (tmp_path / "empty").mkdir()
    assert (
        save_policy(policy.model, policy.tokenizer, tmp_path / "empty") / "config.json"
    ).exists()
    with pytest.raises(ModelError, match="Linear: has no save_pretrained"):
        save_policy(nn.Linear(1, 1), policy.tokenizer, tmp_path / "linear")


def test_names_and_folders_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HMPO_CACHE", str(tmp_path))
    assert resolve_policy_path("tiny-sort") == TINY_SORT
    assert error_line("smollm2") == (
        f"policy 'smollm2': not in {tmp_path}; run `hmpo fetch-model smollm2`"
    )
    (tmp_path / "smollm2-135m-instruct").mkdir()
    (tmp_path / "smollm2-135m-instruct" / "config.json").write_text("{}")
    assert resolve_policy_path("smollm2") == tmp_path / "smollm2-135m-instruct"
    assert error_line(tmp_path / "no") == (
        f"policy '{tmp_path / 'no'}': no such folder; "
        "expected a local folder, a hub's organisation/name, 'tiny-sort' or 'smollm2'"
    )


def test_folders_that_are_no_policy(small):
    path = str(small)
    weights = small / "model.safetensors"
    assert error_line(weights).endswith("is a file, expected a folder with config.json")
    weights.rename(small / "pytorch_model.bin")
    assert error_line(path) == (
        f"policy '{path}': has no model.safetensors "
        "(found pytorch_model.bin: convert it, pickled weights are not loaded)"
    )
    (small / "pytorch_model.bin").unlink()
    assert error_line(path) == f"policy '{path}': has no model.safetensors"
    (small / "config.json").write_text("{}")
    assert error_line(path) == f"policy '{path}': config.json names no model_type"
    (small / "config.json").write_text("{")
    assert "config.json is not JSON" in error_line(path)
    (small / "config.json").unlink()
    assert error_line(path) == (
        f"policy '{path}': has no config.json; expected a Hugging Face folder"
    )


def test_weights_that_do_not_belong_to_the_configuration(small):
    weights = load_file(small / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({k: v for k, v in weights.items() if k != name}, small / "model.safetensors")
    assert f"1 weights with missing keys, such as {name}" in error_line(small)
    wrong = {**weights, name: torch.zeros(3, 3)}
    save_file(wrong, small / "model.safetensors")
    assert f"1 weights with mismatched keys, such as {name};" in error_line(small)
    (small / "model.safetensors").write_bytes(b"broken")
    assert "cannot be loaded" in error_line(small)


def test_weights_that_are_not_used_are_a_warning(small, caplog):
    weights = load_file(small / "model.safetensors")
    save_file({**weights, "extra.weight": torch.zeros(1)}, small / "model.safetensors")
    load_policy(PolicyConfig(path=str(small)))
    assert "unused weights ['extra.weight']" in caplog.text


def test_remote_code_and_unknown_architectures_are_refused(small):
    config = json.loads((small / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    (small / "config.json").write_text(json.dumps(config))
    (small / "evil.py").write_text("raise SystemExit('ran')")
    line = error_line(small)
    assert "model_type 'mine' is not one of transformers " in line
    assert line.endswith("code that comes with a model is never run")


def test_tokenizers_that_do_not_fit(small, tmp_path):
    large = character_tokenizer(ALPHABET + "ABC")
    large.save_pretrained(small)
    assert "tokenizer with 59 tokens, embedding of 56 rows" in error_line(small)
    blind = character_tokenizer(ALPHABET)
    blind.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("0", behavior="removed")
    blind.save_pretrained(small)
    assert "turns text into no tokens" in error_line(small)
    (small / "tokenizer.json").unlink()
    assert "no usable tokenizer" in error_line(small)


def test_devices_that_are_not_there():
    with pytest.raises(ModelError, match="expected cpu, cuda or cuda:N"):
        load_policy(PolicyConfig(), device="gpu")
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(ModelError, match=f"got '{missing}', but there are"):
        load_policy(PolicyConfig(), device=missing)


def test_lora_trains_only_the_adapters_and_comes_back(small, tmp_path):
    pytest.importorskip("peft")
    policy = load_policy(PolicyConfig(path=str(small), lora_rank=2, lora_targets=("q_proj",)))
    trained = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 and all("q_proj.lora_" in name for name in trained)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.fill_(0.1)
    folder = save_policy(policy.model, policy.tokenizer, tmp_path / "adapter")
    assert not (folder / "model.safetensors").exists() and not (folder / "README.md").exists()
    again = load_policy(PolicyConfig(path=str(folder)))
    token_ids, _ = encode_prompts(again.tokenizer, ["31>"])
    assert torch.equal(policy.model(token_ids).logits, again.model(token_ids).logits)
    assert [n for n, p in again.model.named_parameters() if p.requires_grad] == trained
    save_policy(again.model, again.tokenizer, folder)


def test_a_saved_adapter_names_its_base_for_peft_from_any_folder(small, tmp_path, monkeypatch):
    monkeypatch.chdir(small.parent)
    for path, base in ((small.name, small), ("tiny-sort", TINY_SORT)):
        policy = load_policy(PolicyConfig(path=path, lora_rank=2, lora_targets=("q_proj",)))
        folder = save_policy(policy.model, policy.tokenizer, tmp_path / f"adapter-{path}")
        named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert named == str(base.resolve())
        monkeypatch.chdir("/")
        load_policy(PolicyConfig(path=str(folder)))
        monkeypatch.chdir(small.parent)


def test_lora_errors(small, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    with pytest.raises(ModelError, match=r"lora_targets: Target modules .* not found"):
        load_policy(PolicyConfig(path=str(small), lora_rank=2, lora_targets=("none",)))
    policy = load_policy(PolicyConfig(path=str(small), lora_rank=2))
    folder = save_policy(policy.model, policy.tokenizer, tmp_path / "adapter")
    with pytest.raises(ModelError, match="adapters of its own; set lora_rank to 0"):
        load_policy(PolicyConfig(path=str(folder), lora_rank=2))
    shutil.rmtree(small)
    assert "no such folder" in error_line(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "names no base_model_name_or_path" in error_line(folder)
    (folder / "adapter_model.safetensors").unlink()
    assert error_line(folder) == f"policy '{folder}': has no adapter_model.safetensors"
    monkeypatch.setitem(sys.modules, peft.__name__, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'hmpo\[lora\]'"):
        load_policy(PolicyConfig(lora_rank=2))
