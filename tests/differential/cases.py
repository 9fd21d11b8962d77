"""The float64 batches every peer is compared on; the same numbers in every environment.

Eight responses of up to ten tokens: lengths 10, 7, 1, 4, 10 (with a hole in the mask), 6, 3, 10,
advantages of both signs and one that is 0.

    ragged      log ratios of about +-0.3, on both sides of every bound
    ties        log ratios exactly on the bounds +-ln 2 (ratios 1/2 and 2), and inside
    on_policy   all ratios 1
    large       +-80 nat where the clip of the surrogate catches it, -80 for either sign
    overflow    +80 nat also with a negative advantage, where only a dual clip catches it
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LENGTHS = (10, 7, 1, 4, 10, 6, 3, 10)
ADVANTAGES = (0.9, -1.3, 0.6, -0.7, 1.4, -0.4, 0.0, -1.1)
HOLE = (4, 3)
LN2 = math.log(2)


@dataclass(frozen=True)
class Case:
    """One batch: log-probs (N, T) under both policies, mask (N, T), advantages (N,)."""

    name: str
    new: Tensor
    old: Tensor
    mask: Tensor
    advantages: Tensor

    def rows(self, start: int, stop: int) -> "Case":
        """A micro-batch of these responses."""
        part = slice(start, stop)
        inside = self.new[part], self.old[part], self.mask[part], self.advantages[part]
        return Case(f"{self.name}[{start}:{stop}]", *inside)


def mask() -> Tensor:
    kept = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)
    kept[HOLE] = False
    return kept


def ragged() -> Case:
    generator = torch.Generator().manual_seed(7)
    kept = mask()
    old = -3 * torch.rand(kept.shape, generator=generator, dtype=torch.float64) - 0.1
    new = old + 0.3 * torch.randn(kept.shape, generator=generator, dtype=torch.float64)
    return Case("ragged", new, old, kept, torch.tensor(ADVANTAGES, dtype=torch.float64))


def ties() -> Case:
    """Differences of multiples of fl(ln 2) are exact, and exp(+-fl(ln 2)) rounds to 2 and 1/2.

    Whole responses on a bound (2, 3 and 6) are ties of the geometric mean, too.
    """
    base = ragged()
    old, new = base.old.clone(), base.new.clone()
    for row, column, up in [
        (0, 1, True),
        (0, 2, False),
        (1, 0, True),
        (1, 5, False),
        (7, 9, False),
    ]:
        _put_tie(old, new, (row, column), up)
    for row, up in [(2, True), (3, False), (6, True)]:
        _put_tie(old, new, (row, slice(None)), up)
    return Case("ties", new, old, base.mask, base.advantages)


def _put_tie(old: Tensor, new: Tensor, where: tuple, up: bool) -> None:
    old[where], new[where] = (-2 * LN2, -LN2) if up else (-LN2, -2 * LN2)


def on_policy() -> Case:
    base = ragged()
    return Case("on_policy", base.new, base.new.clone(), base.mask, base.advantages)


def large() -> Case:
    base = ragged()
    old, new = base.old.clone(), base.new.clone()
    for where in [(0, 4), (2, 0), (4, 0)]:
        assert base.advantages[where[0]] > 0
        old[where], new[where] = -81.0, -1.0
    for where in [(0, 0), (1, 2), (3, 3), (4, 9), (7, 0)]:
        old[where], new[where] = -1.0, -81.0
    return Case("large", new, old, base.mask, base.advantages)


def overflow() -> Case:
    base = large()
    old, new = base.old.clone(), base.new.clone()
    for where in [(1, 0), (5, 5)]:
        assert base.advantages[where[0]] < 0
        old[where], new[where] = -81.0, -1.0
    return Case("overflow", new, old, base.mask, base.advantages)


def with_empty_row() -> Case:
    """`ragged` with a last response of no tokens at all."""
    base = ragged()
    kept = base.mask.clone()
    kept[-1] = False
    return Case("empty_row", base.new, base.old, kept, base.advantages)


def dual_tie() -> Case:
    """A ratio of exactly 2 with A < 0, and one of 1."""
    old = torch.full((1, 2), -2 * LN2, dtype=torch.float64)
    new = old.clone()
    new[0, 0] = -LN2
    kept = torch.ones(1, 2, dtype=torch.bool)
    return Case("dual_tie", new, old, kept, -torch.ones(1, dtype=torch.float64))


BY_NAME = {make().name: make for make in (ragged, ties, on_policy, large, overflow)}
