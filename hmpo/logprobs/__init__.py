"""Responses -> log-probs and entropy, without the logits."""

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "token_logprobs": "responses",
    "token_logprobs_and_entropy": "responses",
    "response_loss": "responses",
}

__all__ = list(_HOME)

if TYPE_CHECKING:
    from hmpo.logprobs.responses import response_loss, token_logprobs, token_logprobs_and_entropy


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"hmpo.logprobs.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hmpo.logprobs' has no attribute {name!r}")
