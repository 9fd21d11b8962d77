"""The objective inside TRL: `PowerMeanGRPOTrainer` with `PowerMeanGRPOConfig`; `record_batch`."""

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "PowerMeanGRPOConfig": "config",
    "PowerMeanGRPOTrainer": "trainer",
    "record_batch": "record",
}

__all__ = list(_HOME)

if TYPE_CHECKING:
    from hmpo.adapters.trl.config import PowerMeanGRPOConfig
    from hmpo.adapters.trl.record import record_batch
    from hmpo.adapters.trl.trainer import PowerMeanGRPOTrainer


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"hmpo.adapters.trl.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hmpo.adapters.trl' has no attribute {name!r}")
