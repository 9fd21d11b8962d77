"""For every setting of a run another value, and what else is set so that it matters.

`CASES` is complete: `tests/config/test_every_setting.py` fails where a field of `RunConfig` or of a
table in it has no entry. The settings of the controllers are walked over recorded logs instead
(`tests/agm/test_every_setting.py`).
"""

from typing import Any

from tests.config.other_values import ADVANTAGES, EXPONENT, MISMATCH, OBJECTIVE, TRAINER, WEIGHT

Case = tuple[dict[str, Any], Any]
"""What else is set, as `table__key`, and another value of the field."""
REWARDS = "tests.faults.rewards"
LOW, DRAWS, FAILS, SLOW = (
    f"{REWARDS}:{name}" for name in ("low_digits", "draws", "often_fails", "slow")
)
GAMES = "tests.environments.games"
TALKS = {"task__environment": f"{GAMES}:Endless", "trainer__max_length": 24}
MUON = {"optimizer__name": "muon"}
SGD = {"optimizer__name": "sgd", "optimizer__lr": 0.5}
LORA = {"policy__lora_rank": 2, "optimizer__lr": 0.05}
FROM_FILE = {"task": {"name": "jsonl", "options": {"path": "prompts.jsonl"}}}
CHAT = {"task__chat": True}
GSPO = {"algorithm": "gspo", "objective__member": "gspo"}
LINEAR = {"objective__exponent__kind": "linear"}
LEARNABLE = {"objective__exponent__kind": "learnable", "objective__p": -0.5}
MATCHED = {"objective__member": "pmpo", "objective__clip_low": 0.01, "objective__clip_high": 0.01}
BY_REWARD = {"objective__member": "apmpo"}
TIGHT = {"objective__clip_low": 0.01, "objective__clip_high": 0.01}
MASKED = {"objective__member": "cispo", "objective__weight__bound": "mask"}
GAMMA = {"objective__member": "vespo"}
REFERENCE = {"reference": "start", "optimizer__lr": 0.05}
NARROW = {"trainer__top_k": 4, "trainer__temperature": 1.5}
REFILLS = {"batch__filter_groups": True, "rewards__functions": [f"{REWARDS}:never"]}
"""Answers that are never right: every attempt is made."""
SIGNALS = REFILLS | {"rewards__functions": [f"{REWARDS}:ends_low", DRAWS]}
SIGNALS |= {"batch__signal": "ends_low", "trainer__group_size": 2}
WILD = {"optimizer__lr": 1e37, "trainer__qk_clip": False}
"""A learning rate at which nothing is finite."""

RUN: dict[str, Case] = {
    "name": ({}, "other"),
    "out": ({}, "elsewhere"),
    "seed": ({}, 1),
    "updates": ({}, 3),
    "prompts_per_rollout": ({}, 4),
    "algorithm": ({"objective__member": "gspo", **TIGHT}, "gspo"),
    "reference": ({}, "start"),
    "threads": ({}, 2),
    "device": ({}, "cuda:77"),
    "samples": ({}, 1),
    "sinks": ({}, ["tensorboard"]),
    "relative_to": (FROM_FILE, ["elsewhere"]),
    "tracker.project": ({"sinks": ["tensorboard"]}, "other"),
    "tracker.name": ({"sinks": ["tensorboard"]}, "other"),
    "distributed.timeout": ({}, 30.0),
    "distributed.shard": ({}, True),
    "distributed.offload": ({}, True),
    "policy.path": ({}, "tiny-sort"),
    "policy.start": ({}, "0/run"),
    "policy.revision": ({}, "v1"),
    "policy.base_revision": ({}, "v1"),
    "policy.dtype": ({}, "bfloat16"),
    "policy.lora_rank": ({}, 2),
    "policy.lora_alpha": (LORA, 4.0),
    "policy.lora_targets": (LORA, ["q_proj"]),
    "policy.quantize": (LORA, "4bit"),
    "policy.lora_rslora": (LORA, True),
    "policy.gradient_checkpointing": ({}, True),
    "policy.attention": ({}, "eager"),
    "task.name": ({}, "sort"),
    "task.level": ({}, 1),
    "task.shots": ({}, 1),
    "task.environment": ({}, f"{GAMES}:OneTurn"),
    "task.max_turns": (TALKS, 1),
    "task.options": (FROM_FILE, {"path": "others.jsonl"}),
    "task.stop": ({}, ["9"]),
    "task.chat": ({}, True),
    "task.system": (CHAT, "9"),
    "task.template_options": (CHAT, {"mood": True}),
    "rollout.lag": ({}, 1),
    "rollout.engine": ({}, "http://127.0.0.1:1"),
    "rollout.python": ({"rollout__engine": "vllm"}, "nowhere/python"),
    "rollout.arguments": ({"rollout__engine": "vllm"}, ["--port", "1"]),
    "rollout.timeout": ({"rollout__engine": "vllm"}, 0.0),
    "rewards.functions": ({}, [DRAWS]),
    "rewards.weights": ({"rewards__functions": [LOW, DRAWS]}, [1.0, 0.5]),
    "rewards.options": ({"rewards__functions": ["repetition"]}, {"repetition": {"n": 1}}),
    "optimizer.name": ({}, "muon"),
    "optimizer.lr": ({}, 0.02),
    "optimizer.betas": ({}, [0.5, 0.9]),
    "optimizer.momentum": (SGD, 0.5),
    "optimizer.weight_decay": ({}, 0.5),
    "optimizer.muon_lr": (MUON, 0.5),
    "optimizer.muon_momentum": (MUON, 0.5),
    "optimizer.muon_coefficients": (MUON, "cans"),
    "optimizer.muon_update_scale": (MUON, "original"),
    "optimizer.muon_per_head": (MUON, True),
    "optimizer.muon_dtype": (MUON | {"optimizer__muon_dtype": "float32"}, "bfloat16"),
    "batch.filter_groups": ({}, True),
    "batch.signal": (SIGNALS, "draws"),
    "batch.max_num_gen_batches": (REFILLS, 2),
    "batch.max_tokens": (REFILLS, 1),
    "batch.max_responses": (REFILLS, 12),
    "batch.describe": ({}, True),
    "batch.prompt_records": (FROM_FILE, True),
    "batch.rest": (FROM_FILE | {"rewards__functions": [f"{REWARDS}:ends_low"]}, 2),
    "eval.every": ({}, 1),
    "eval.prompts": ({"eval__every": 1}, 3),
    "eval.final_prompts": ({}, 2),
    "eval.pass_at": ({}, 2),
    "eval.batch_size": ({"eval__final_prompts": 9}, 2),
    "eval.success": ({}, 0.1),
    "checkpoint.every": ({"checkpoint__keep": 9}, 2),
    "checkpoint.keep": ({"checkpoint__every": 1}, 3),
    "checkpoint.keep_best": (
        {"checkpoint__every": 1, "checkpoint__keep": 1, "eval__every": 3},
        False,
    ),
}
"""Settings of the run itself and of its small tables."""

