"""Prompts -> responses, with the behaviour log-probs recorded while they are drawn."""

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "sample_responses": "responses",
}

__all__ = list(_HOME)

if TYPE_CHECKING:
    from hmpo.sampling.responses import sample_responses


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"hmpo.sampling.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hmpo.sampling' has no attribute {name!r}")
