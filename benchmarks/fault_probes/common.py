"""What all subjects are given: prompts, rewards, a bad forward pass; and what listens to them."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FOUR = ("12>", "3>", "456>", "78>")
TWO = ("12>", "3>")
"""Prompts of rollouts."""


def zero(completions: Sequence[str], **_: Any) -> list[float]:
    """No reward."""
    return [0.0] * len(completions)


def low_tokens(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """Share of tokens below 9: a signal in nearly every group."""
    return [sum(token < 9 for token in row) / max(1, len(row)) for row in completion_ids]


class Messages(logging.Handler):
    """Collects warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.lines.append(record.getMessage())


class Bad:
    """Makes the n-th forward pass with gradient give NaN."""

    def __init__(self, model: Any, update: int | None) -> None:
        self.calls, self.update = 0, update
        model.model.norm.register_forward_hook(self.hook)

    def hook(self, module: Any, args: Any, output: Tensor) -> Tensor | None:
        """NaN at the pass in question."""
        if not torch.is_grad_enabled():
            return None
        self.calls += 1
        return output * math.nan if self.calls - 1 == self.update else None


def moved(one: Any, other: Any) -> float:
    """Largest difference of a weight between two models of one shape."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)
