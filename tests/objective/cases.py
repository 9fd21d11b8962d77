"""Ragged batches that the tests of the objective share, and what they assert of them."""

import math

import pytest
import torch

from hmpo import members
from hmpo.config import ObjectiveConfig
from hmpo.objective.loss import power_mean_loss


def row(values, dtype=torch.float64):
    """One response without padding."""
    d = torch.tensor([values], dtype=dtype)
    return d, torch.ones_like(d, dtype=torch.bool)


def ragged(rows, *, fill=0.0, extra=0):
    """Responses of unequal length, right-padded with `fill`."""
    width = max(len(r) for r in rows) + extra
    d = torch.full((len(rows), width), fill, dtype=torch.float64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, values in enumerate(rows):
        d[i, : len(values)] = torch.tensor(values, dtype=torch.float64)
        mask[i, : len(values)] = True
    return d, mask


ROWS = [[0.3, -0.2, 0.5, 0.1], [0.7], [-1.0, 2.0], [], [0.2, 0.2, 0.2]]
LENGTHS = [10, 7, 1, 4, 10, 6, 3, 10]
ADVANTAGES = [1.0, -0.7, 0.4, 0.0, -1.3, 2.0, -0.2, 0.6]
OPEN = ObjectiveConfig(clip_level="none")
CLAMPED = [make for make in members.BY_NAME.values() if make().token_clamp is not None]
CLIPPING = [
    make
    for make in members.BY_NAME.values()
    if make().gate == "clip" and make().clip_level != "none" and make not in CLAMPED
]


def batch(low, high, *, dtype=torch.float64, overflow=True):
    """Ragged log ratios (8, 10) with every awkward case: length 1, a mask hole in row 4, A = 0,
    both signs, tokens exactly on both bounds, log ratios of +-80 (+80 with A < 0 on demand)."""
    generator = torch.Generator().manual_seed(0)
    d = 0.3 * torch.randn(8, 10, generator=generator, dtype=torch.float64)
    mask = torch.arange(10) < torch.tensor(LENGTHS).unsqueeze(1)
    mask[4, 3] = False
    for i in (0, 1, 4, 7):
        d[i, 0] = low if math.isfinite(low) else -0.3
        d[i, 1] = high if math.isfinite(high) else 0.3
    d[5, 2], d[7, 4], d[1, 3], d[0, 6] = 80.0, -80.0, -80.0, 20.0
    if overflow:
        d[4, 5] = 80.0
    advantages = torch.tensor(ADVANTAGES, dtype=dtype)
    return d.to(dtype), mask, advantages


def rows_of(d, mask):
    return [row[keep].double().tolist() for row, keep in zip(d, mask, strict=True)]


def loss_and_gradient(config, d, mask, advantages, **options):
    logprobs = d.clone().requires_grad_()
    loss = power_mean_loss(logprobs, torch.zeros_like(d), mask, advantages, config, **options)
    loss.backward()
    return loss.detach(), logprobs.grad


def assert_equals(paper, config, dtype, *, overflow):
    """Loss and gradient of the family against a paper's loops."""
    low, high = (torch.tensor(b, dtype=dtype).item() for b in config.log_bounds)
    d, mask, advantages = batch(low, high, dtype=dtype, overflow=overflow)
    loss, grad = loss_and_gradient(config, d, mask, advantages)
    expected, slopes = paper(rows_of(d, mask), advantages.double().tolist(), low, high)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert loss.item() == pytest.approx(expected, rel=tolerance)
    largest = max(abs(s) for row in slopes for s in row)
    for row, keep, slope in zip(grad, mask, slopes, strict=True):
        assert row[keep].tolist() == pytest.approx(slope, rel=tolerance, abs=tolerance * largest)
        assert not row[~keep].any()


BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
