import math

import pytest
import torch

from hmpo import members
from hmpo.config import ObjectiveConfig
from hmpo.objective.loss import power_mean_objective
from hmpo.objective.metrics import objective_metrics
from tests.objective.cases import OPEN, batch, loss_and_gradient


def test_clip_fraction_is_active_fraction():
    """Four tokens outside the band, two of them on the side where the clip is active."""
    d = torch.tensor([[0.5, -0.5, 0.0, 0.1], [0.5, -0.5, 0.2, 9.0], [7.0, 7.0, 7.0, 7.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    advantages = torch.tensor([1.0, -1.0, 1.0])
    metrics = objective_metrics(d, torch.zeros_like(d), mask, advantages, members.gmpo())
    assert metrics["clip/frac"].item() == pytest.approx(2 / 7)
    assert metrics["clip/frac_pos"].item() == pytest.approx(1 / 4)
    assert metrics["clip/frac_neg"].item() == pytest.approx(1 / 3)
    assert metrics["clip/frac_band"].item() == pytest.approx(4 / 7)
    assert (metrics["clip/lo"].item(), metrics["clip/hi"].item()) == pytest.approx((-0.4, 0.4))

    d = torch.tensor([[0.01, 0.01], [0.01, 0.01], [-0.01, -0.01], [-0.01, -0.01], [0.01, 0.01]])
    mask = torch.ones_like(d, dtype=torch.bool)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0])
    metrics = objective_metrics(d, torch.zeros_like(d), mask, advantages, members.gspo())
    names = ("clip/frac", "clip/frac_pos", "clip/frac_neg", "clip/frac_band")
    assert [metrics[n].item() for n in names] == pytest.approx([0.4, 0.5, 0.5, 1.0])
    metrics = objective_metrics(d, torch.zeros_like(d), mask, advantages, OPEN)
    assert [metrics[n].item() for n in names] == [0.0] * 4


def test_clip_fraction_counts_exactly_the_tokens_without_gradient():
    config = members.hmpo()
    d, mask, advantages = batch(*config.log_bounds)
    _, grad = loss_and_gradient(config, d, mask, advantages)
    signed = mask & (advantages != 0).unsqueeze(1)
    # weights of exp(-80) are not 0, so a missing gradient is a clipped token
    blocked = (grad == 0) & signed
    metrics = objective_metrics(d, torch.zeros_like(d), mask, advantages, config)
    assert metrics["clip/frac"].item() == pytest.approx(blocked.sum().item() / mask.sum().item())


def test_metrics_by_hand():
    d = torch.tensor([[math.log(2.0), -math.log(2.0)], [0.3, 5.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    advantages = torch.tensor([2.0, -1.0], dtype=torch.float64)
    config = ObjectiveConfig(p=-1.0, p_negative=1.0)
    old = torch.full_like(d, -2.0)
    metrics = {
        name: value.item()
        for name, value in objective_metrics(d + old, old, mask, advantages, config).items()
    }
    gap = 2 * math.log(1.25)
    tokens = [math.log(2.0), -math.log(2.0), 0.3]
    w = [1.0, math.exp(0.3)]
    hand = {
        "n_seq": 2,
        "n_tokens": 3,
        "ratio/logA": (math.log(1.25) + 0.3) / 2,
        "ratio/logG": 0.15,
        "ratio/logH": (0.3 - math.log(1.25)) / 2,
        "ratio/log_gap_mean": gap / 2,
        "ratio/log_gap_p50": gap / 2,
        "ratio/log_gap_p95": 0.95 * gap,
        "ratio/log_gap_max": gap,
        "ratio/log_skew_mean": 0.0,
        "ratio/d_mean": 0.1,
        "ratio/d_var": sum((t - 0.1) ** 2 for t in tokens) / 3,
        "ratio/sigma": (sum((t - 0.1) ** 2 for t in tokens) / 3) ** 0.5,
        "ratio/sigma_sqrt_l": (sum((t - 0.1) ** 2 for t in tokens) / 3 * 1.5) ** 0.5,
        "ratio/d_min": -math.log(2.0),
        "ratio/d_max": math.log(2.0),
        "ratio/d_p05": 0.03 - 0.9 * math.log(2.0),
        "ratio/d_p50": 0.3,
        "ratio/d_p95": 0.03 + 0.9 * math.log(2.0),
        "ratio/chi2_tok": (4 + 0.25 + math.exp(0.6)) / 3 - 1,
        "ratio/w_entropy": (1 - (0.2 * math.log(0.2) + 0.8 * math.log(0.8)) / math.log(2.0)) / 2,
        "ratio/m_mean": (0.8 + math.exp(0.3)) / 2,
        "ratio/m_std": (math.exp(0.3) - 0.8) / 2,
        "ratio/m_min": 0.8,
        "ratio/m_max": math.exp(0.3),
        "ratio/clamped": 0,
        "ratio/ess_tok": (1 / (2 * (0.2**2 + 0.8**2)) + 1) / 2,
        "ratio/ess_seq": sum(w) ** 2 / (2 * sum(v * v for v in w)),
        "ratio/p": 0.0,
        "ratio/p_std": 1.0,
        "ratio/p_pos": -1.0,
        "ratio/p_neg": 1.0,
        "kl/k1": -0.1,
        "kl/k3": ((1 - math.log(2)) + (math.log(2) - 0.5) + (math.exp(0.3) - 1.3)) / 3,
        "adv/mean": 0.5,
        "adv/var": 2.25,
        "adv/abs_mean": 1.5,
        "clip/center": 0.0,
        "clip/lo": -0.4,
        "clip/hi": 0.4,
        "clip/frac": 1 / 3,
        "clip/frac_pos": 1 / 2,
        "clip/frac_neg": 0.0,
        "clip/frac_band": 2 / 3,
        "pg_loss": -(2 * 2 / (math.exp(-0.4) + 2) - math.exp(0.3)) / 2,
        "kl_loss": 0.0,
    }
    assert metrics == pytest.approx(hand, rel=1e-7, abs=1e-12)


def test_metrics_are_detached():
    d, mask, advantages = batch(-0.4, 0.4)
    logprobs = d.clone().requires_grad_()
    exponent = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    old = torch.zeros_like(d)
    output = power_mean_objective(
        logprobs, old, mask, advantages, ObjectiveConfig(), exponent=exponent
    )
    assert output.loss.requires_grad
    assert not any(value.requires_grad for value in output.metrics.values())
    assert all(value.ndim == 0 for value in output.metrics.values())
