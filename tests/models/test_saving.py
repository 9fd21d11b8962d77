"""What may be replaced by a policy that is saved: an older policy, and nothing else."""

import json
from pathlib import Path

import pytest
import torch

from hmpo.config import PolicyConfig
from hmpo.errors import ModelError
from hmpo.models import load_policy, save_policy
from hmpo.models.saving import replace_folder

MODEL = {"config.json": json.dumps({"model_type": "llama"}), "model.safetensors": "x"}


def made(place, files: dict[str, str]):
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    return place


def held(place) -> dict[str, bytes]:
    return {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"config.json": "{}"}, "its config.json names no model_type"),
        ({"config.json": "[]", "src/main.py": ""}, "it holds src"),
        ({"config.json": "["}, "it has no config.json of a model"),
        ({"config.json": MODEL["config.json"], "thesis.tex": ""}, "it has no model.safetensors"),
        ({"model.safetensors": "x"}, "it has no config.json of a model"),
        (MODEL | {".git/HEAD": ""}, "it holds .git"),
        (MODEL | {"checkpoints/step-00000001/weights": ""}, "it holds checkpoints"),
        ({"adapter_config.json": "{}", "telemetry.jsonl": ""}, "it holds telemetry.jsonl"),
        (MODEL | {"trainer_state.json": "{}"}, "it holds trainer_state.json"),
    ],
)
def test_a_folder_that_is_no_saved_policy_is_left_as_it_is(files, why, tmp_path) -> None:
    place = made(tmp_path / "mine", files)
    before = held(place)
    policy = load_policy(PolicyConfig(path="tiny-sort"))
    with pytest.raises(ModelError) as refusal:
        save_policy(policy.model, policy.tokenizer, place)
    assert str(refusal.value) == (
        f"{place}: exists and is not a policy's folder ({why}); choose another one"
    )
    assert held(place) == before


def test_an_older_policy_of_any_form_is_replaced(tmp_path) -> None:
    policy = load_policy(PolicyConfig(path="tiny-sort"))
    sharded = {"config.json": MODEL["config.json"], "model.safetensors.index.json": "{}"}
    kinds = {
        "whole": MODEL,
        "sharded": sharded,
        "adapters": {"adapter_config.json": "{}"},
        "templates": MODEL | {"additional_chat_templates/tools.jinja": ""},
    }
    for name, files in kinds.items():
        place = save_policy(policy.model, policy.tokenizer, made(tmp_path / name, files))
        assert load_policy(PolicyConfig(path=str(place)))
        assert not set(held(place)) & (set(files) - set(MODEL)), name


@pytest.mark.parametrize("call", [1, 2])
def test_an_interrupt_between_the_renames_leaves_the_older_policy(call, tmp_path, monkeypatch):
    place, calls, rename = made(tmp_path / "mine", MODEL), [], Path.replace

    def interrupted(path, target):
        found = rename(path, target)
        calls.append(path)
        if len(calls) == call:
            raise KeyboardInterrupt
        return found

    before = held(place)
    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(place, lambda aside: made(aside, MODEL | {"new": "y"}) and None)
    monkeypatch.undo()
    expected = before if call == 1 else before | {"new": b"y"}
    assert held(place) == expected and [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("active", ["default", "second"])
def test_of_several_adapters_the_active_one_is_saved_and_can_be_replaced(active, tmp_path):
    peft = pytest.importorskip("peft")
    policy = load_policy(PolicyConfig(path="tiny-sort", lora_rank=2))
    model = policy.model
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["q_proj"]))
    model.set_adapter(active)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.5)
    for _ in range(2):
        place = save_policy(model, policy.tokenizer, tmp_path / "saved")
    assert not [p for p in place.iterdir() if p.is_dir()]
    loaded = load_policy(PolicyConfig(path=str(place))).model
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)


def test_two_active_adapters_are_refused_in_one_line(tmp_path):
    peft = pytest.importorskip("peft")
    policy = load_policy(PolicyConfig(path="tiny-sort", lora_rank=2))
    policy.model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["q_proj"]))
    policy.model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ModelError, match=r"active adapters default, second: expected one"):
        save_policy(policy.model, policy.tokenizer, tmp_path / "saved")
    assert not list(tmp_path.iterdir())
