"""The clip's axes: centre, width, sign convention, dual clip; each against its source's loops."""

import dataclasses
import math

import pytest
import torch

from hmpo import members
from hmpo.config import ObjectiveConfig
from hmpo.errors import ConfigError
from hmpo.objective.metrics import objective_metrics
from hmpo.objective.terms import count_denominators, minibatch_band
from tests.objective.cases import BOTH, assert_equals, batch, loss_and_gradient, rows_of
from tests.oracles import family as oracle

SEQUENCE = ObjectiveConfig(clip_level="sequence", clip_low=0.05, clip_high=0.08)


def assert_close_to(config, d, mask, advantages, expected):
    loss, grad = loss_and_gradient(config, d, mask, advantages)
    assert loss.item() == pytest.approx(expected[0], rel=1e-12)
    largest = max(abs(s) for row in expected[1] for s in row)
    for row, keep, slope in zip(grad, mask, expected[1], strict=True):
        assert row[keep].tolist() == pytest.approx(slope, rel=1e-12, abs=1e-12 * largest)


@BOTH
def test_gmpo_asymmetric_bounds_conventions(dtype):
    """The formula of the paper mirrors its upper bound, verl and TRL use the lower one."""
    config = dataclasses.replace(members.gmpo(), clip_low=0.2, clip_high=0.5)
    printed = dataclasses.replace(config, sign_convention="paper")
    assert_equals(oracle.gmpo_verl, config, dtype, overflow=True)
    assert_equals(oracle.gmpo_paper, printed, dtype, overflow=True)
    d, mask, advantages = batch(-0.2, 0.5)
    one, two = (loss_and_gradient(c, d, mask, advantages) for c in (config, printed))
    assert (one[1] - two[1]).abs().max() > 1e-3
    same = dataclasses.replace(members.gmpo(), sign_convention="paper")
    one, two = (loss_and_gradient(c, d, mask, advantages) for c in (members.gmpo(), same))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


@BOTH
@pytest.mark.parametrize("paper", [oracle.dual_clip_verl, oracle.delta_trl])
def test_dual_clip_is_that_of_verl_and_the_delta_of_trl(dtype, paper):
    config = dataclasses.replace(members.grpo(), dual_clip=3.0)

    def of_source(*inputs):
        return paper(*inputs, 3.0)

    assert_equals(of_source, config, dtype, overflow=True)


def test_dual_clip_counts_as_clipped_and_is_off_by_default():
    d = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    mask, advantages = torch.ones(2, 2, dtype=torch.bool), torch.tensor([-1.0, 1.0])
    plain = objective_metrics(d, torch.zeros_like(d), mask, advantages, members.hmpo())
    config = dataclasses.replace(members.hmpo(), dual_clip=3.0)
    dual = objective_metrics(d, torch.zeros_like(d), mask, advantages, config)
    assert (plain["clip/frac"].item(), dual["clip/frac"].item()) == (0.25, 0.5)
    family = [make() for make in members.BY_NAME.values() if make().has_mean]
    assert all(config.dual_clip is None for config in family)


@pytest.mark.parametrize("p", [-2.0, -1.0, 0.5, 2.0])
def test_drift_centre_and_z_width_equal_their_definition(p):
    d, mask, advantages = batch(-0.05, 0.08, overflow=False)
    d = d.clamp(-1, 1)
    rows = rows_of(d, mask)
    center = oracle.drift(rows, p)
    tokens = [v for row in rows for v in row]
    mean = math.fsum(tokens) / len(tokens)
    sigma = math.sqrt(math.fsum((v - mean) ** 2 for v in tokens) / len(tokens))
    for width in ("absolute", "z"):
        config = dataclasses.replace(SEQUENCE, p=p, clip_center="drift", clip_width=width)
        units = [sigma / math.sqrt(len(row)) if width == "z" else 1.0 for row in rows]
        bounds = [(center - 0.05 * u, center + 0.08 * u) for u in units]
        expected = oracle.sequence_clip(rows, advantages.tolist(), p, bounds)
        assert_close_to(config, d, mask, advantages, expected)
        metrics = objective_metrics(d, torch.zeros_like(d), mask, advantages, config)
        assert metrics["clip/center"].item() == pytest.approx(center, rel=1e-12)
        for name, side in (("clip/lo", 0), ("clip/hi", 1)):
            mean_bound = math.fsum(b[side] for b in bounds) / len(bounds)
            assert metrics[name].item() == pytest.approx(mean_bound, rel=1e-12)


