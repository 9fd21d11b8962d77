"""Prompts -> responses, with the behaviour log-probs recorded while they are drawn."""

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "SamplingOptions": "options",
    "sample_responses": "responses",
    "sample_rollout": "responses",
}

__all__ = list(_HOME)

if TYPE_CHECKING:
    from hmpo.sampling.options import SamplingOptions
    from hmpo.sampling.responses import sample_responses, sample_rollout


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"hmpo.sampling.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hmpo.sampling' has no attribute {name!r}")
