"""What may be replaced by a policy that is saved: an older policy, and nothing else."""

import json

import pytest

from hmpo.config import PolicyConfig
from hmpo.errors import ModelError
from hmpo.models import load_policy, save_policy

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
