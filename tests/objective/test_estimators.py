"""Every estimator of advantages against its loops; what groups of one, none and equals give."""

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmpo.errors import ConfigError, NonFiniteError, ShapeError
from hmpo.objective.advantages import group_advantages
from hmpo.objective.estimators import ESTIMATORS, estimate_advantages
from tests.oracles import advantages as oracle

SINGLE = [name for name in ESTIMATORS if name != "gdpo"]
REWARDS = [1.0, 0.0, 0.5, None, 1.0, 1.0, 0.25, None, None, 0.75, 0.0, 1.0, 0.0, 0.0]
GROUPS = [7, 7, 7, 7, 2, 2, 5, 5, 9, 7, 1, 1, 1, 3]
"""Group 7 of five with one dropped, 2 of equals, 5 left with one, 9 with none, 3 of one."""
LENGTHS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]


def loops(name, rewards, groups, lengths, ddof=1):
    every = oracle.repeated(rewards, rewards, lengths)
    batch = oracle.std(every, ddof) if len(every) > ddof else 0.0
    known = {
        "group_std": lambda: oracle.grpo(rewards, groups, ddof),
        "group": lambda: oracle.grpo(rewards, groups, scale="none"),
        "batch_std": lambda: oracle.grpo(rewards, groups, scale="batch", batch=batch),
        "rloo": lambda: oracle.rloo(rewards, groups),
        "reinforce_pp": lambda: oracle.reinforce_pp(rewards, lengths, ddof),
        "reinforce_pp_baseline": lambda: oracle.reinforce_pp_baseline(
            rewards, groups, lengths, ddof
        ),
        "max_rl": lambda: oracle.max_rl(rewards, groups),
        "pass_at_k": lambda: oracle.pass_at_k(rewards, groups, ddof),
    }
    return known[name]()


def tensors(rewards, groups):
    valid = torch.tensor([r is not None for r in rewards])
    values = torch.tensor([math.nan if r is None else r for r in rewards], dtype=torch.float64)
    return values, torch.tensor(groups), {"valid": valid}


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("name", SINGLE)
def test_estimator_equals_its_loops(name, weighed, ddof):
    rewards, groups, given = tensors(REWARDS, GROUPS)
    lengths = LENGTHS if weighed else [1] * len(LENGTHS)
    given |= {"lengths": torch.tensor(LENGTHS)} if weighed else {}
    found = estimate_advantages(rewards, groups, name, std_ddof=ddof, **given)
    expected = loops(name, REWARDS, GROUPS, lengths, ddof)
    assert found.values.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("by_tokens", [True, False])
def test_a_reward_of_no_weight_changes_nothing_in_gdpo(by_tokens: bool) -> None:
    first = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    second = torch.arange(8.0, dtype=torch.float64) % 3
    groups = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2])
    given = {"lengths": torch.tensor([3, 9, 2, 2, 7, 1, 5, 8])} if by_tokens else {}
    alone = estimate_advantages(first[:, None], groups, "gdpo", **given)
    both = estimate_advantages(
        torch.stack([first, second], 1), groups, "gdpo", weights=torch.tensor([1.0, 0.0]), **given
    )
    assert torch.equal(alone.values, both.values) and alone.values[2:5].tolist() == [0.0] * 3
    assert alone[1:] == both[1:] and both.equal == both.dead == 1


@pytest.mark.parametrize("weights", [None, [1.0, 0.25]])
def test_gdpo_equals_its_loops(weights):
    table = [[r, (i * 7) % 3 / 2] for i, r in enumerate(REWARDS)]
    table = [None if row[0] is None else row for row in table]
    _, groups, given = tensors(REWARDS, GROUPS)
    values = torch.tensor([[math.nan] * 2 if r is None else r for r in table]).double()
    shares = None if weights is None else torch.tensor(weights)
    lengths = torch.tensor(LENGTHS)
    found = estimate_advantages(values, groups, "gdpo", weights=shares, lengths=lengths, **given)
    expected = oracle.gdpo(table, GROUPS, weights or [1.0, 1.0], LENGTHS)
    assert found.values.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("name", SINGLE)