NEEDED: dict[str, dict[str, Any]] = {
    "objective.segments": TALKS,
    "objective.ahm_weight": {"objective__mean": "ahm"},
    "objective.gate": {"objective__clip_level": "token"},
    "objective.gate_positive": {"objective__member": "sapo"},
    "objective.gate_negative": {"objective__member": "sapo"},
    "objective.clip_width": {"objective__clip_level": "sequence"},
    "objective.clip_center": {"objective__clip_level": "sequence", **TIGHT},
    "objective.token_clamp": {"objective__clip_level": "sequence"},
    "objective.clip_sigma": {
        "objective__clip_level": "sequence",
        "objective__clip_width": "z",
        "objective__clip_sigma": 1.0,
    },
    "objective.clip_rollouts": {"updates": 10, "objective__clip_share": 0.3},
    "objective.sign_convention": {"objective__clip_low": 0.01, "objective__clip_high": 0.04},
    "objective.clip_level": TIGHT,
    "objective.clip_share": {"updates": 8},
    "objective.name": GSPO,
    "objective.exponent.allow_surrogate": {
        **LEARNABLE,
        "objective__exponent__criterion": "surrogate",
    },
    "objective.clip_space": {"objective__clip_low": 0.02, "objective__clip_high": 0.02},
    "objective.dual_clip": TIGHT,
    "objective.max_length": {"objective__reduction": "constant", "objective__max_length": 4},
    "objective.kl_coef": {"reference": "start"},
    "objective.kl_estimator": {"reference": "start", "objective__kl_coef": 0.5},
    "objective.exponent.end": LINEAR,
    "objective.exponent.updates": LINEAR,
    "objective.exponent.per": LINEAR,
    "objective.exponent.criterion": LEARNABLE,
    "objective.exponent.target": LEARNABLE,
    "objective.exponent.bound": LEARNABLE,
    "objective.exponent.lr": LEARNABLE,
    "objective.exponent.saturation": MATCHED,
    "objective.exponent.matching": MATCHED,
    "objective.exponent.gamma": BY_REWARD,
    "objective.exponent.clip_gain": BY_REWARD,
    "objective.proximal": {"objective__proximal_coef": 0.5},
    "objective.entropy_coef_delta": {"objective__entropy_target": 9.0},
    "objective.entropy_coef_max": {
        "objective__entropy_target": 9.0,
        "objective__entropy_coef_delta": 0.5,
    },
    "objective.weight.kind": MASKED | TIGHT,
    "objective.weight.level": {"objective__member": "cispo"},
    "objective.weight.bound": {"objective__member": "cispo", **TIGHT},
    "objective.weight.cap": {"objective__member": "cispo"},
    **{f"objective.weight.{name}": GAMMA for name in WEIGHT if "_" in name},
    "advantages.over": {"advantages__estimator": "reinforce_pp"},
    "advantages.kl_in_reward": REFERENCE,
    "advantages.kl_estimator": REFERENCE | {"advantages__kl_in_reward": 0.5},
    "advantages.kl_over": REFERENCE | {"advantages__kl_in_reward": 0.5},
    "mismatch.recompute": NARROW,
    "mismatch.correction": NARROW,
    "mismatch.level": NARROW | {"mismatch__correction": "truncate"},
    "mismatch.low": NARROW | {"mismatch__correction": "truncate"},
    "mismatch.high": {
        "trainer__sampling_dtype": "bfloat16",
        "mismatch__correction": "truncate",
        "mismatch__high": 1.0,
    },
    "mismatch.sequence_low": NARROW,
    "mismatch.sequence_high": NARROW,
    "mismatch.off_policy_low": NARROW,
    "trainer.total_updates": {"trainer__lr_schedule": "linear"},
    "trainer.on_nonfinite": WILD,
    "trainer.max_nonfinite": WILD | {"trainer__max_nonfinite": 1},
    "trainer.on_reward_error": {"rewards__functions": [FAILS]},
    "trainer.reward_timeout": {"rewards__functions": [SLOW], "trainer__on_reward_error": "skip"},
}
"""What else is set for the fields of `tests.config.other_values`."""
VALUES: dict[str, Any] = {
    "objective.name": "mine",
    "objective.clip_center": "drift",
    "objective.exponent.allow_surrogate": True,
    "objective.exponent.kind": "linear",
    "objective.dual_clip": 1.02,
    "mismatch.low": 1.0,
    "trainer.reward_timeout": 0.05,
    "trainer.minibatches": 3,
    "objective.clip_level": "sequence",
    "objective.clip_space": "ratio",
    "trainer.logprob_chunk": 1,
    "objective.token_clamp": 0.001,
}
"""Values for where those do not do."""


