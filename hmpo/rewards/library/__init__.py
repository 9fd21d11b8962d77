"""Reward functions that most studies want, each made by a factory with the options it has.

    from hmpo.rewards.library import length, math
    GRPOTrainer(..., reward_funcs=[math(column="solution"), length(max_length=512, cache=64)])

A configuration names them: `rewards.functions = ["math"]`, options in `[rewards.options.math]`.
What a factory returns has TRL's signature and takes completions as text or as messages. It gives
None where it does not apply, such as to a sample without an answer. docs/rewards.md has a section
for each.
"""

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "boxed": "text",
    "choice": "text",
    "contains": "text",
    "cosine": "shaping",
    "exact": "text",
    "format_tags": "structure",
    "json_schema": "structure",
    "judge": "judging",
    "last_number": "text",
    "length": "shaping",
    "math": "algebra",
    "model": "classifier",
    "regex": "structure",
    "repetition": "shaping",
    "unit_tests": "programs",
}

__all__ = list(_HOME)

if TYPE_CHECKING:
    from hmpo.rewards.library.algebra import math
    from hmpo.rewards.library.classifier import model
    from hmpo.rewards.library.judging import judge
    from hmpo.rewards.library.programs import unit_tests
    from hmpo.rewards.library.shaping import cosine, length, repetition
    from hmpo.rewards.library.structure import format_tags, json_schema, regex
    from hmpo.rewards.library.text import boxed, choice, contains, exact, last_number


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"hmpo.rewards.library.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hmpo.rewards.library' has no attribute {name!r}")
