"""A reward for broken policies: the share of right places, where whole answers are too rare."""

from typing import Any


def right_places(
    prompts: list[str], completions: list[str], *, answer: list[str], **columns: Any
) -> list[float]:
    """Share of the longer of both texts that agrees, place by place: 1.0 for the answer alone."""
    lines = [text.split("\n")[0] for text in completions]
    return [
        sum(a == b for a, b in zip(text, right, strict=False)) / max(len(text), len(right), 1)
        for text, right in zip(lines, answer, strict=True)
    ]
