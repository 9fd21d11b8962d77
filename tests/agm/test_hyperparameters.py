"""The KL budget and its multipliers: bounds, dwell, rollback, propose and commit."""

import math
import random
import statistics
from itertools import pairwise

import pytest

from hmpo.agm import AdapterConfig, AGMHyperparameterAdapter
from hmpo.errors import ConfigError
from tests.agm.streams import autocorrelated, step

TARGET = 2e-2


def record(number, gap=TARGET, reward=0.5, regime="normal_learning", **fields):
    base = {"ratio/log_gap_mean": gap, "reward/mean": reward, "decision/regime": regime}
    return step(number, **base, **fields)


def plant(scale, n=300, seed=0, config=None):
    """A run whose gap is `scale` * target * lr_mult^2, with noise of 0.3 nat."""
    adapter, rng = (
        AGMHyperparameterAdapter(config or AdapterConfig(lr_high=2.0)),
        random.Random(seed),
    )
    gaps, factors, lr = [], [], 1.0
    for i in range(n):
        gaps.append(scale * TARGET * lr**2 * math.exp(0.3 * rng.gauss(0, 1)))
        decision = adapter.update(record(i, gaps[-1], 0.5 + 0.02 * rng.gauss(0, 1)))
        lr = decision["lr_mult"]
        adapter.commit(decision)
        factors.append(lr)
    return gaps, factors


@pytest.mark.parametrize("scale", [0.35, 1.0, 3.0, 8.0])
def test_budget_is_met_and_held(scale):
    gaps, factors = plant(scale)
    assert 0.5 < statistics.median(gaps[100:]) / TARGET < 1.6
    late = factors[100:]
    changes = sum(a != b for a, b in pairwise(late))
    assert changes <= 12


def test_unreachable_budget_ends_at_the_bound():
    assert plant(1e4)[1][-1] == 0.25
    assert plant(1e-4)[1][-1] == 2.0
    assert plant(1e-4, config=AdapterConfig())[1][-1] == 1.0  # a ceiling by default


def test_steady_state_keeps_base_lr():
    adapter = AGMHyperparameterAdapter()
    for i, x in enumerate(autocorrelated(random.Random(0), 0.5, 0.1, 300)):
        decision = adapter.update(record(i, TARGET * math.exp(x)))
        adapter.commit(decision)
        assert decision["lr_mult"] == 1.0


def test_a_change_is_limited_and_waits():
    _, factors = plant(4.0)
    changes = [i for i in range(1, 300) if factors[i] != factors[i - 1]]
    assert all(b - a >= 5 for a, b in pairwise(changes))
    for i in changes:
        assert 1 / 1.25 - 1e-12 <= factors[i] / factors[i - 1] <= 1.25 + 1e-12


def test_eps_not_widened_on_dispersion():
    config = AdapterConfig(controls=("lr", "eps"), base_eps=0.2)
    adapter = AGMHyperparameterAdapter(config)
    for i in range(30):
        adapter.commit(adapter.update(record(i, **{"ratio/d_var": 1e-3})))
    for i in range(30, 120):
        decision = adapter.update(record(i, regime="unstable", **{"ratio/d_var": 1e-1}))
        adapter.commit(decision)
        assert decision["eps_mult"] <= 1.0 and decision["eps"] <= 0.2


def test_eps_follows_the_spread_of_a_calm_run():
    config = AdapterConfig(controls=("lr", "eps"), base_eps=0.2)
    adapter = AGMHyperparameterAdapter(config)
    for i in range(60):
        decision = adapter.update(record(i, **{"ratio/d_var": 1e-3 if i < 20 else 2.25e-3}))
        adapter.commit(decision)
    assert decision["eps"] == pytest.approx(0.2 * 1.5)


def test_batch_is_integer_multiple():
    config = AdapterConfig(controls=("lr", "batch"), base_batch=96, batch_unit=12)
    adapter, batches = AGMHyperparameterAdapter(config), []
    for i in range(200):
        regime = "unstable" if 20 <= i < 60 else "normal_learning"
        decision = adapter.update(record(i, regime=regime))
        adapter.commit(decision)
        batches.append(decision["batch"])
    assert all(isinstance(batch, int) and batch % 12 == 0 for batch in batches)
    assert min(batches) == 96 and 96 * 1.25 <= max(batches) <= 96 * 4
    assert batches[-1] == 96


