"""The cosine within a response: the slow loop, where its formula holds, and where it cannot."""

import dataclasses
import math

import pytest
import torch

from hmpo.lab.probe.measures import expected_cosine, token_sigma
from hmpo.lab.probe.prediction import (
    excess_kurtosis,
    row_sigmas,
    within_cosines,
    within_responses,
)
from tests.lab.probe.recorded import recorded, rows_of
from tests.oracles import token_weights as oracle

EXPONENTS = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)


@pytest.mark.parametrize("p", [*EXPONENTS, 0.0])
def test_the_cosine_within_responses_is_that_of_the_slow_loop(p: float) -> None:
    batch = recorded(2, rows=12, sigma=0.7)
    d, _ = rows_of(batch)
    cosines = [oracle.within(row, p) for row in d]
    sigmas = [oracle.own_sigma(row) for row in d]
    assert within_cosines(batch, p).tolist() == pytest.approx(cosines, rel=1e-12)
    assert row_sigmas(batch).tolist() == pytest.approx(sigmas, rel=1e-12)
    found = within_responses(batch, p)
    assert found.cosine == pytest.approx(sum(cosines) / len(d), rel=1e-12)
    own = [math.exp(-(p**2) * s**2 / 2) for s in sigmas]
    assert found.own == pytest.approx(sum(own) / len(d), rel=1e-12)
    assert found.pooled == expected_cosine(p, 0.0, token_sigma(batch))


@pytest.mark.parametrize("p", EXPONENTS)
def test_for_long_responses_of_normal_log_ratios_the_formula_holds(p: float) -> None:
    batch = recorded(rows=40, length=1000, sigma=0.3)
    found = within_responses(batch, p)
    assert found.cosine == pytest.approx(found.own, abs=0.01)
    assert found.cosine == pytest.approx(found.pooled, abs=0.01)
    assert abs(excess_kurtosis(batch)) < 0.2


def test_spreads_that_differ_take_the_mean_above_the_pooled_formula() -> None:
    """Jensen: exp(-x) is convex, and the pooled variance is the mean of the responses' own."""
    mask = torch.ones(40, 1000, dtype=torch.bool)
    noise = torch.randn(40, 1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    d = torch.linspace(0.0, 1.0, 40, dtype=torch.float64)[:, None] * noise
    batch = recorded(
        rows=40, mask=mask, old_logprobs=d * 0, logprobs=d, advantages=torch.ones(40),
        rewards=None,
    )  # fmt: skip
    found = within_responses(batch, 2.0)
    assert found.own > found.pooled + 0.05
    assert abs(found.cosine - found.own) < (found.own - found.pooled) / 2


def test_one_large_log_ratio_is_a_tail_that_the_formula_does_not_see() -> None:
    mask = torch.ones(1, 100, dtype=torch.bool)
    d = torch.zeros(1, 100, dtype=torch.float64)
    d[0, 0] = 3.0
    batch = recorded(
        rows=1, mask=mask, old_logprobs=d * 0, logprobs=d, advantages=torch.ones(1),
        rewards=None,
    )  # fmt: skip
    assert excess_kurtosis(batch) > 90
    up, down = within_responses(batch, 1.0), within_responses(batch, -1.0)
    assert up.own == down.own, "the formula does not know the sign of p"
    assert up.cosine < up.own - 0.3, "exp(3) of 100 tokens takes most of the weight"
    assert down.cosine > down.own, "exp(-3) takes none"


def test_a_constant_shift_of_a_response_changes_nothing_within_it() -> None:
    batch = recorded(3)
    shift = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    moved = dataclasses.replace(batch, logprobs=batch.logprobs + shift)
    for p in EXPONENTS:
        before, after = within_responses(batch, p), within_responses(moved, p)
        assert after.cosine == pytest.approx(before.cosine, rel=1e-9)
        assert after.own == pytest.approx(before.own, rel=1e-9)
        assert after.pooled < before.pooled, "the pooled sigma holds the shifts"


def test_no_token_and_no_spread_give_no_figure() -> None:
    empty = recorded(mask=torch.zeros(9, 12, dtype=torch.bool))
    found = within_responses(empty, 1.0)
    assert found.cosine is None and found.own is None and found.pooled == 1.0
    assert excess_kurtosis(empty) is None
    still = recorded(sigma=0.0)
    assert excess_kurtosis(still) is None and within_responses(still, 2.0).cosine == 1.0
