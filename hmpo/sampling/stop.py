"""Stop strings of several tokens: whether a response's newest token completes one.

A token can complete a stop string only if the string's last character comes with it, so a
dictionary answers for nearly all tokens. The rest are decoded together with as many tokens
before them as the longest stop string may need.
"""

from collections.abc import Sequence
from typing import Any

MARGIN = 12
"""Characters at the start of a decoded tail that may differ from those of the whole response: a
leading blank that is stripped, bytes of a character that was cut in two."""


class StopStrings:
    """Watches the rows of one rollout."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], rows: int) -> None:
        """Watch `rows` responses for any of the strings `stop`."""
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.longest = max(map(len, self.stop))
        self.last = {text[-1] for text in self.stop}
        self.special = frozenset(tokenizer.all_special_ids)
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self._known: dict[int, tuple[bool, int]] = {}

    def completes(self, row: int, token: int) -> bool:
        """Whether `token`, the next one of `row`, makes its text hold a stop string.

        The text is that of the response without special tokens. A row is asked for its tokens in
        turn, and no longer once the answer was yes.
        """
        if token in self.special:
            return False
        tokens = self.tokens[row]
        tokens.append(token)
        if token not in self._known:
            self._known[token] = self._describe(token)
        possible, length = self._known[token]
        if not possible:
            return False
        enough = self.longest + length + MARGIN
        count = enough
        while True:
            tail = self.tokenizer.decode(tokens[-count:], skip_special_tokens=True)
            if len(tail) >= enough or count >= len(tokens):
                return any(text in tail for text in self.stop)
            count *= 2

    def _describe(self, token: int) -> tuple[bool, int]:
        """(whether the token may bring the last character of a stop string, its length)."""
        text = self.tokenizer.decode([token])
        # Alone, a token may lose its leading blank, and show bytes of a character as U+FFFD.
        possible = " " in self.last or "\ufffd" in text or any(c in text for c in self.last)
        return possible, len(text)
