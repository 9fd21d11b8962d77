"""Members x exponent sources x estimators x optimizers, trained by one rank of several.

    python -m tests.trainer.rank_grid FILE RANK SIZE OUT

Left in OUT: by case the completions of two rollouts and the weights after their eight updates.
`benchmarks/ranks.py` compares them; a sample of it is `tests/trainer/test_ranks.py`.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hmpo.config import PowerMeanConfig
from hmpo.config.members import BY_NAME
from hmpo.config.objective import ExponentConfig, MismatchConfig, ObjectiveConfig
from hmpo.errors import ConfigError
from hmpo.optim.param_groups import MuonWithAdamW, split_param_groups
from hmpo.trainer.power_mean import PowerMeanTrainer
from tests.trainer.rank_cases import BASE, PROMPTS, Ready, adamw, as_rank, llama, reward

WHOLE = BASE | {"total_updates": 8}
SOURCES: dict[str, dict[str, Any]] = {
    "of its own": {},
    "fixed": {"exponent": ExponentConfig()},
    "by sign": {"p_positive": 0.5, "p_negative": -1.5},
    "linear": {"exponent": ExponentConfig(kind="linear", end=-2.0, updates=8)},
    "linear per rollout": {
        "exponent": ExponentConfig(kind="linear", end=-2.0, updates=8, per="rollout")
    },
    "learnable, ess": {"p": 0.5, "exponent": ExponentConfig(kind="learnable", lr=0.1)},
    "learnable, variance": {
        "p": 0.5,
        "exponent": ExponentConfig(kind="learnable", criterion="variance", lr=0.1),
    },
    "matched, ess": {"exponent": ExponentConfig(kind="matched")},
    "matched, closed form": {"exponent": ExponentConfig(kind="matched", matching="closed_form")},
    "reward": {"exponent": ExponentConfig(kind="reward", gamma=0.1)},
    "controller": {"exponent": ExponentConfig(kind="controller")},
}
"""Where the exponent comes from."""
ESTIMATORS: dict[str, dict[str, Any]] = {
    "over the unbiased deviation": {"std_ddof": 1},
    "over the population's deviation": {"std_ddof": 0},
    "not scaled": {"advantage_scale": "none"},
}
TIGHT = {"clip_low": 0.01, "clip_high": 0.01}
"""Half-widths that clip within a few updates."""
BOUNDS: dict[str, ObjectiveConfig] = {
    "calibrated clip": ObjectiveConfig(clip_share=0.2, clip_rollouts=1),
    "dual clip": ObjectiveConfig(clip_space="ratio", dual_clip=1.02, **TIGHT),
    "sequence clip of z width": ObjectiveConfig(clip_level="sequence", clip_width="z"),
    "sequence clip around the drift": ObjectiveConfig(clip_level="sequence", clip_center="drift"),
    "paper's signs": ObjectiveConfig(sign_convention="paper", clip_low=0.01, clip_high=0.04),
}
MISMATCHES: dict[str, MismatchConfig] = {
    f"{correction} by {level}": MismatchConfig(correction=correction, level=level, high=1.5)
    for correction in ("truncate", "mask")
    for level in ("token", "sequence")
} | {
    "off-policy mask": MismatchConfig(off_policy_low=0.9),
    "sequences left out": MismatchConfig(sequence_low=0.7, sequence_high=1.4),
}


def grid() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and trainer of every case whose settings go together."""
    for name, member in BY_NAME.items():
        plain = _fields(member())
        for source, changes in SOURCES.items():
            if all(plain[key] == value for key, value in changes.items()) and changes:
                continue
            try:
                changed = ObjectiveConfig(**plain | TIGHT_OF.get(name, {}) | changes)
                config = PowerMeanConfig(**WHOLE, objective=changed)
            except ConfigError:
                continue  # a member without p, or without what this source looks at
            yield f"{name}, p {source}", _made(config)
        for estimator, scale in ESTIMATORS.items():
            config = PowerMeanConfig(**WHOLE | scale, objective=member())
            yield f"{name}, advantages {estimator}", _made(config)
    for name, objective in BOUNDS.items():
        yield name, _made(PowerMeanConfig(**WHOLE, objective=objective))
    for name, mismatch in MISMATCHES.items():
        config = PowerMeanConfig(**WHOLE, mismatch=mismatch, top_k=8, temperature=1.3)
        yield f"mismatch: {name}", _made(config)
    for name, optimizer in OPTIMIZERS.items():
        for clip in (False, True):
            config = PowerMeanConfig(**WHOLE, qk_clip=clip, max_qk_score=0.5)
            yield f"{name}{', QK-clip' * clip}", _made(config, optimizer)


TIGHT_OF = dict.fromkeys(("grpo", "dapo", "dr_grpo", "gmpo", "hmpo", "pmpo", "apmpo", "ahm"), TIGHT)
"""Members whose own half-widths would clip nothing here."""


def shares(*given: Any, **columns: Any) -> list[float | None]:
    """The reward of `rank_cases`, in [0, 1], where an exponent that follows rewards expects it."""
    return [None if value is None else value / 4 for value in reward(*given, **columns)]


def _fields(objective: ObjectiveConfig) -> dict[str, Any]:
    return {name: getattr(objective, name) for name in ObjectiveConfig.__dataclass_fields__}


def _made(config: PowerMeanConfig, optimizer: Callable[[Any], Any] = adamw) -> Callable[[], Any]:
    def make() -> PowerMeanTrainer:
        model = llama()
        trainer = PowerMeanTrainer(model, None, optimizer(model), config, shares)
        if config.resolved_objective.exponent.kind == "controller":
            trainer.in_force.set(p=0.3)
        return trainer

    return make


def _muon(model: Any, **options: Any) -> MuonWithAdamW:
    groups = split_param_groups(model, lr=1e-3, weight_decay=0.1, adamw_lr=1e-3, **options)
    return MuonWithAdamW(groups, lr=1e-3, ns_dtype=torch.float64)


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "AdamW": adamw,
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "Muon": _muon,
    "Muon per head": lambda model: _muon(model, per_head=True),
}


def found(_: Ready) -> dict[str, Any]:
    """Every case: completions and weights."""
    left = {}
    for name, make in grid():
        trainer, completions = make(), []
        for _ in range(2):
            trainer.update_step(PROMPTS)
            completions.append([sample["completion"] for sample in trainer.samples])
        weights = {key: value.detach() for key, value in trainer.policy.named_parameters()}
        left[name] = {"completions": completions, "weights": weights, "updates": trainer.step}
    return left


if __name__ == "__main__":
    as_rank(*sys.argv[1:], found=found)
