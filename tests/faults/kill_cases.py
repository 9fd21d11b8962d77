"""The configurations whose runs are killed and resumed: one for each kind of state that a run has.

Each is a change of `micro_config`, a run of eight updates on four rollouts: `table__key=value`.
"""

import json
from pathlib import Path
from typing import Any

from hmpo.config import RunConfig
from hmpo.run.loop import train
from tests.agm.streams import EAGER
from tests.faults.micro import micro_config

REWARDS = "tests.faults.rewards"
CASES: dict[str, dict[str, Any]] = {
    "AdamW and QK-clip": {"checkpoint__every": 3},
    "Muon and QK-clip": {"optimizer__name": "muon", "checkpoint__every": 3},
    "Muon per head in bfloat16": {
        "optimizer__name": "muon",
        "optimizer__muon_per_head": True,
        "optimizer__muon_dtype": "bfloat16",
        "optimizer__weight_decay": 0.1,
    },
    "SGD without a state": {
        "optimizer__name": "sgd",
        "optimizer__lr": 0.5,
        "checkpoint__every": 3,
    },
    "SGD with momentum": {
        "optimizer__name": "sgd",
        "optimizer__lr": 0.2,
        "optimizer__momentum": 0.9,
        "optimizer__weight_decay": 0.1,
        "checkpoint__every": 3,
    },
    "learnable p": {"objective__exponent__kind": "learnable", "objective__p": -0.5},
    "p by a schedule": {"objective__member": "holder", "trainer__epochs": 2},
    "p by the share of clipped tokens": {"objective__member": "pmpo", "trainer__epochs": 2},
    "p by the reward": {"objective__member": "apmpo", "trainer__epochs": 2},
    "calibrated clip": {"objective__clip_share": 0.2},
    "controllers with a curriculum": {
        "updates": 14,
        "eval__every": 5,
        "eval__success": 0.5,
        "task__level": 3,
        "objective__exponent__kind": "controller",
        "agm": EAGER | {"mode": "apply", "controls": ["lr", "p", "clip", "batch", "level", "stop"]},
    },
    "early stop by a controller": {
        "agm": {"mode": "apply", "stop": {"max_steps": 5}},
        "checkpoint__every": 2,
    },
    "gradient accumulation with idle rows": {
        "trainer__micro_batch_size": 1,
        "trainer__mask_truncated": True,
        "rewards__functions": [f"{REWARDS}:ends_low"],
    },
    "rewards that draw in a worker": {
        "rewards__functions": [f"{REWARDS}:draws"],
        "trainer__reward_timeout": 60.0,
    },
    "rewards that draw in the run": {
        "rewards__functions": [f"{REWARDS}:draws"],
        "checkpoint__every": 3,
    },
    "rewards that start processes": {
        "rewards__functions": [f"{REWARDS}:starts_another"],
        "trainer__reward_timeout": 60.0,
    },
    "two weighted rewards, one that fails": {
        "rewards__functions": [f"{REWARDS}:low_digits", f"{REWARDS}:often_fails"],
        "rewards__weights": [0.75, 0.25],
        "trainer__on_reward_error": "skip",
    },
    "prompts of a file": {"task": {"name": "jsonl"}},
    "LoRA": {"policy__lora_rank": 2, "optimizer__lr": 0.05},
    "bfloat16 sampling": {"trainer__sampling_dtype": "bfloat16"},
    "bfloat16 autocast": {"trainer__autocast": "bfloat16", "checkpoint__every": 3},
    "three epochs": {"trainer__epochs": 3, "updates": 9, "checkpoint__every": 2},
    "every step saved and measured": {"eval__every": 1, "eval__pass_at": 2, "samples": 20},
    "reference with KL": {"reference": "start", "objective__kl_coef": 0.1},
    "GSPO baseline": {
        "algorithm": "gspo",
        "objective__member": "gspo",
        "reference": "start",
        "checkpoint__every": 3,
    },
    "mismatch correction": {
        "trainer__top_k": 6,
        "trainer__temperature": 1.3,
        "mismatch": {"correction": "truncate", "high": 1.5, "off_policy_low": 0.5},
    },
    "stale rollouts": {"rollout__lag": 2, "checkpoint__every": 2, "updates": 10},
    "stale rollouts of adapters by GSPO": {
        "rollout__lag": 3,
        "policy__lora_rank": 2,
        "optimizer__lr": 0.05,
        "algorithm": "gspo",
        "objective__member": "gspo",
        "updates": 12,
        "checkpoint__every": 3,
    },
    "weights of another run": {"reference": "start", "checkpoint__every": 3},
    "checkpoints by the clock": {"checkpoint__every": "auto", "checkpoint__keep": 1},
    "stop strings": {"task__stop": ["12", "9"]},
    "mean over tokens": {
        "objective__member": "dapo",
        "trainer__lr_schedule": "cosine",
        "trainer__warmup_updates": 2,
    },
    "conversations": {
        "task__environment": f"{REWARDS}:Wishes",
        "task__max_turns": 3,
        "objective__segments": "turn",
        "rewards__functions": [f"{REWARDS}:low_digits"],
        "trainer__max_length": 14,
        "trainer__on_reward_error": "skip",
        "eval__every": 3,
        "checkpoint__every": 3,
    },
    "bfloat16 weights with float32 copies": {
        "policy__dtype": "bfloat16",
        "checkpoint__every": 3,
    },
    "the best checkpoint kept": {
        "eval__every": 1,
        "eval__prompts": 8,
        "eval__success": 0.5,
        "checkpoint__every": 3,
        "checkpoint__keep": 1,
    },
    "module decoder without QK-clip": {"trainer__decoder": "module", "trainer__qk_clip": False},
}


def case_config(name: str, policy: Path, root: Path) -> RunConfig:
    """The run of a case, in a folder of its own below `root`."""
    place = root / name.replace(" ", "-").replace(",", "")
    place.mkdir(exist_ok=True)
    changes = dict(CASES[name])
    if name == "prompts of a file":
        lines = [{"prompt": f"{i:03d}>", "answer": f"{i:03d}"[::-1]} for i in range(0, 999, 31)]
        path = place / "prompts.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        changes["task"] = {"name": "jsonl", "options": {"path": str(path)}}
    if name == "weights of another run":
        other = micro_config(policy, place, "other", optimizer__lr=0.05, updates=2)
        changes["policy__start"] = str(train(other).folder)
    return micro_config(policy, place, **changes)
