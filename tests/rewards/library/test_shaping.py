"""length, repetition and cosine: against loops over tokens, and against TRL's own."""

import inspect
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmpo.errors import ConfigError
from hmpo.rewards.library import cosine, length, repetition
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


@given(st.integers(0, 40), st.integers(1, 30), st.sampled_from(["7", "8", None]))
def test_cosine_goes_from_short_to_long(tokens, longest, answer):
    values = {"right_short": 2.0, "right_long": -1.0, "wrong_short": 0.25, "wrong_long": 0.5}
    reward = cosine(max_length=longest, check="exact", **values)
    found = reward(completions=["7"], completion_ids=[[7] * tokens], answer=[answer])
    right = None if answer is None else answer == "7"
    ends = (2.0, -1.0) if right else (0.25, 0.5)
    assert found == [pytest.approx(oracle.cosine(right, tokens, longest, ends))]


def test_cosine_counts_what_its_check_counts() -> None:
    pytest.importorskip("math_verify")
    told: dict[str, float] = {}
    reward = cosine(max_length=50, check="math")
    assert reward(
        completions=["7"], completion_ids=[[1]], answer=["7"], log_metric=told.__setitem__
    ) == [pytest.approx(1.0, abs=1e-3)]
    assert told == {"math/timeouts": 0}
    plain = inspect.signature(cosine(max_length=50, check="exact"))
    assert "log_metric" not in plain.parameters, "exact counts nothing"


def test_cosine_is_that_of_trl():
    rewards = pytest.importorskip("trl.rewards")
    pytest.importorskip("math_verify")
    texts = [r"\boxed{\frac{1}{3}}", r"\boxed{\frac{1}{2}}", r"\boxed{0.5}"]
    answers, ids = [r"\frac{1}{3}"] * 3, [[1] * 50, [1] * 7, [1] * 150]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    theirs = rewards.get_cosine_scaled_reward(100)(messages, answers, ids)
    reward = cosine(max_length=100, column="solution")
    found = reward(completions=messages, completion_ids=ids, solution=answers)
    assert found == pytest.approx(theirs)
    again = pickle.loads(pickle.dumps(reward))
    assert again(completions=messages, completion_ids=ids, solution=answers) == found


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: length(max_length=0, cache=0), "length.max_length: got 0"),
        (lambda: length(max_length=5, cache=6), "length.cache: got 6"),
        (lambda: cosine(max_length=0), "cosine.max_length: got 0"),
        (lambda: cosine(max_length=9, check="judge"), "cosine.check: got 'judge'"),
        (lambda: cosine(max_length=9, right_long=1e99), "cosine.right_long: got 1e"),
        (lambda: repetition(n=0), "repetition.n: got 0"),
        (lambda: repetition(max_penalty=0.5), "repetition.max_penalty: got 0.5"),
    ],
)
def test_an_option_out_of_range_is_one_line(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
