"""The mean over turns against a loop over turns, and what one turn a response leaves as it was."""

import dataclasses
import math

import pytest
import torch
from torch.autograd import gradcheck

from hmpo import members
from hmpo.config import ObjectiveConfig
from hmpo.config.objective import ExponentConfig
from hmpo.config.unread import refuse_unread_objective
from hmpo.errors import ConfigError
from hmpo.objective.in_force import ObjectiveInForce
from hmpo.objective.loss import power_mean_loss, power_mean_objective
from hmpo.objective.metrics import objective_metrics
from hmpo.objective.segments import turns_of
from hmpo.objective.terms import count_denominators, minibatch_band
from tests.objective.cases import BOTH, batch, loss_and_gradient
from tests.oracles import turns as oracle

TURN = ObjectiveConfig(segments="turn")
REDUCTIONS = ["sequence_mean", "token_mean", "constant", "length_sum"]
ADVANTAGES = [1.0, -0.7, 0.4, -1.3, 0.0]


def conversations(dtype=torch.float64):
    """Five responses of 1, 3, 2, 2 and 2 turns with every kind of token between them."""
    rows = ["++++......", "++.+..+++.", "+..+++....", ".++.+++++.", "+.+......."]
    mask = torch.tensor([[c == "+" for c in row] for row in rows])
    generator = torch.Generator().manual_seed(3)
    d = 0.4 * torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    d[~mask] = math.nan
    return d.to(dtype), mask, torch.tensor(ADVANTAGES, dtype=dtype)


def as_turns(d, mask):
    """Lists of turns of each row, by walking along it."""
    found = []
    for values, real in zip(d.double().tolist(), mask.tolist(), strict=True):
        turns, inside = [], False
        for value, here in zip(values, real, strict=True):
            if here and not inside:
                turns.append([])
            if here:
                turns[-1].append(value)
            inside = here
        found.append(turns)
    return found


@BOTH
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("p", [-1.0, 0.0, 1.0, 2.0])
def test_turns_equal_a_loop_over_turns(p, level, reduction, dtype):
    config = ObjectiveConfig(
        segments="turn",
        p=p,
        clip_level=level,
        clip_low=0.2,
        clip_high=0.15,
        reduction=reduction,
        max_length=20 if reduction == "constant" else None,
    )
    low, high = (torch.tensor(bound, dtype=dtype).item() for bound in config.log_bounds)
    d, mask, advantages = conversations(dtype)
    loss, grad = loss_and_gradient(config, d, mask, advantages)
    a = advantages.double().tolist()
    expected, slopes = oracle.by_turn(as_turns(d, mask), a, p, level, low, high, reduction, 20)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert loss.item() == pytest.approx(expected, rel=tolerance)
    for row, keep, turns in zip(grad, mask, slopes, strict=True):
        flat = [slope for turn in turns for slope in turn]
        assert row[keep].tolist() == pytest.approx(flat, rel=tolerance, abs=tolerance)
        assert not row[~keep].any(), "what the environment added has a gradient of exactly 0"


@pytest.mark.parametrize("segments", ["response", "turn"])
def test_what_the_environment_added_reaches_neither_loss_nor_metrics(segments):
    config = ObjectiveConfig(segments=segments, kl_coef=0.1)
    d, mask, advantages = conversations()
    results = []
    for fill in (0.0, math.nan, 1e30):
        new, old, ref = (torch.where(mask, x, fill) for x in (d, 0 * d, d / 2))
        results.append(power_mean_objective(new, old, mask, advantages, config, ref_logprobs=ref))
    for other in results[1:]:
        assert torch.equal(other.loss, results[0].loss)
        for name, value in results[0].metrics.items():
            assert torch.equal(other.metrics[name], value), name


@BOTH
@pytest.mark.parametrize("name", members.BY_NAME)
def test_one_turn_a_response_is_the_response_to_the_bit(name, dtype):
    config = members.BY_NAME[name]()
    by_turn = dataclasses.replace(config, segments="turn")
    d, mask, advantages = batch(-0.1, 0.1, dtype=dtype, overflow=False)
    mask = mask.cumprod(1).bool()  # without the hole
    got, expected = (
        (
            *loss_and_gradient(objective, d, mask, advantages),
            objective_metrics(d, 0 * d, mask, advantages, objective),
        )
        for objective in (by_turn, config)
    )
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert got[2].keys() == expected[2].keys()
    for metric, value in expected[2].items():
        assert torch.equal(got[2][metric], value), metric


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_responses_weigh_the_same_however_many_turns_they_have(reduction):
    """With an arithmetic mean of tokens, and no clip of it, turns and responses are one loss."""
    config = ObjectiveConfig(p=1.0, reduction=reduction, max_length=9, kl_coef=0.3)
    if reduction != "constant":
        config = dataclasses.replace(config, max_length=None)
    d, mask, advantages = conversations()
    losses = [
        power_mean_loss(d, 0 * d, mask, advantages, c, ref_logprobs=d / 3)
        for c in (config, dataclasses.replace(config, segments="turn"))
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip_level": "sequence", "clip_low": 0.5, "clip_high": 0.5},
        {"clip_level": "sequence", "clip_width": "z", "clip_center": "drift"},
        {"mean": "ahm"},
    ],
)
def test_gradcheck_of_turns(changes):
    config = dataclasses.replace(TURN, **changes)
    d, mask, advantages = conversations()
    d = torch.where(mask, 0.3 * d, 0).requires_grad_()
    band = None
    if config.needs_band:
        band = minibatch_band(d.detach(), 0 * d.detach(), mask, advantages, config)

    def loss(x):
        return power_mean_loss(x, torch.zeros_like(x), mask, advantages, config, band=band)

    assert gradcheck(loss, d)


