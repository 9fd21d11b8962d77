"""Settings that came later leave older runs what they were: their hash, and what they chose."""

import json
from pathlib import Path
from typing import Any

import pytest

from hmpo.config import to_dict
from hmpo.config.identity import LATER, RESOLVED, config_hash
from hmpo.config.reading import load_run_config, run_config
from hmpo.errors import ConfigError
from hmpo.run.build import trainer_config

BEFORE = "b647b6f4712d72af35fd0f56dce7c090ebfbd5ffd6d57865cd1e408d5561fab6"
"""Hash of the default configuration, from before any setting of `LATER` was there."""
OTHER = {
    "policy.attention": "eager",
    "policy.start": "runs/a@3",
    "policy.revision": "v1",
    "policy.base_revision": "v1",
    "policy.dtype": "bfloat16",
    "policy.quantize": "4bit",
    "policy.lora_rslora": True,
    "policy.gradient_checkpointing": True,
    "optimizer.muon_dtype": "float32",
    "optimizer.momentum": 0.5,
    "objective.token_clamp": 0.1,
    "objective.exponent.per": "rollout",
    "objective.segments": "turn",
    "objective.weight.kind": "gamma",
    "objective.weight.level": "prefix",
    "objective.weight.bound": "mask",
    "objective.weight.cap": 2.0,
    "objective.weight.power_positive": 1.0,
    "objective.weight.power_negative": 1.0,
    "objective.weight.decay_positive": 1.0,
    "objective.weight.decay_negative": 1.0,
    "objective.proximal_coef": 0.5,
    "objective.proximal": "pearson",
    "objective.entropy_coef": 0.01,
    "objective.entropy_target": 0.3,
    "objective.entropy_coef_delta": 0.01,
    "objective.entropy_coef_max": 0.5,
    "task.environment": "a.py:A",
    "task.max_turns": 3,
    "eval.success": 0.5,
    "advantages.estimator": "rloo",
    "advantages.over": "tokens",
    "advantages.kl_in_reward": 0.1,
    "advantages.kl_estimator": "k3",
    "advantages.kl_over": "mean",
    "rollout.lag": 2,
    "rollout.engine": "vllm",
    "rewards.options": {"exact.casefold": True},
    "trainer.eos_token": [7],
    "trainer.pad_token": 3,
    "task.stop": [],
    "task.chat": True,
    "task.system": "Be brief.",
    "task.template_options": {"enable_thinking": False},
    "batch.filter_groups": True,
    "batch.signal": "exact",
    "batch.max_num_gen_batches": 3,
    "batch.max_tokens": 5000,
    "batch.max_responses": 5000,
    "batch.prompt_records": True,
    "batch.rest": 3,
    "batch.describe": True,
}
"""For each setting that came or changed later, a value that is somebody's choice."""
NEEDED = {
    "advantages.kl_in_reward": ["reference=start"],
    "objective.token_clamp": ["objective.clip_level=sequence"],
    "rewards.options": ["rewards.functions=['exact']"],
}
"""What else is set for it."""


def test_the_default_configuration_has_the_hash_that_it_always_had() -> None:
    assert config_hash(run_config({})) == BEFORE


@pytest.mark.parametrize("path", [*LATER, *RESOLVED])
def test_a_choice_in_a_later_setting_changes_the_hash(path: str) -> None:
    hashes, other = [], OTHER[path]
    tables = other.items() if isinstance(other, dict) else ()
    given = [f"{path}.{name}={json.dumps(value)}" for name, value in tables]
    for value in ([], given or [f"{path}={json.dumps(other)}"]):
        hashes.append(config_hash(run_config({}, [*NEEDED.get(path, []), *value])))
    assert hashes[0] != hashes[1] and (path in NEEDED or hashes[0] == BEFORE)


def test_the_estimator_of_a_kl_that_has_no_weight_decides_nothing() -> None:
    stored = {"objective": {"kl_coef": 0.0, "kl_estimator": "k3"}}
    assert config_hash(run_config(stored)) == BEFORE
    weighed = [
        run_config({"reference": "start", "objective": {"kl_coef": 0.1, "kl_estimator": name}})
        for name in ("k3", "k3+")
    ]
    assert len({config_hash(config) for config in weighed}) == 2


def test_an_older_run_of_holder_keeps_its_bounds_and_its_schedule(tmp_path: Path) -> None:
    data = to_dict(run_config({"objective": {"member": "holder"}}))["objective"]
    del data["token_clamp"], data["segments"], data["exponent"]["per"]
    del data["weight"], data["proximal"], data["proximal_coef"]
    path = old_config(tmp_path, objective=data | {"clip_low": 3e-4, "clip_high": 4e-4})
    objective = load_run_config(path).objective
    assert (objective.name, objective.exponent.per) == ("holder", "update")
    assert (objective.clip_low, objective.clip_high) == (3e-4, 4e-4)
    trainer_config(load_run_config(path))


def test_no_stop_string_is_not_the_tasks_own() -> None:
    hashes = {config_hash(run_config({"task": {"stop": stop}})) for stop in ([], ["x"])}
    assert len(hashes | {BEFORE}) == 3


def old_config(tmp_path: Path, **changes: Any) -> Path:
    """A config.json as older runs wrote it."""
    data = to_dict(run_config({}))
    del data["policy"]["attention"], data["eval"]["success"]
    data["trainer"] |= {"eos_token": 2, "pad_token": 0}
    data["task"]["stop"] = []
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data | changes))
    return path


def test_an_older_runs_config_reads_as_what_it_meant(tmp_path: Path) -> None:
    config = load_run_config(old_config(tmp_path))
    assert config == run_config({})
    trainer_config(config, eos_token=(5,), pad_token=1, seed=0)


def test_a_newer_runs_config_comes_back_as_it_is(tmp_path: Path) -> None:
    for stop in (None, [], ["x"]):
        config = run_config({"task": {"stop": stop}} if stop is not None else {})
        path = tmp_path / "config.json"
        path.write_text(json.dumps(to_dict(config)))
        assert load_run_config(path) == config


@pytest.mark.parametrize(("name", "value"), [("eos_token", 2), ("pad_token", 0)])
def test_token_ids_in_toml_are_refused_whatever_they_are(name, value, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbf" + f"[trainer]\n{name} = {value}\n".encode())
    config = load_run_config(path)
    with pytest.raises(ConfigError, match=rf"^trainer\.{name}: got {value}, expected nothing"):
        trainer_config(config, **{name: value})
