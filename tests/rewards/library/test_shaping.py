"""length and repetition: against loops over tokens, and against TRL's own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmpo.errors import ConfigError
from hmpo.rewards.library import length, repetition
from tests.oracles import rewards as oracle


@given(st.integers(0, 40), st.integers(1, 30), st.integers(0, 30))
def test_length_is_the_soft_overlong_punishment(tokens, longest, cache):
    cache = min(cache, longest)
    found = length(max_length=longest, cache=cache)(completion_ids=[[7] * tokens])
    assert found == [pytest.approx(oracle.overlong(tokens, longest, cache))]


@given(st.lists(st.integers(0, 3), max_size=20), st.integers(1, 4), st.floats(-5, 0))
def test_repetition_is_the_share_of_n_grams_seen_before(ids, n, most):
    found = repetition(n=n, max_penalty=most)(completion_ids=[ids])
    assert found == [pytest.approx(oracle.repetition(ids, n, most))]


def test_both_are_those_of_trl():
    rewards = pytest.importorskip("trl.rewards")
    rows = [[], [1], [1, 2, 1, 2, 1, 2], [5] * 30, list(range(90)), list(range(101))]
    theirs = rewards.get_soft_overlong_punishment(100, 20)(completion_ids=rows)
    assert length(max_length=100, cache=20)(completion_ids=rows) == theirs
    theirs = rewards.get_repetition_penalty_reward(2, -1.0)(completion_ids=rows)
    assert repetition(n=2)(completion_ids=rows) == theirs


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: length(max_length=0, cache=0), "length.max_length: got 0"),
        (lambda: length(max_length=5, cache=6), "length.cache: got 6"),
        (lambda: repetition(n=0), "repetition.n: got 0"),
        (lambda: repetition(max_penalty=0.5), "repetition.max_penalty: got 0.5"),
    ],
)
def test_an_option_out_of_range_is_one_line(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
