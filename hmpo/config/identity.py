"""When two runs are the same: what decides their numbers, hashed and compared."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from hmpo.config import RunConfig, to_dict

LATER = {
    "optimizer.muon_dtype": "auto",
    "optimizer.momentum": 0.0,
    "policy.attention": "auto",
    "policy.start": "",
    "policy.revision": "",
    "policy.base_revision": "",
    "policy.dtype": "float32",
    "policy.quantize": "none",
    "policy.lora_rslora": False,
    "policy.gradient_checkpointing": False,
    "eval.success": 1.0,
    "objective.token_clamp": None,
    "objective.exponent.per": "update",
    "objective.segments": "response",
    "objective.weight.kind": "ratio",
    "objective.weight.level": "token",
    "objective.weight.bound": "cap",
    "objective.weight.cap": None,
    "objective.weight.power_positive": 2.0,
    "objective.weight.power_negative": 3.0,
    "objective.weight.decay_positive": 3.0,
    "objective.weight.decay_negative": 2.0,
    "objective.proximal_coef": 0.0,
    "objective.entropy_coef": 0.0,
    "objective.entropy_target": None,
    "objective.entropy_coef_delta": 0.005,
    "objective.entropy_coef_max": 1.0,
    "objective.proximal": "k2",
    "task.environment": "",
    "task.max_turns": 16,
    "advantages.estimator": None,
    "advantages.over": "responses",
    "advantages.kl_in_reward": 0.0,
    "advantages.kl_estimator": "k1",
    "advantages.kl_over": "sum",
    "rollout.lag": 0,
    "rollout.engine": "hmpo",
    "task.chat": False,
    "task.system": "",
    "task.template_options": {},
    "rewards.options": {},
    "batch.filter_groups": False,
    "batch.signal": "",
    "batch.max_num_gen_batches": 10,
    "batch.max_tokens": 0,
    "batch.max_responses": 0,
    "batch.prompt_records": False,
    "batch.rest": 0,
    "batch.describe": False,
}
"""Settings that came after runs had been made, each with the value that says nothing new: left out
of the hash where they hold it, so that the hashes of those runs stay."""

RESOLVED = {"trainer.eos_token": 2, "trainer.pad_token": 0, "task.stop": []}
"""Settings whose default is now None, which a run resolves as it always did, and what stood for the
same in the hash."""


def config_hash(config: RunConfig) -> str:
    """SHA-256 of what decides a run's numbers: all but its name, place, sinks and sizes of logs.

    The number of updates is left out as well unless a schedule depends on it,
    so that a finished run can be continued for longer.
    """
    return hashlib.sha256(json.dumps(_decisive(config), sort_keys=True).encode()).hexdigest()


def changed_settings(old: RunConfig, new: RunConfig) -> list[str]:
    """What `config_hash` tells apart in two configurations: `optimizer.lr was 0.1, got 0.2`."""
    before, after = _flat(_decisive(old)), _flat(_decisive(new))
    pairs = {
        name: (before.get(name, LATER.get(name)), after.get(name, LATER.get(name)))
        for name in dict.fromkeys((*before, *after))
    }
    return [f"{name} was {was!r}, got {got!r}" for name, (was, got) in pairs.items() if was != got]


def _decisive(config: RunConfig) -> dict[str, Any]:
    """The settings that decide a run's numbers."""
    data = to_dict(config)
    ends = has_schedule(config) and config.trainer.total_updates is None
    kept = {"updates"} if ends else set()
    free = {"name", "out", "sinks", "tracker", "samples", "checkpoint", "updates", "relative_to"}
    free |= {"distributed"}
    for name in free - kept:
        data.pop(name)
    rollout = data["rollout"]
    for name in ("python", "arguments", "timeout"):  # where the server is, not what it draws
        rollout.pop(name)
    if rollout["engine"] != "hmpo":
        rollout["engine"] = "vllm"
    if config.agm.mode == "off":  # what nobody asks decides nothing
        data.pop("agm")
    for path, silent in LATER.items():
        table, name = _place(data, path)
        if table[name] == silent:
            table.pop(name)
    if not data["objective"]["weight"]:  # a table that came later
        data["objective"].pop("weight")
    if config.objective.kl_coef == 0:  # nothing reads it, and runs were hashed with this one
        data["objective"]["kl_estimator"] = "k3"
    data = {name: value for name, value in data.items() if value != {}}
    for path, before in RESOLVED.items():
        table, name = _place(data, path)
        table[name] = before if table[name] is None else table[name] or "none"
    return data


def _place(data: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """The table that holds a dotted setting, and the setting's own name."""
    *tables, name = path.split(".")
    for table in tables:
        data = data[table]
    return data, name


def has_schedule(config: RunConfig) -> bool:
    """Whether the learning rate or the exponent depends on the length of the run."""
    exponent = config.objective.exponent
    linear = exponent.kind == "linear" and exponent.updates is None
    return linear or config.trainer.lr_schedule != "constant"


def _flat(data: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{path}{key}.")
        else:
            flat[f"{path}{key}"] = value
    return flat
