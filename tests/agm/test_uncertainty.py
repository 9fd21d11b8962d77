"""Uncertainty in [0, 1], and a gate that closes on what is unusual."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmpo.agm import AGMUncertaintyEstimator
from hmpo.agm.uncertainty import decompose, reliability
from tests.agm.streams import step

UNIT = st.floats(0, 1)


@given(st.floats(0, 1e3), st.floats(0, 1e3), st.floats(0, 1), st.integers(0, 512))
def test_total_uncertainty_bounded(within, total, ess, responses):
    a, e, _ = decompose(within, total, ess, responses)
    assert 0 <= a <= 1 and 0 <= e <= 1
    assert 0 <= 1 - (1 - a) * (1 - e) <= 1


def test_parts_follow_the_law_of_total_variance():
    rng, prompts, per = random.Random(0), 400, 8
    rows = [
        [m + rng.gauss(0, 0.3) for _ in range(per)]
        for m in (rng.gauss(0, 0.4) for _ in range(prompts))
    ]
    means = [sum(row) / per for row in rows]
    within = (
        sum(sum((x - m) ** 2 for x in row) / (per - 1) for row, m in zip(rows, means)) / prompts
    )
    grand = sum(means) / prompts
    total = sum((x - grand) ** 2 for row in rows for x in row) / (prompts * per - 1)
    a, e, reason = decompose(within, total, ess=1.0, responses=prompts * per)
    assert a == pytest.approx(0.09 / 0.25, abs=0.03)
    assert e == pytest.approx(0.5 / math.sqrt(3200) / (0.5 / math.sqrt(3200) + 0.4), abs=0.005)
    assert reason == "usual"


def test_stale_weights_are_epistemic():
    assert decompose(0.1, 0.25, 0.2, 512)[1] == pytest.approx(0.8)
    assert decompose(0.0, 0.0, 0.7, 64) == (0.0, pytest.approx(0.3), "equal_rewards")


def follow(sizes):
    estimator = AGMUncertaintyEstimator()
    return [estimator.update(step(i, **{"ratio/ess_seq": x})) for i, x in enumerate(sizes)]


def test_gate_closes_on_an_unusual_batch_and_opens_again():
    rng = random.Random(0)
    sizes = [0.9 + 0.02 * rng.random() for _ in range(120)]
    sizes[60:64] = [0.1] * 4
    gates = [decision["gate"] for decision in follow(sizes)]
    assert not any(gates[:61]) and gates[61]
    assert all(gates[61:71]) and not any(gates[85:])


def test_gate_stays_open_for_the_first_batches():
    assert not any(d["gate"] for d in follow([0.9 - 0.04 * i for i in range(20)]))


def test_constant_batches_are_not_unusual():
    assert not any(d["gate"] for d in follow([0.9] * 300))


def test_reliability_shows_whether_changes_go_with_uncertainty():
    rng = random.Random(0)
    told = [rng.random() for _ in range(400)]
    good = reliability(told, [abs(rng.gauss(0, u)) for u in told])
    assert [row[2] for row in good] == [100] * 4
    assert [row[1] for row in good] == sorted(row[1] for row in good)
    with pytest.raises(ValueError, match="got 2 uncertainties and 2 changes"):
        reliability([0.1, 0.2], [0.1, 0.2])
