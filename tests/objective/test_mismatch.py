import dataclasses
import itertools
import math

import pytest
import torch

from hmpo import members
from hmpo.config import MismatchConfig
from hmpo.errors import ConfigError
from hmpo.objective.loss import power_mean_loss
from hmpo.objective.mismatch import join_weights, mismatch_metrics, mismatch_weights, on_policy_rows
from hmpo.objective.terms import count_denominators
from hmpo.trainer import rollout as collect
from tests.oracles import mismatch as oracle
from tests.support import tiny_llama
from tests.trainer.test_trainer import PROMPTS, low_tokens, settings, trainer_for


def rollout(seed=0, spread=0.3):
    """Log-probs of a ragged batch with garbage in the padding and one empty row."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([6, 1, 0, 4, 6])
    mask = torch.arange(6) < lengths[:, None]
    sampling = -torch.rand(5, 6, generator=generator, dtype=torch.float64) - 0.1
    noise = spread * torch.randn(5, 6, generator=generator, dtype=torch.float64)
    old = sampling + noise
    old[~mask], sampling[~mask] = math.nan, math.inf
    return old, sampling, mask


def rows_of(old, sampling, mask):
    return [(o[m].tolist(), s[m].tolist()) for o, s, m in zip(old, sampling, mask)]


@pytest.mark.parametrize("correction", ["none", "truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mean", [(None, None), (0.9, None), (None, 1.1), (0.95, 1.1)])
def test_weights_equal_the_loops(correction, level, mean):
    old, sampling, mask = rollout(seed=3)
    config = MismatchConfig(
        correction=correction,
        level=level,
        low=0.8,
        high=1.25,
        sequence_low=mean[0],
        sequence_high=mean[1],
    )
    weights = mismatch_weights(old, sampling, mask, config)
    if correction == "none" and mean == (None, None):
        assert weights is None
        return
    assert weights.isfinite()[mask.any(1)].all()
    spread = weights if weights.ndim == 2 else weights[:, None].expand(mask.shape)
    for i, (o, s) in enumerate(rows_of(old, sampling, mask)):
        expected = oracle.row_weights(
            o,
            s,
            correction=correction,
            level=level,
            low=0.8,
            high=1.25,
            mean_low=mean[0],
            mean_high=mean[1],
        )
        assert spread[i][mask[i]].tolist() == pytest.approx(expected, rel=1e-14)
    zeros = int((spread[mask] == 0).sum())
    assert (zeros > 0) == (correction == "mask" or mean != (None, None)), "the case tells something"


def test_metrics_equal_the_loops_and_count_what_was_changed():
    old, sampling, mask = rollout()
    config = MismatchConfig(correction="truncate", low=0.8, high=1.25)
    weights = mismatch_weights(old, sampling, mask, config)
    metrics = mismatch_metrics(old, sampling, mask, weights)
    expected = oracle.metrics(rows_of(old, sampling, mask))
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value, rel=1e-12), name
    rho = torch.where(mask, old - sampling, 0)[mask].exp()
    outside = ((rho < 0.8) | (rho > 1.25)).double().mean().item()
    assert 0 < outside < 1
    assert metrics["mismatch/truncated_frac"].item() == outside
    assert metrics["mismatch/masked_frac"].item() == 0
    masked = mismatch_weights(old, sampling, mask, dataclasses.replace(config, correction="mask"))
    metrics = mismatch_metrics(old, sampling, mask, masked)
    assert metrics["mismatch/masked_frac"].item() == outside
    assert metrics["mismatch/truncated_frac"].item() == 0
    assert metrics["mismatch/rho_p99"] <= metrics["mismatch/rho_max"]
    assert mismatch_metrics(old, sampling, torch.zeros_like(mask), None) == {}


def test_equal_log_probs_need_no_correction():
    old, _, mask = rollout()
    for correction, level in itertools.product(("truncate", "mask"), ("token", "sequence")):
        config = MismatchConfig(correction=correction, level=level)
        assert (mismatch_weights(old, old, mask, config)[mask.any(1)] == 1).all()
    metrics = mismatch_metrics(old, old, mask, None)
    assert metrics["mismatch/ess"] == 1
    assert metrics["mismatch/k3"] == 0


def test_off_policy_mask_leaves_out_fallen_negatives_only():
    """exp(mean log ratio) is 0.9 for row 0 and 1, 0.7 for rows 2 and 3."""
    sampling = torch.full((4, 3), -1.0)
    new = sampling + torch.tensor([0.9, 0.9, 0.7, 0.7]).log()[:, None]
    mask = torch.ones(4, 3, dtype=torch.bool)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    config = MismatchConfig(off_policy_low=0.8)
    kept = on_policy_rows(new, sampling, mask, advantages, config)
    assert kept.tolist() == [True, True, True, False]
    assert on_policy_rows(new, sampling, mask, advantages, MismatchConfig()) is None
    assert join_weights(None, kept).tolist() == [1, 1, 1, 0]
    assert join_weights(torch.full((4, 3), 2.0), kept).sum(1).tolist() == [6, 6, 6, 0]
    assert join_weights(torch.full((4,), 2.0), None).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("name", list(members.BY_NAME))
def test_a_token_weight_multiplies_that_tokens_gradient(name):
    config = members.BY_NAME[name]()
    old, _, mask = rollout(spread=0.1)
    new = (old + 0.05 * torch.sin(torch.arange(30.0).double()).view(5, 6)).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0], dtype=torch.float64)
    weights = torch.rand(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = (new, old, mask, advantages, config)
    options = {"exponent": torch.tensor(0.5, dtype=torch.float64)} if "apmpo" in name else {}
    loss = power_mean_loss(*inputs, **options)
    (plain,) = torch.autograd.grad(loss, new)
    weighed = power_mean_loss(*inputs, weights=weights, **options)
    (scaled,) = torch.autograd.grad(weighed, new)
    assert torch.equal(loss, weighed)
    torch.testing.assert_close(scaled, torch.where(mask, plain * weights, 0), rtol=1e-14, atol=0)
    row = torch.tensor([2.0, 0.0, math.nan, 1.0, 0.5], dtype=torch.float64)  # row 2 is empty
    by_row = power_mean_loss(*inputs, weights=row, **options)
    (rowed,) = torch.autograd.grad(by_row, new)
    expected = plain * row.nan_to_num(0.0)[:, None]
    torch.testing.assert_close(rowed, expected, rtol=1e-13, atol=1e-17)


def test_weights_of_a_split_add_up_to_the_whole():
    config = members.dapo()
    old, _, mask = rollout(spread=0.1)
    new = (old + 0.05).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0], dtype=torch.float64)
    weights = torch.rand(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = power_mean_loss(new, old, mask, advantages, config, weights=weights)
    (expected,) = torch.autograd.grad(whole, new)
    counts = count_denominators(mask)
    found = torch.zeros_like(new)
    for rows in ([0, 3], [1], [2, 4]):
        part = power_mean_loss(
            new[rows],
            old[rows],
            mask[rows],
            advantages[rows],
            config,
            weights=weights[rows],
            denominators=counts,
        )
        found += torch.autograd.grad(part, new)[0]
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-18)


@pytest.mark.parametrize(
    "bad",
    [
        {"low": 1.5},
        {"low": -0.1},
        {"high": 0.9},
        {"high": math.inf},
        {"sequence_low": 0.0},
        {"sequence_high": 0.5},
        {"off_policy_low": 1.5},
    ],
)
def test_thresholds_out_of_range_are_refused(bad):
    with pytest.raises(ConfigError, match=f"{next(iter(bad))}: got"):
        MismatchConfig(**bad)


def test_a_run_with_a_filter_measures_the_mismatch_and_a_correction_changes_its_weights():
    metrics, policies = [], []
    for mismatch in (MismatchConfig(), MismatchConfig(correction="truncate", high=1.0)):
        model = tiny_llama()
        config = settings(top_k=5, mismatch=mismatch)
        with pytest.warns(UserWarning, match="truncated distribution"):
            metrics.append(trainer_for(model, config).update_step(PROMPTS))
        policies.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert metrics[0]["mismatch/rho_max"] < 1, "top-k raises the probability of what it keeps"
    assert metrics[0]["mismatch/rho_mean"] == metrics[1]["mismatch/rho_mean"]
    assert "mismatch/truncated_frac" not in metrics[0]
    assert metrics[1]["mismatch/truncated_frac"] == 0
    assert not torch.equal(*policies)


def test_recomputed_log_probs_are_those_of_the_trainers_own_forward_pass(monkeypatch):
    model, own = tiny_llama(), []
    forward = collect.token_logprobs

    def noted(*arguments, **options):
        own.append(forward(*arguments, **options))
        return own[-1]

    monkeypatch.setattr(collect, "token_logprobs", noted)
    trainer = trainer_for(model, settings(mismatch=MismatchConfig(recompute=True)))
    trainer.begin_rollout(PROMPTS, {})
    drawn = trainer.batch.rollout
    assert own and torch.equal(drawn.old_logprobs, torch.cat(own))
    torch.testing.assert_close(drawn.old_logprobs, drawn.sampling_logprobs, rtol=0, atol=1e-5)
    first = trainer.next_update()
    assert abs(first["ratio/d_mean"]) < 1e-6
    assert first["mismatch/k3"] < 1e-10


def test_mismatch_metrics_are_absent_where_sampler_and_trainer_are_one():
    metrics = trainer_for(tiny_llama(), reward=low_tokens).update_step(PROMPTS)
    assert not any(name.startswith("mismatch/") for name in metrics)
    quantiles = [metrics[f"ratio/d_{q}"] for q in ("min", "p05", "p50", "p95", "max")]
    assert quantiles == sorted(quantiles)
    assert 0 < metrics["ratio/w_entropy"] <= 1
