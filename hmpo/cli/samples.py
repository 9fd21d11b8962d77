"""Completions in a terminal: which part of a prompt tells it from others, and text made safe."""

import re
from collections.abc import Collection

UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
WHOLE_UP_TO = 16
"""Characters of a common beginning or end that are shown all the same."""


def printable(text: str, width: int = 60) -> str:
    """Model-written text made safe for a terminal: control and bidi characters shown as codes."""
    shown = UNSAFE.sub(lambda m: "\\n" if m[0] == "\n" else f"\\x{ord(m[0]):02x}", text)
    return shown if len(shown) <= width else shown[: width - 3] + "..."


def own_part(text: str, others: Collection[str], width: int) -> str:
    """What tells a prompt from others, made printable, in at most `width` characters.

    Args:
        text: the prompt.
        others: prompts of the run. What begins or ends all of them, a system message, examples,
            the mark of the assistant's turn, gives way to "...".
        width: characters.
    """
    different = {other for other in others if other != text}
    first, last = 0, len(text)
    if different:
        every = [text, *different]
        first = _at_a_word(text, _alike(every))
        last -= _alike([other[::-1] for other in every])
    if first <= WHOLE_UP_TO:
        first = 0
    if len(text) - last <= WHOLE_UP_TO or last <= first:
        last = len(text)
    before, after = "..." if first else "", "..." if last < len(text) else ""
    room = max(1, width - len(before) - len(after))
    return before + printable(text[first:last].strip(), room) + after


def _alike(texts: Collection[str]) -> int:
    """Characters that all texts begin with."""
    low, high = min(texts), max(texts)  # what the outermost share, all share
    pairs = enumerate(zip(low, high))
    return next((i for i, (a, b) in pairs if a != b), min(len(low), len(high)))


def _at_a_word(text: str, place: int) -> int:
    """The begin of the word or number that the place lies in."""
    while place > 0 and not text[place - 1].isspace():
        place -= 1
    return place