def test_silent_groups_are_counted(name):
    rewards, groups, given = tensors(REWARDS, GROUPS)
    found = estimate_advantages(rewards, groups, name, **given)
    assert (found.groups, found.equal, found.single, found.empty) == (6, 1, 2, 1)
    assert found.dropped == 3
    assert found.dead == (1 if name == "reinforce_pp" else 4)
    assert not found.values[~given["valid"]].any()
    for group in (2, 3, 5):
        assert bool(found.values[groups == group].any()) is (name == "reinforce_pp")


@pytest.mark.parametrize("name", SINGLE)
def test_a_batch_without_any_signal_is_all_zero(name):
    for rewards in ([0.3] * 6, [0.0] * 6, [None] * 6, [1e6, 1e6 + 1e-3] * 3):
        values, groups, given = tensors(rewards, [0, 0, 1, 1, 2, 2])
        found = estimate_advantages(values, groups, name, **given)
        assert found.values.isfinite().all()
        if rewards[0] != 1e6 or name not in ("reinforce_pp",):
            assert not found.values.any() and found.dead == 3


@given(
    rewards=st.lists(st.sampled_from([None, 0.0, 0.5, 1.0]), min_size=1, max_size=12),
    name=st.sampled_from(SINGLE),
    data=st.data(),
)
def test_order_and_names_of_groups_do_not_matter(rewards, name, data):
    count = len(rewards)
    groups = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    order = data.draw(st.permutations(range(count)))
    values, ids, given = tensors(rewards, groups)
    found = estimate_advantages(values, ids, name, **given).values
    place = torch.tensor(order)
    moved = estimate_advantages(
        values[place], 100 - 3 * ids[place], name, valid=given["valid"][place]
    ).values
    if name == "pass_at_k":  # of equal best ones the first is taken, and its lead is 0
        found, moved = (x.sort().values for x in (found, moved))
        place = torch.arange(count)
    torch.testing.assert_close(moved, found[place], rtol=1e-12, atol=1e-14)
    if name != "reinforce_pp":
        assert found.isfinite().all()


@pytest.mark.parametrize(("name", "scale"), [("group_std", "std"), ("group", "none")])
def test_equal_groups_are_what_the_trainer_has(name, scale):
    generator = torch.Generator().manual_seed(1)
    rewards = torch.rand(24, generator=generator, dtype=torch.float64).round(decimals=1)
    valid = torch.rand(24, generator=generator) > 0.2
    ours = group_advantages(rewards, 4, scale=scale, valid=valid)
    groups = torch.arange(24) // 4
    found = estimate_advantages(rewards, groups, name, valid=valid).values
    torch.testing.assert_close(found, ours, rtol=1e-13, atol=1e-15)


def test_what_cannot_be_estimated_is_refused():
    ids, one = torch.tensor([0, 0]), torch.tensor([1.0, 0.0])
    with pytest.raises(ConfigError, match="estimator: got 'gae', expected one of group_std"):
        inspect.unwrap(estimate_advantages)(one, ids, "gae")  # without the tests' type hook
    with pytest.raises(ConfigError, match='rewards: got -1, expected none below 0 for "max_rl"'):
        estimate_advantages(-one, ids, "max_rl")
    with pytest.raises(NonFiniteError, match=r"rows \[1\]"):
        estimate_advantages(torch.tensor([1.0, math.nan]), ids, "rloo")
    with pytest.raises(ShapeError, match=r"rewards: got \(2,\), expected \(N, K\)"):
        estimate_advantages(one, ids, "gdpo")
    with pytest.raises(ShapeError, match=r"rewards: got \(2, 1\), expected \(N,\)"):
        estimate_advantages(one[:, None], ids, "rloo")
