"""Per-token advantages: closed form, and the gradient of any member through a host's plain sum."""

import dataclasses
import math

import pytest
import torch

from hmpo import members
from hmpo.adapters.surrogate import surrogate_advantages
from hmpo.config.members import BY_NAME
from hmpo.config.objective import ObjectiveConfig
from hmpo.objective.loss import power_mean_loss


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    new, old = (torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    lengths = torch.tensor([9, 4, 1, 0, 7, 3])
    mask = torch.arange(9) < lengths[:, None]
    mask[4, 2] = False
    advantages = torch.randn(6, generator=generator, dtype=torch.float64)
    return 0.4 * new, 0.4 * old, mask, advantages


@pytest.mark.parametrize("p", [1.0, 0.0, -1.0, 0.3])
def test_without_a_clip_they_are_the_mean_times_the_token_weights(p: float) -> None:
    new, old, mask, advantages = batch()
    config = ObjectiveConfig(p=p, clip_level="none")
    found = surrogate_advantages(new, old, mask, advantages, config)
    for i in range(6):
        tokens = [t for t in range(9) if mask[i, t]]
        ratio = {t: math.exp(float(new[i, t] - old[i, t])) for t in tokens}
        for t in range(9):
            wanted = 0.0
            if t in ratio:
                total = sum(r**p for r in ratio.values())
                logs = sum(math.log(r) for r in ratio.values()) / len(tokens)
                mean = (total / len(tokens)) ** (1 / p) if p else math.exp(logs)
                share = ratio[t] ** p / total
                wanted = len(tokens) * float(advantages[i]) * mean * share
            assert float(found[i, t]) == pytest.approx(wanted, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_hosts_sum_over_tokens_has_the_gradient_of_every_member(name: str) -> None:
    new, old, mask, advantages = batch()
    config = dataclasses.replace(BY_NAME[name](), reduction="sequence_mean", kl_coef=0.0)
    weights = surrogate_advantages(new, old, mask, advantages, config)
    host, ours = (new.clone().requires_grad_() for _ in range(2))
    rows, lengths = mask.any(1).sum(), mask.sum(1, keepdim=True).clamp(min=1)
    (-(weights * (host - host.detach()).exp() * mask / lengths).sum() / rows).backward()
    power_mean_loss(ours, old, mask, advantages, config).backward()
    assert torch.allclose(host.grad, ours.grad, rtol=1e-12, atol=1e-15)
    assert float(ours.grad.abs().max()) > 0


def test_they_are_made_where_gradients_are_off_and_leave_none_behind() -> None:
    new, old, mask, advantages = batch()
    new.requires_grad_()
    with torch.no_grad():
        found = surrogate_advantages(new, old, mask, advantages, members.hmpo())
    assert not found.requires_grad and new.grad is None and float(found.abs().sum()) > 0
