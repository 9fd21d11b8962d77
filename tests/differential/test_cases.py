"""The batches hold what they promise, and the comparison can fail."""

import dataclasses
import math

import pytest

from hmpo import members
from tests.differential import cases, compare, peer_oracle
from tests.differential.cases import LN2
from tests.differential.compare import Comparison


def test_batches_are_ragged_with_a_hole_both_signs_and_a_zero():
    case = cases.ragged()
    lengths = list(cases.LENGTHS)
    lengths[cases.HOLE[0]] -= 1
    assert case.mask.sum(1).tolist() == lengths and case.mask.shape == (8, 10)
    signs = case.advantages.sign().tolist()
    assert {-1.0, 0.0, 1.0} == set(signs)
    assert all(make().new.dtype == case.advantages.dtype for make in cases.BY_NAME.values())


def test_ties_are_exact_for_tokens_and_for_means():
    case = cases.ties()
    d = case.new - case.old
    for bound in (LN2, -LN2):
        assert (d[case.mask] == bound).sum() >= 5
    assert d[d == LN2].exp().le(2).all() and d[d == -LN2].exp().ge(0.5).all()
    config = compare.on_case(members.grpo(), "ties")
    assert config.log_bounds == (-LN2, LN2)
    for row in (2, 3, 6):
        assert abs((d[row][case.mask[row]].sum() / case.mask[row].sum()).item()) == LN2


def test_log_ratios_reach_80_on_both_sides():
    d = (cases.large().new - cases.large().old)[cases.large().mask]
    assert d.max() == 80 and d.min() == -80
    case = cases.overflow()
    negative = (case.new - case.old)[case.advantages < 0]
    assert negative.max() == 80


REDUCTIONS = {"token_mean": "sequence_mean", "sequence_mean": "token_mean"}


@pytest.mark.parametrize("comparison", peer_oracle.COMPARISONS, ids=lambda c: c.name)
def test_another_setting_does_not_pass(comparison):
    """A comparison with a slightly other bound, temperature or weight is seen by it."""
    config = comparison.ours
    if config.gate == "soft":
        other = dataclasses.replace(config, gate_negative=config.gate_negative + 1e-5)
    elif config.token_clamp is not None:
        other = dataclasses.replace(config, token_clamp=config.token_clamp * 1.05)
    elif config.proximal_coef > 0:
        other = dataclasses.replace(config, proximal_coef=config.proximal_coef * 1.05)
    elif not config.has_mean:
        other = dataclasses.replace(config, reduction=REDUCTIONS[config.reduction])
    else:
        other = dataclasses.replace(config, clip_high=config.clip_high * 1.05)
    moved = dataclasses.replace(comparison, ours=other, theirs=given(comparison, config))
    row = compare.measure(moved)
    assert row["loss"] > compare.LOSS_TOLERANCE


def given(comparison: Comparison, config):
    """The peer with the bounds of `config`, whatever it is handed."""
    return lambda case, _: comparison.theirs(case, compare.on_case(config, case.name))


def test_difference_of_a_gradient_alone_is_seen():
    """A constant added to the loss leaves the gradient; a scaled gradient leaves the loss."""

    def scaled(case, config):
        loss, gradient = peer_oracle.GRPO(case, config)
        return loss, gradient * (1 + 1e-6)

    row = compare.measure(Comparison("grpo", members.grpo(), "scaled", scaled))
    assert row["gradient"] > compare.GRADIENT_TOLERANCE
    assert row["loss"] < compare.LOSS_TOLERANCE and math.isfinite(row["loss"])
