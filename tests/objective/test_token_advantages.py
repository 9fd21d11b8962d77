"""One advantage for each token: what it is under a mean, without one, and where they are equal."""

import dataclasses
import math

import pytest
import torch
from torch.autograd import gradcheck

from hmpo import members
from hmpo.config import ObjectiveConfig
from hmpo.errors import ShapeError
from hmpo.objective.loss import power_mean_loss, power_mean_objective
from hmpo.objective.metrics import objective_metrics
from hmpo.objective.terms import count_denominators
from tests.objective.cases import rows_of
from tests.objective.test_weights import LOOPS, batch
from tests.oracles import objective as basic
from tests.oracles import turns as oracle

GENERATOR = torch.Generator().manual_seed(8)
VARYING = torch.randn(8, 10, generator=GENERATOR, dtype=torch.float64)
WITHOUT_MEAN = [name for name in LOOPS if not members.BY_NAME[name]().has_mean]


def evaluate(new, old, mask, advantages, config, **options):
    x = new.clone().requires_grad_()
    loss = power_mean_loss(x, old, mask, advantages, config, **options)
    loss.backward()
    return loss.detach(), x.grad


@pytest.mark.parametrize("name", members.BY_NAME)
def test_equal_advantages_of_a_response_are_its_own_to_the_bit(name):
    new, old, mask, advantages = batch(0.3)
    mask[6] = False
    spread = advantages.unsqueeze(1).expand(8, 10).masked_fill(~mask, math.nan)
    config = members.BY_NAME[name]()
    found, expected = (evaluate(new, old, mask, given, config) for given in (spread, advantages))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    one, two = (objective_metrics(new, old, mask, given, config) for given in (spread, advantages))
    assert {k: v.item() for k, v in one.items()} == {k: v.item() for k, v in two.items()}


@pytest.mark.parametrize("name", WITHOUT_MEAN)
def test_without_a_mean_a_token_is_weighed_by_its_own_advantage(name):
    """Its term is the one that it has where its whole response has that advantage."""
    new, old, mask, _ = batch(0.3)
    found, grad = evaluate(new, old, mask, VARYING, members.BY_NAME[name]())
    d, logs, total = rows_of(new - old, mask), rows_of(new, mask), 0.0
    for i, row in enumerate(mask):
        for place, column in enumerate(row.nonzero().flatten().tolist()):
            alone = [0.0] * 8
            alone[i] = VARYING[i, column].item()
            _, slopes = LOOPS[name](d, alone, logs)
            expected = slopes[i][place]
            assert grad[i, column].item() == pytest.approx(expected, rel=1e-12, abs=1e-15)
            total += expected * logs[i][place]
    if name != "dro":  # its penalty is no weight times a log-prob
        assert found.item() == pytest.approx(total, rel=1e-12)
    metrics = objective_metrics(new, old, mask, VARYING, members.BY_NAME[name]())
    assert metrics["pg_loss"].item() == pytest.approx(found.item(), rel=1e-12)


@pytest.mark.parametrize("p", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_tokens_as_segments_are_ppo_whatever_the_exponent(p, level):
    new, old, mask, _ = batch(0.3)
    config = ObjectiveConfig(p=p, segments="token", clip_level=level, clip_low=0.2, clip_high=0.3)
    loss, grad = evaluate(new, old, mask, VARYING, config)
    d, value = rows_of(new - old, mask), 0.0
    for i, row in enumerate(d):
        advantages = VARYING[i][mask[i]].tolist()
        for t, (v, adv) in enumerate(zip(row, advantages, strict=True)):
            (term,), (slope,) = basic.ppo_tokens([v], [adv][0], -0.2, 0.3)
            value -= term / len(row) / 8
            column = mask[i].nonzero()[t].item()
            assert grad[i, column].item() == pytest.approx(-slope / len(row) / 8, abs=1e-15)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    output = power_mean_objective(new, old, mask, VARYING, config)
    assert output.metrics["pg_loss"].item() == pytest.approx(value, rel=1e-12)
    assert output.metrics["n_seq"].item() == 8


def test_turns_have_advantages_of_their_own():
    """The gradient of each turn is the one that it has where its response has that advantage."""
    rows = ["++.+..+++.", "+++.++....", "+........."]
    mask = torch.tensor([[c == "+" for c in row] for row in rows])
    d = 0.3 * torch.randn(3, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    number = (mask & ~torch.nn.functional.pad(mask[:, :-1], (1, 0))).cumsum(1)
    advantages = torch.tensor([[1.0, -0.5, 0.3], [-1.0, 0.7, 0.0], [0.4, 0.0, 0.0]]).double()
    spread = advantages.gather(1, (number - 1).clamp(min=0))
    config = ObjectiveConfig(p=-1.0, segments="turn")
    loss, grad = evaluate(d, torch.zeros_like(d), mask, spread, config)
    turns = [
        [d[i][(number[i] == k) & mask[i]].tolist() for k in range(1, int(number[i].max()) + 1)]
        for i in range(3)
    ]
    for i, response in enumerate(turns):
        for k in range(len(response)):
            alone = [0.0] * 3
            alone[i] = advantages[i, k].item()
            _, slopes = oracle.by_turn(turns, alone, -1.0, "token", -0.4, 0.4, "sequence_mean")
            here = grad[i][(number[i] == k + 1) & mask[i]].tolist()
            assert here == pytest.approx(slopes[i][k], rel=1e-12, abs=1e-15)
    zero = torch.zeros_like(d)

    def value(x):
        return power_mean_loss(x, zero, mask, spread, config)

    assert gradcheck(value, d.clone().requires_grad_())
    assert loss.isfinite()


def test_advantages_that_vary_within_a_mean_are_refused():
    new, old, mask, _ = batch(0.3)
    for segments in ("response", "turn"):
        config = dataclasses.replace(members.hmpo(), segments=segments)
        with pytest.raises(ShapeError, match=f"one for all tokens of a {segments}, as segments"):
            power_mean_loss(new, old, mask, VARYING, config)


@pytest.mark.parametrize("name", [*WITHOUT_MEAN, "reinforce", "cispo", "token"])
def test_micro_batches_add_up_and_a_bad_number_is_told(name):
    config = members.BY_NAME[name]() if name != "token" else ObjectiveConfig(segments="token")
    new, old, mask, _ = batch(0.3)
    loss, grad = evaluate(new, old, mask, VARYING, config)
    given = {"denominators": count_denominators(mask)}
    parts = [
        evaluate(new[rows], old[rows], mask[rows], VARYING[rows], config, **given)
        for rows in torch.arange(8).split([1, 4, 3])
    ]
    assert sum(p[0] for p in parts).item() == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), grad, rtol=1e-12, atol=1e-15)
    padded = VARYING.masked_fill(~mask, math.nan)
    assert torch.equal(evaluate(new, old, mask, padded, config)[1], grad)
    spoilt = VARYING.clone()
    spoilt[0, 1] = math.nan
    assert evaluate(new, old, mask, spoilt, config)[0].isnan()
