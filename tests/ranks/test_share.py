"""Pieces dealt to ranks: each to one, and no rank with much more than it must have."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmpo.errors import ConfigError
from hmpo.ranks.share import dealt
from hmpo.ranks.world import Ranks

COSTS = st.lists(st.integers(0, 50), max_size=7)


@given(COSTS, st.integers(1, 4))
def test_each_piece_is_dealt_to_one_rank(costs: list[int], ranks: int) -> None:
    shares = dealt(costs, ranks)
    assert len(shares) == ranks
    assert sorted(itertools.chain(*shares)) == list(range(len(costs)))
    assert all(share == sorted(share) for share in shares)


@given(COSTS, st.integers(1, 3))
def test_no_rank_has_more_than_four_thirds_of_what_the_best_division_gives(
    costs: list[int], ranks: int
) -> None:
    best = min(
        max(sum(c for c, own in zip(costs, owners) if own == r) for r in range(ranks))
        for owners in itertools.product(range(ranks), repeat=len(costs))
    )
    worst = max(sum(costs[i] for i in share) for share in dealt(costs, ranks))
    assert 3 * ranks * worst <= (4 * ranks - 1) * best


def test_equal_pieces_are_dealt_evenly() -> None:
    assert [len(share) for share in dealt([1.0] * 10, 4)] == [3, 3, 2, 2]
    assert dealt([0.0] * 4, 2) == [[0, 2], [1, 3]]


def test_a_process_alone_has_every_piece() -> None:
    assert Ranks().own([3.0, 1.0, 2.0]) == [0, 1, 2]
    assert [Ranks(rank=r, size=2).own([3.0, 1.0, 2.0]) for r in (0, 1)] == [[0], [1, 2]]


def test_no_rank_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="ranks: got 0, expected an integer >= 1"):
        dealt([1.0], 0)
