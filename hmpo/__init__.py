"""Power-mean policy optimisation for language models.

Public names are imported on first use, so `import hmpo` costs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "log_power_mean": "objective",
    "power_mean_weights": "objective",
    "ahm_mean": "objective",
    "effective_sample_size": "objective",
    "solve_exponent": "objective",
    "group_advantages": "objective",
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
    "GSPOTrainer": "trainer",
    "RunConfig": "config",
    "train": "run",
}

__all__ = ["__version__", "members", *_HOME]

if TYPE_CHECKING:
    from hmpo import members
    from hmpo.config import GSPOConfig, HMPOConfig, ObjectiveConfig, PowerMeanConfig, RunConfig
    from hmpo.logprobs.responses import token_logprobs
    from hmpo.objective.advantages import group_advantages
    from hmpo.objective.loss import power_mean_objective
    from hmpo.objective.means import (
        ahm_mean,
        effective_sample_size,
        log_power_mean,
        power_mean_weights,
    )
    from hmpo.objective.solve import solve_exponent
    from hmpo.run.loop import train
    from hmpo.sampling.responses import sample_responses
    from hmpo.trainer.gspo import GSPOTrainer
    from hmpo.trainer.power_mean import HMPOTrainer, PowerMeanTrainer
    from hmpo.types import Rollout


def __getattr__(name: str) -> Any:
    if name == "members":
        return importlib.import_module("hmpo.config.members")
    if name in _HOME:
        return getattr(importlib.import_module(f"hmpo.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hmpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