def test_drift_is_exactly_zero_for_the_arithmetic_mean():
    d, mask, advantages = batch(-0.05, 0.08, overflow=False)
    config = dataclasses.replace(SEQUENCE, p=1.0)
    drifting = dataclasses.replace(config, clip_center="drift")
    band = minibatch_band(d, torch.zeros_like(d), mask, advantages, drifting)
    assert band.center.item() == 0.0
    one, two = (loss_and_gradient(c, d, mask, advantages) for c in (config, drifting))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_drift_centred_clip_is_two_sided():
    """Old-policy samples of 8192 tokens, sigma = 0.03, GSPO's bounds: spec of the one-sided band.

    Around 1, a harmonic mean loses nearly all negatives and no positive; around the drift both
    signs lose the share that p = 1 loses (0.18 below, 0.11 above).
    """
    sigma, rows, width = 0.03, 400, 8192
    generator = torch.Generator().manual_seed(1)
    d = sigma * torch.randn(rows, width, generator=generator) - sigma**2 / 2
    mask = torch.ones_like(d, dtype=torch.bool)
    advantages = torch.ones(rows)
    advantages[::2] = -1
    shares = {}
    for center in ("one", "drift"):
        config = dataclasses.replace(members.gspo(), p=-1.0, clip_center=center)
        metrics = objective_metrics(d, torch.zeros_like(d), mask, advantages, config)
        shares[center] = (metrics["clip/frac_neg"].item(), metrics["clip/frac_pos"].item())
    assert shares["one"][0] > 0.93 and shares["one"][1] == 0.0
    assert shares["drift"][0] == pytest.approx(0.18, abs=0.06)
    assert shares["drift"][1] == pytest.approx(0.11, abs=0.06)


def test_z_width_is_fair_to_lengths():
    """The share of clipped responses does not depend on their length; an absolute one does."""
    generator = torch.Generator().manual_seed(2)
    d = 0.1 * torch.randn(2000, 256, generator=generator) - 0.005
    mask = torch.arange(256) < torch.where(torch.arange(2000) % 2 == 0, 256, 16).unsqueeze(1)
    advantages = torch.ones(2000)
    shares = {}
    for width, bound in (("z", 2.0), ("absolute", 0.0125)):
        config = dataclasses.replace(
            SEQUENCE, p=0.0, clip_width=width, clip_low=bound, clip_high=bound
        )
        band = minibatch_band(d, torch.zeros_like(d), mask, advantages, config)
        for name, part in (("long", slice(0, None, 2)), ("short", slice(1, None, 2))):
            rows = (d[part], torch.zeros_like(d[part]), mask[part], advantages[part])
            shares[width, name] = objective_metrics(*rows, config, band=band)["clip/frac"].item()
    assert shares["z", "long"] == pytest.approx(shares["z", "short"], abs=0.02)
    assert shares["absolute", "short"] > 4 * shares["absolute", "long"]


def test_first_update_of_z_width_clips_nothing():
    """Rounding noise of log ratios that are 0 in truth is not measured as a narrow band."""
    d = 1e-7 * torch.randn(8, 16)
    mask, advantages = torch.ones_like(d, dtype=torch.bool), torch.ones(8)
    config = dataclasses.replace(SEQUENCE, clip_width="z", clip_low=2.0, clip_high=2.0)
    metrics = objective_metrics(d, torch.zeros_like(d), mask, advantages, config)
    assert metrics["clip/frac_band"].item() == 0.0
    assert metrics["clip/hi"].item() == pytest.approx(2.0 * 0.01 / 4)


@pytest.mark.parametrize("width", ["absolute", "z"])
def test_band_of_the_whole_makes_micro_batches_add_up(width):
    config = dataclasses.replace(SEQUENCE, clip_center="drift", clip_width=width)
    d, mask, advantages = batch(-0.05, 0.08)
    mask[6] = False
    whole, grad = loss_and_gradient(config, d, mask, advantages)
    given = {
        "denominators": count_denominators(mask),
        "band": minibatch_band(d, torch.zeros_like(d), mask, advantages, config),
    }
    for sizes in ([1] * 8, [3, 5], [8]):
        parts = [
            loss_and_gradient(config, d[rows], mask[rows], advantages[rows], **given)
            for rows in torch.arange(8).split(sizes)
        ]
        torch.testing.assert_close(sum(p[0] for p in parts), whole, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.cat([p[1] for p in parts]), grad, rtol=1e-12, atol=0)
    with pytest.raises(ConfigError, match="band: got None with denominators"):
        loss_and_gradient(config, d, mask, advantages, denominators=given["denominators"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_center": "drift"}, "clip_center: got 'drift', expected \"one\""),
        ({"clip_width": "z"}, "clip_width: got 'z', expected \"absolute\""),
        (
            {"clip_width": "z", "clip_level": "sequence", "clip_space": "ratio"},
            "clip_space: got 'ratio', expected \"log\"",
        ),
        ({"dual_clip": 1.2}, "dual_clip: got 1.2, expected a ratio above the upper bound 1.49"),
        ({"dual_clip": 3.0, "clip_level": "none"}, "dual_clip: got 3.0, expected None without"),
        ({"gate": "soft"}, "clip_level: got 'token', expected \"none\""),
        ({"gate": "detached", "clip_level": "sequence"}, "clip_level: got 'sequence'"),
        ({"ahm_weight": 1.5}, "ahm_weight: got 1.5"),
        ({"clip_sigma": 0.0}, "clip_sigma: got 0.0"),
        ({"clip_space": "ratio", "clip_low": 1.1}, "clip_low: got 1.1"),
    ],
)
def test_contradictory_settings_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ObjectiveConfig(**options)