@pytest.mark.parametrize("width", ["absolute", "z"])
def test_parts_of_a_minibatch_add_up_over_turns(width):
    config = ObjectiveConfig(
        segments="turn", clip_level="sequence", clip_width=width, clip_center="drift",
        reduction="token_mean",
    )  # fmt: skip
    d, mask, advantages = conversations()
    d = torch.where(mask, d, 0)
    whole = power_mean_loss(d, 0 * d, mask, advantages, config)
    band = minibatch_band(d, 0 * d, mask, advantages, config)
    parts = [
        power_mean_loss(
            d[rows], 0 * d[rows], mask[rows], advantages[rows], config,
            denominators=count_denominators(mask), band=band,
        )
        for rows in ([0, 4], [1], [2, 3])
    ]  # fmt: skip
    torch.testing.assert_close(sum(parts), whole, rtol=1e-14, atol=0)


def test_weights_and_exponents_of_responses_are_those_of_their_turns():
    d, mask, advantages = conversations()
    d = torch.where(mask, d, 0)
    p = torch.tensor([-1.0, 0.5, 2.0, -2.0, 0.0], dtype=torch.float64)
    w = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    got = power_mean_loss(d, 0 * d, mask, advantages, TURN, exponent=p, weights=w)
    expected = 0.0
    for i, turns in enumerate(as_turns(d, mask)):
        of_row, _ = oracle.by_turn(
            [turns], [advantages[i].item()], p[i].item(), "token", -0.4, 0.4, "sequence_mean"
        )
        expected += w[i].item() * of_row / len(d)
    assert got.item() == pytest.approx(expected, rel=1e-12)
    per_token = w.unsqueeze(1).expand_as(d).contiguous()
    x = d.clone().requires_grad_()
    power_mean_loss(x, 0 * d, mask, advantages, TURN, exponent=p, weights=per_token).backward()
    y = d.clone().requires_grad_()
    power_mean_loss(y, 0 * d, mask, advantages, TURN, exponent=p, weights=w).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-15)


def test_clips_and_counts_are_of_turns_advantages_of_responses():
    config = ObjectiveConfig(segments="turn", clip_level="sequence", clip_low=0.1, clip_high=0.1)
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    d = torch.tensor([[0.5, 0.0, 0.0, 0.0], [0.0] * 4], dtype=torch.float64)
    metrics = objective_metrics(d, 0 * d, mask, torch.tensor([1.0, -1.0]).double(), config)
    assert int(metrics["n_seq"]) == 2 and int(metrics["n_tokens"]) == 7
    assert metrics["clip/frac"].item() == pytest.approx(1 / 3)
    assert metrics["adv/mean"].item() == 0
    turns = turns_of(mask, config)
    assert turns is not None and turns.owner.tolist() == [0, 0, 1]
    assert turns.share.tolist() == [1 / 3, 2 / 3, 1.0]


def test_what_follows_an_update_sees_turns():
    """A calibrated clip and a learned exponent take the turns as rows given by hand."""
    d, mask, advantages = conversations()
    d = torch.where(mask, d, 0)
    changes = {
        "clip_level": "sequence", "clip_share": 0.3, "p": -0.5,
        "exponent": ExponentConfig(kind="learnable", criterion="ess"),
    }  # fmt: skip
    turns = turns_of(mask, TURN)
    assert turns is not None
    states = []
    for config, rows in (
        (ObjectiveConfig(segments="turn", **changes), (d, 0 * d, mask, advantages)),
        (
            ObjectiveConfig(**changes),
            (turns.tokens(d), 0 * turns.tokens(d), turns.mask, turns.rows(advantages)),
        ),
    ):
        in_force = ObjectiveInForce(config, torch.device("cpu"), 9)
        in_force.follow(*rows, update=1, rollout=0, staleness=1)
        states.append(in_force.state_dict())
    assert states[0]["calibration"] == states[1]["calibration"]
    assert states[0]["calibration"]["scales"]
    assert torch.equal(states[0]["exponent"]["rho"], states[1]["exponent"]["rho"])


def test_turns_without_a_mean_are_refused():
    objective = dataclasses.replace(members.BY_NAME["cispo"](), segments="turn")
    with pytest.raises(ConfigError, match="segments: got 'turn'"):
        refuse_unread_objective(objective)
