"""What is told of a gradient beside its angles: spread by sign, what clips take, causes."""

import dataclasses
import math

import pytest
import torch

from hmpo.config import members
from hmpo.lab.probe.directions import token_direction
from hmpo.lab.probe.measures import EDGES, measure_parts, measure_spreads, token_sigma
from hmpo.lab.probe.variants import Variant, plain
from hmpo.objective.metrics import objective_metrics
from tests.lab.probe.recorded import recorded, rows_of
from tests.oracles import token_weights as oracle


def variant(objective) -> Variant:
    return Variant(name=objective.name, kind="member", objective=objective)


@pytest.mark.parametrize("p", [-2.0, 0.0, 1.0])
@pytest.mark.parametrize("clip", [None, 0.4])
def test_sizes_and_entropies_are_those_of_the_slow_loop(p: float, clip: float | None) -> None:
    batch = recorded(3, rows=12)
    found = measure_spreads(batch, token_direction(batch, variant(plain(p, clip))))
    d, a = rows_of(batch)
    gradients = oracle.direction(d, a, p, clip)
    for name, sign in (("positive", 1), ("negative", -1)):
        rows = [g for g, adv in zip(gradients, a, strict=True) if adv * sign > 0]
        moving = [oracle.spread(row) for row in rows if any(row)]
        zeros = [v == 0 for row in rows for v in row]
        mine = found[name]
        assert mine.rows == len(rows)
        assert mine.ess == pytest.approx(sum(s for s, _ in moving) / len(moving), rel=1e-12)
        assert mine.entropy == pytest.approx(sum(e for _, e in moving) / len(moving), rel=1e-12)
        assert mine.clipped == pytest.approx(sum(zeros) / len(zeros), abs=1e-15)
        assert mine.silent == pytest.approx(1 - len(moving) / len(rows), abs=1e-15)
        counts = [0] * (len(EDGES) - 1)
        for row in rows:
            for v in filter(None, row):
                share = abs(v) * len(row) / sum(map(abs, row))
                counts[min(16, max(-16, math.floor(4 * math.log2(share) + 0.5))) + 16] += 1
        assert list(mine.histogram) == counts


def test_the_spread_of_normal_ratios_has_the_size_that_theory_gives() -> None:
    sigma, ones = 0.4, torch.ones(1, dtype=torch.float64)
    batch = recorded(0, rows=1, length=100_000, sigma=sigma, advantages=ones)
    for p in (-1.0, 0.5, 1.0):
        found = measure_spreads(batch, token_direction(batch, variant(plain(p))))["positive"]
        assert found.ess == pytest.approx(math.exp(-(p**2) * sigma**2), rel=0.02)
    assert token_sigma(batch) == pytest.approx(sigma, rel=0.02)


def test_shares_of_clipped_tokens_are_those_that_a_run_logs() -> None:
    batch = recorded(5)
    for objective in (members.grpo(), members.hmpo(), members.gspo()):
        found = measure_spreads(batch, token_direction(batch, variant(objective)))
        logged = objective_metrics(
            batch.logprobs, batch.old_logprobs, batch.mask, batch.advantages, objective
        )
        units = "silent" if objective.clip_level == "sequence" else "clipped"
        for sign, name in (("positive", "clip/frac_pos"), ("negative", "clip/frac_neg")):
            share = getattr(found[sign], units)
            rounding = 1e-7  # the log divides in float32
            assert share == pytest.approx(float(logged[name]), abs=rounding), (objective.name, sign)


def test_no_response_of_a_sign_gives_none() -> None:
    batch = recorded(0)
    batch = dataclasses.replace(batch, advantages=batch.advantages.abs())
    found = measure_spreads(batch, token_direction(batch, variant(plain(1.0))))
    assert found["negative"].rows == 0 and found["negative"].ess is None
    assert found["positive"].ess is not None


def test_causes_are_told_apart() -> None:
    batch = recorded(1)
    gspo = measure_parts(batch, variant(members.gspo()))
    assert gspo.mean == 0 and gspo.responses == 0 and gspo.clip is not None and gspo.clip > 0.01
    hmpo = measure_parts(batch, variant(members.hmpo()))
    assert hmpo.mean is not None and hmpo.mean > 1e-3 and hmpo.responses == 0
    dapo, grpo = (measure_parts(batch, variant(m)) for m in (members.dapo(), members.grpo()))
    assert dapo.mean == grpo.mean and dapo.responses is not None and dapo.responses > 1e-3
    sapo = measure_parts(batch, variant(members.sapo()))
    assert sapo.mean == grpo.mean and sapo.clip is not None and sapo.clip > 1e-4
    wide = dataclasses.replace(members.gspo(), clip_low=0.999, clip_high=1e5)
    assert measure_parts(batch, variant(wide)).clip == 0
