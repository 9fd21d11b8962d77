"""A whole run: config -> policy, task, trainer, controllers, evaluation, checkpoints, telemetry."""

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "train": "loop",
    "Observer": "observer",
    "RunResult": "observer",
}

__all__ = list(_HOME)

if TYPE_CHECKING:
    from hmpo.run.loop import train
    from hmpo.run.observer import Observer, RunResult


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"hmpo.run.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hmpo.run' has no attribute {name!r}")
