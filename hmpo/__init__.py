"""Power-mean policy optimisation for language models.

Public names are imported on first use, so `import hmpo` costs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "log_power_mean": "means",
    "power_mean_weights": "means",
    "ahm_mean": "means",
    "effective_sample_size": "means",
    "solve_exponent": "means",
    "group_advantages": "advantages",
    "power_mean_objective": "objective",
    "ObjectiveConfig": "config",
    "token_logprobs": "logprobs",
    "sample_responses": "sampling",
    "Rollout": "types",
    "PowerMeanConfig": "config",
    "HMPOConfig": "config",
    "GSPOConfig": "config",
    "PowerMeanTrainer": "trainer",
    "HMPOTrainer": "trainer",
    "GSPOTrainer": "baselines.gspo",
    "RunConfig": "config",
    "train": "run",
}

__all__ = ["__version__", "members", *_HOME]

if TYPE_CHECKING:
    from hmpo import members
    from hmpo.advantages import group_advantages
    from hmpo.baselines.gspo import GSPOTrainer
    from hmpo.config import GSPOConfig, HMPOConfig, ObjectiveConfig, PowerMeanConfig, RunConfig
    from hmpo.logprobs import token_logprobs
    from hmpo.means import (
        ahm_mean,
        effective_sample_size,
        log_power_mean,
        power_mean_weights,
        solve_exponent,
    )
    from hmpo.objective import power_mean_objective
    from hmpo.run import train
    from hmpo.sampling import sample_responses
    from hmpo.trainer import HMPOTrainer, PowerMeanTrainer
    from hmpo.types import Rollout


def __getattr__(name: str) -> Any:
    if name == "members":
        return importlib.import_module("hmpo.members")
    if name in _HOME:
        return getattr(importlib.import_module(f"hmpo.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hmpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
