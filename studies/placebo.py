"""Rewards that tell nothing: the right ones, dealt out anew over the responses.

As many responses are rewarded as are right, so the success of an evaluation is the true one, but
which of them is chance: whatever learns from this learns from noise.
"""

import hashlib
import random
from typing import Any


def shuffled(
    prompts: list[str], completions: list[str], *, answer: list[str], **columns: Any
) -> list[float]:
    """1.0 for as many responses as are right, in an order drawn from the responses themselves."""
    rewards = [
        float(text.split("\n")[0] == right) for text, right in zip(completions, answer, strict=True)
    ]
    text = "\0".join([*prompts, *completions])
    random.Random(hashlib.sha256(text.encode()).hexdigest()).shuffle(rewards)
    return rewards
