"""Stop strings of several tokens: whether a response's newest token completes one.

A token can complete a stop string only if the string's last character comes with it, so a
dictionary answers for nearly all tokens. The rest are decoded together with as many tokens
before them as the longest stop string may need. Strings that hold a special token are looked for
in text that keeps such tokens, all others in text without them, as `decode_responses` does.
"""

from collections.abc import Sequence
from typing import Any

from hmpo.models.tokens import parted_stop, special_tokens

MARGIN = 12
"""Characters at the start of a decoded tail that may differ from those of the whole response: a
leading blank that is stripped, bytes of a character that was cut in two."""


class StopStrings:
    """Watches the rows of one rollout."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], rows: int) -> None:
        """Watch `rows` responses for any of the strings `stop`."""
        self.special = special_tokens(tokenizer)
        plain, mixed = parted_stop(stop, self.special.values())
        self.plain = _Search(tokenizer, plain, skip=True)
        self.mixed = _Search(tokenizer, mixed, skip=False)
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.texts: list[list[int]] = [[] for _ in range(rows)]

    def completes(self, row: int, token: int) -> bool:
        """Whether `token`, the next one of `row`, makes its text hold a stop string.

        A row is asked for its tokens in turn, and no longer once the answer was yes.
        """
        self.tokens[row].append(token)
        ordinary = token not in self.special
        if ordinary:
            self.texts[row].append(token)
        found = ordinary and self.plain.ends(self.texts[row])
        return found or self.mixed.ends(self.tokens[row])


class _Search:
    """One set of stop strings, in text with or without special tokens."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], *, skip: bool) -> None:
        self.tokenizer, self.stop, self.skip = tokenizer, stop, skip
        self.longest = max(map(len, self.stop), default=0)
        self.last = {text[-1] for text in self.stop}
        self._known: dict[int, tuple[bool, int]] = {}

    def ends(self, tokens: list[int]) -> bool:
        """Whether the last of `tokens` completes a string."""
        if not self.stop:
            return False
        token = tokens[-1]
        if token not in self._known:
            self._known[token] = self._describe(token)
        possible, length = self._known[token]
        if not possible:
            return False
        enough = self.longest + length + MARGIN
        count = enough
        while True:
            tail = self.tokenizer.decode(tokens[-count:], skip_special_tokens=self.skip)
            if len(tail) >= enough or count >= len(tokens):
                return any(text in tail for text in self.stop)
            count *= 2

    def _describe(self, token: int) -> tuple[bool, int]:
        """(whether the token may bring the last character of a stop string, its length)."""
        text = self.tokenizer.decode([token])
        # Alone, a token may lose its leading blank, and show bytes of a character as U+FFFD.
        possible = " " in self.last or "\ufffd" in text or any(c in text for c in self.last)
        return possible, len(text)
