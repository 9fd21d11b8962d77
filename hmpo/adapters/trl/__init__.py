"""The objective inside TRL: `PowerMeanGRPOTrainer` with `PowerMeanGRPOConfig`."""

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "PowerMeanGRPOConfig": "config",
    "PowerMeanGRPOTrainer": "trainer",
}

__all__ = list(_HOME)

if TYPE_CHECKING:
    from hmpo.adapters.trl.config import PowerMeanGRPOConfig
    from hmpo.adapters.trl.trainer import PowerMeanGRPOTrainer


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"hmpo.adapters.trl.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hmpo.adapters.trl' has no attribute {name!r}")