def _cases() -> dict[str, Case]:
    cases = dict(RUN)
    tables = {
        "objective": OBJECTIVE | {"name": "mine"},
        "objective.exponent": EXPONENT | {"allow_surrogate": True},
        "objective.weight": WEIGHT,
        "advantages": ADVANTAGES,
        "mismatch": MISMATCH,
        "trainer": TRAINER,
    }
    for table, values in tables.items():
        for name, value in values.items():
            path = f"{table}.{name}"
            cases[path] = (NEEDED.get(path, {}), VALUES.get(path, value))
    return cases


CASES = _cases()
SAMPLING = (
    *(f"trainer.{name}" for name in ("temperature", "top_", "sampling", "autocast")),
    "trainer.decoder",
    "trainer.max_length",
)
ALSO: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "gspo": (GSPO, ("trainer.",)),
    "lora": (LORA, ("optimizer.", *SAMPLING, "trainer.micro", "trainer.qk", "trainer.max_")),
    "module": ({"trainer__decoder": "module"}, ("task.stop", *SAMPLING, "trainer.mask")),
}
"""Other paths through a run, and the settings that are walked over on them once more."""
THE_SAME = {
    "lora": {"trainer.decoder": "the fast decoder knows no adapters"},
    "module": {"trainer.decoder": "is set already"},
}
"""What changes nothing on such a path, and why that is right."""
UNREAD: dict[str, Case] = {
    "task.max_turns": ({}, 2),
    "objective.segments": ({}, "turn"),
    "objective.proximal": ({}, "pearson"),
    "objective.entropy_coef_delta": ({}, 0.5),
    "objective.entropy_coef_max": ({}, 0.5),
    "objective.weight.kind": ({}, "gamma"),
    "objective.weight.cap": ({}, 0.9),
    "optimizer.betas": (SGD, [0.5, 0.9]),
    "optimizer.momentum": ({}, 0.5),
    "rollout.python": ({}, "python3"),
    "rollout.arguments": ({}, ["--seed", "1"]),
    "rollout.timeout": ({}, 9.0),
    "batch.signal": ({}, "low_digits"),
    "batch.max_num_gen_batches": ({}, 2),
    "batch.max_tokens": ({}, 1),
    "batch.max_responses": ({}, 12),
    "tracker.project": ({}, "other"),
    "tracker.name": ({}, "other"),
    "policy.lora_alpha": ({}, 4.0),
    "policy.lora_targets": ({}, ["q_proj"]),
    "policy.lora_rslora": ({}, True),
    "task.level": (FROM_FILE, 2),
    "task.chat": (FROM_FILE, True),
    "task.system": ({}, "9"),
    "task.template_options": ({}, {"mood": True}),
    "optimizer.muon_lr": ({}, 0.5),
    "optimizer.muon_momentum": ({}, 0.5),
    "optimizer.muon_coefficients": ({}, "cans"),
    "optimizer.muon_update_scale": ({}, "original"),
    "optimizer.muon_per_head": ({}, True),
    "optimizer.muon_dtype": ({}, "bfloat16"),
    "trainer.std_ddof": ({"advantages__estimator": "rloo"}, 0),
    "trainer.advantage_scale": ({"advantages__estimator": "rloo"}, "none"),
    "advantages.over": ({"advantages__estimator": "group_std"}, "tokens"),
    "advantages.kl_estimator": ({}, "k3"),
    "advantages.kl_over": ({}, "mean"),
    "trainer.total_updates": ({}, 9),
    "agm.first_level": ({}, 2),
}
"""Settings that nothing reads beside what else is set: one line refuses them."""
