"""Rewards of form that need no answer: length and repetition, both counted in tokens."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from hmpo.errors import require
from hmpo.rewards.library.base import LibraryReward


class TokenReward(LibraryReward):
    """A reward of the token ids of one completion at a time.

    Args:
        name: `__name__`.
        score: token ids -> reward.
    """

    def __init__(self, name: str, score: Callable[[Sequence[int]], float]) -> None:
        super().__init__(name, takes=("completion_ids",))
        self.score = score

    def __call__(
        self, /, completion_ids: Sequence[Sequence[int]], prompts: Any = None, **columns: Any
    ) -> list[float | None]:
        """A reward for each completion."""
        return [self.score(ids) for ids in completion_ids]


def length(*, max_length: int, cache: int) -> TokenReward:
    r"""0 up to max_length - cache tokens, falling to -1 at max_length; -1 beyond.

    The soft overlong punishment of DAPO (Yu et al., 2025, eq. 13), with L = max_length, C = cache:
    r(y) = 0 for |y| <= L - C, (L - C - |y|) / C for L - C < |y| <= L, -1 for |y| > L.

    Args:
        max_length: tokens from which the whole penalty is due.
        cache: tokens before that over which it grows; 0 lets it begin at once.
    """
    require(max_length >= 1, "reward length.max_length", max_length, "an integer >= 1")
    fits = 0 <= cache <= max_length
    require(fits, "reward length.cache", cache, f"an integer from 0 to max_length = {max_length}")
    return TokenReward("length", partial(_length, max_length=max_length, cache=cache))


def _length(ids: Sequence[int], *, max_length: int, cache: int) -> float:
    over = len(ids) - (max_length - cache)
    return -1.0 if len(ids) > max_length else -max(over, 0) / max(cache, 1) + 0.0


def repetition(*, n: int = 3, max_penalty: float = -1.0) -> TokenReward:
    r"""max_penalty times the share of n-grams of tokens that have been there before.

    Yeo et al. (2025, "Demystifying Long Chain-of-Thought Reasoning", app. C.2) as TRL computes it:
    r(y) = (1 - distinct n-grams / all n-grams) max_penalty; 0 for fewer than n tokens.

    Args:
        n: tokens of an n-gram.
        max_penalty: what a text of one n-gram only comes near to; at most 0.
    """
    require(n >= 1, "reward repetition.n", n, "an integer >= 1")
    fits = -1e9 <= max_penalty <= 0
    require(fits, "reward repetition.max_penalty", max_penalty, "a number <= 0")
    return TokenReward("repetition", partial(_repetition, n=n, max_penalty=max_penalty))


def _repetition(ids: Sequence[int], *, n: int, max_penalty: float) -> float:
    ids = tuple(ids)
    total = len(ids) - n + 1
    if total < 1:
        return 0.0
    distinct = len({ids[i : i + n] for i in range(total)})
    return (1 - distinct / total) * max_penalty + 0.0
