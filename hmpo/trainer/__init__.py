"""One rollout and its updates: the whole family, and GSPO as its witness."""

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "PowerMeanTrainer": "power_mean",
    "HMPOTrainer": "power_mean",
    "GSPOTrainer": "gspo",
    "shard_policy": "sharded",
}

__all__ = list(_HOME)

if TYPE_CHECKING:
    from hmpo.trainer.gspo import GSPOTrainer
    from hmpo.trainer.power_mean import HMPOTrainer, PowerMeanTrainer
    from hmpo.trainer.sharded import shard_policy


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"hmpo.trainer.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hmpo.trainer' has no attribute {name!r}")
