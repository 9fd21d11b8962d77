"""Rewards of form, counted in tokens: length, repetition, and a right answer by its length."""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from hmpo.errors import require
from hmpo.rewards import library
from hmpo.rewards.library.base import LibraryReward, require_column

CHECKS = ("boxed", "choice", "contains", "exact", "last_number", "math")
"""Functions of the library that say whether an answer is right."""


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


class CosineReward(LibraryReward):
    """A reward of being right that depends on the length; see `cosine`.

    Args:
        check: says which completions are right: above 0, or None where it does not apply.
        column: holds the answer.
        max_length: tokens at which the reward has come to its end.
        right: reward of a right answer at length 0 and at `max_length`.
        wrong: the same of a wrong one.
    """

    def __init__(
        self,
        check: LibraryReward,
        column: str,
        max_length: int,
        right: tuple[float, float],
        wrong: tuple[float, float],
    ) -> None:
        takes = [n for n in ("log_metric",) if n in inspect.signature(check).parameters]
        super().__init__("cosine", (column,), takes=("completion_ids", *takes))
        self.told = tuple(takes)
        self.check, self.max_length, self.right, self.wrong = check, max_length, right, wrong

    def prepare(self) -> None:
        """What the check loads."""
        self.check.prepare()

    def __call__(
        self,
        /,
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        prompts: Any = None,
        log_metric: Callable[..., Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """A reward for each completion; what the check counts is counted."""
        columns |= dict.fromkeys(self.told, log_metric)
        scores = self.check(completions=completions, **columns)
        return [
            None if score is None else self._at(len(ids), self.right if score > 0 else self.wrong)
            for score, ids in zip(scores, completion_ids, strict=True)
        ]

    def _at(self, length: int, ends: tuple[float, float]) -> float:
        share = min(length / self.max_length, 1.0)
        return ends[1] + 0.5 * (ends[0] - ends[1]) * (1 + math.cos(math.pi * share))


def cosine(
    *,
    max_length: int,
    check: str = "math",
    column: str = "answer",
    right_short: float = 1.0,
    right_long: float = 0.5,
    wrong_short: float = -1.0,
    wrong_long: float = -0.5,
) -> CosineReward:
    r"""Right answers lose by their length, wrong ones gain, along half a cosine.

    r(y) = b + (a - b) (1 + cos(pi |y| / L)) / 2, with a and b the rewards at lengths 0 and
    L = max_length of a right or a wrong answer, and b beyond L (Yeo et al., 2025, "Demystifying
    Long Chain-of-Thought Reasoning", app. C.1, without its penalty for exceeding L); TRL's
    `get_cosine_scaled_reward`.

    Args:
        max_length: L, in tokens.
        check: the function of the library that says what is right.
        column: holds the answer.
        right_short: reward of a right answer without length.
        right_long: of one of `max_length` tokens or more.
        wrong_short: reward of a wrong answer without length.
        wrong_long: of one of `max_length` tokens or more.
    """
    require(max_length >= 1, "reward cosine.max_length", max_length, "an integer >= 1")
    require(check in CHECKS, "reward cosine.check", check, f"one of {', '.join(CHECKS)}")
    require_column("cosine", column)
    values = {"right_short": right_short, "right_long": right_long}
    values |= {"wrong_short": wrong_short, "wrong_long": wrong_long}
    for name, value in values.items():
        require(abs(value) <= 1e9, f"reward cosine.{name}", value, "a finite number")
    checker = getattr(library, check)(column=column)
    ends = (right_short, right_long), (wrong_short, wrong_long)
    return CosineReward(checker, column, max_length, *ends)
