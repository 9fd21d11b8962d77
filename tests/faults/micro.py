"""Whole runs small enough to be repeated hundreds of times, and what they leave behind.

The policy has 16 hidden units and one layer; a run of eight updates takes about 0.2 CPU seconds.
QK-clip's threshold is so low that it acts, so that its state matters for a resume.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch

from hmpo.checkpoint import load_checkpoint
from hmpo.config import RunConfig, to_dict
from hmpo.config.reading import run_config

ALPHABET = "0123456789>|\n"
EXACT = ("telemetry.jsonl", "completions.jsonl", "config.json", "environment.json")
"""Files of a run that are a function of the configuration alone."""


def micro_policy(folder: Path) -> Path:
    """Write the policy's folder."""
    from hmpo.models import save_policy
    from hmpo.models.tiny import character_tokenizer, tiny_llama

    tokenizer = character_tokenizer(ALPHABET)
    model = tiny_llama(
        len(tokenizer), seed=0, hidden_size=16, layers=1, heads=2, intermediate_size=32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)  # logits with real spread
    return save_policy(model, tokenizer, folder)


def micro_config(policy: Path, out: Path, name: str = "run", **changes: Any) -> RunConfig:
    """A run of eight updates on four rollouts; `changes` are `table__key=value`."""
    data: dict[str, Any] = {
        "name": name,
        "out": str(out),
        "updates": 8,
        "prompts_per_rollout": 3,
        "threads": 1,
        "device": "cpu",
        "policy": {"path": str(policy)},
        "task": {"name": "reverse", "level": 2},
        "rewards": {"functions": ["tests.faults.rewards:low_digits"]},
        "trainer": {
            "group_size": 4,
            "max_length": 4,
            "minibatches": 2,
            "max_qk_score": 0.5,
        },
        "optimizer": {"lr": 0.01},
        "eval": {"prompts": 2, "final_prompts": 3},
        "checkpoint": {"every": 1},
    }
    for key, value in changes.items():
        table = data
        *tables, last = key.split("__")
        for inner in tables:
            table = table.setdefault(inner, {})
        table[last] = copy.deepcopy(value)
    return run_config(data)


def toml(config: RunConfig) -> str:
    """The configuration as TOML."""

    def table(values: dict, path: str) -> list[str]:
        plain = {k: v for k, v in values.items() if not isinstance(v, dict) and v is not None}
        lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
        for key, value in values.items():
            if isinstance(value, dict):
                lines += [f"[{path}{key}]", *table(value, f"{path}{key}.")]
        return lines

    return "\n".join(table(to_dict(config), "")) + "\n"


def left_by(folder: Path) -> dict[str, bytes]:
    """All bytes of a finished run that must not depend on how it went."""
    found = {name: (folder / name).read_bytes() for name in EXACT}
    for path in sorted((folder / "policy").iterdir()):
        found[f"policy/{path.name}"] = path.read_bytes()
    checkpoints = sorted((folder / "checkpoints").iterdir())
    for path in sorted(checkpoints[-1].iterdir()):
        found[f"{checkpoints[-1].name}/{path.name}"] = path.read_bytes()
    return found


def everything(folder: Path) -> dict[str, bytes]:
    """All files of a run but timing.jsonl, which is about the clock, by their path in it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    found.pop("timing.jsonl", None)
    return found


def litter(folder: Path) -> list[str]:
    """Files that a finished run must not leave."""
    known = {*EXACT, "timing.jsonl", "checkpoints", "policy"}
    names = [path.name for path in folder.iterdir() if path.name not in known]
    return names + [p.name for p in (folder / "checkpoints").iterdir() if p.name[:5] != "step-"]


def saved_state(folder: Path, step: int | None = None) -> dict[str, Any]:
    """The state in a run's newest checkpoint, or in that of `step`."""
    found = load_checkpoint(folder / "checkpoints", step=step)
    assert found is not None
    return found.state


def records(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The telemetry of a run."""
    lines = (folder / "telemetry.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [record for record in found if kind is None or record["type"] == kind]