def test_emergency_halves_once_and_rests():
    adapter, factors = AGMHyperparameterAdapter(), []
    for i in range(40):
        decision = adapter.update(record(i, regime="unstable"))
        adapter.commit(decision)
        factors.append((decision.reason, decision["lr_mult"]))
    assert factors[0] == ("emergency", 0.5)
    assert set(factors[1:]) == {("cooldown", 0.5)}


def test_far_over_budget_is_cut_at_once_and_again():
    adapter, factors = AGMHyperparameterAdapter(), []
    for i in range(30):
        decision = adapter.update(record(i, gap=11 * TARGET))
        adapter.commit(decision)
        factors.append(decision["lr_mult"])
    assert factors[:6] == [0.5] * 5 + [0.25] and set(factors[6:]) == {0.25}


def test_nan_storm_skips_and_keeps_its_bounds():
    adapter = AGMHyperparameterAdapter()
    for i in range(400):
        decision = adapter.update(record(i, gap=math.nan, reward=math.nan, nonfinite=3))
        adapter.commit(decision)
        assert decision["skip_update"] and 0.25 <= decision["lr_mult"] <= 1.0
    assert adapter.counts["nonfinite"] == 400 and len(adapter.gaps) == 0


def raised_and_falling(commit=True):
    """A learning rate that was raised, after which the rewards fall."""
    rng = random.Random(2)
    adapter, decisions = AGMHyperparameterAdapter(AdapterConfig(lr_high=2.0)), []
    for i in range(130):
        gap = TARGET if i < 40 else (TARGET / 3 if i < 60 else TARGET)
        reward = 0.6 + 0.01 * rng.gauss(0, 1) - (0.01 * (i - 55) if i > 55 else 0)
        decisions.append(adapter.update(record(i, gap, reward)))
        if commit:
            adapter.commit(decisions[-1])
    return adapter, decisions


def test_rollback_restores_previous():
    _, decisions = raised_and_falling()
    at = [decision.reason for decision in decisions].index("rollback")
    assert decisions[at - 1]["lr_mult"] > 1.0
    assert decisions[at]["lr_mult"] == 1.0
    assert {d["lr_mult"] for d in decisions[at : at + 50]} == {1.0}
    assert {d.reason for d in decisions[at + 1 : at + 50]} == {"cooldown"}


def test_blocked_proposal_leaves_state():
    adapter, decisions = raised_and_falling(commit=False)
    assert max(d["lr_mult"] for d in decisions) == pytest.approx(1.25)  # never further
    assert adapter.lr.value == 1.0
    assert "rollback" not in {d.reason for d in decisions}


def test_state_follows_what_was_applied():
    adapter = AGMHyperparameterAdapter()
    decision = adapter.update(record(0, regime="unstable"))
    adapter.commit(decision, {"decision/lr_mult": 0.8})
    assert adapter.update(record(1))["lr_mult"] == 0.8


def test_commit_refuses_what_is_not_the_latest_or_no_factor():
    adapter = AGMHyperparameterAdapter()
    first = adapter.update(record(0))
    adapter.update(record(1))
    with pytest.raises(ConfigError, match="got the decision of step 0, expected that of step 1"):
        adapter.commit(first)
    with pytest.raises(ConfigError, match="lr_mult: got nan"):
        adapter.commit(adapter.update(record(2)), {"decision/lr_mult": math.nan})


def test_p_is_led_to_its_target_by_a_tenth():
    adapter, p = AGMHyperparameterAdapter(AdapterConfig(controls=("lr", "p"))), -1.0
    for i in range(30):
        decision = adapter.update(record(i, **{"ratio/p": p, "decision/p_target": 0.6}))
        assert abs(decision["p"] - p) <= 0.1 + 1e-12
        p = decision["p"]
    assert p == 0.6
