"""The contract at its stable paths: ratio mathematics, AGM history, trainers, MuonClip, GSPO.

    pytest -k harmonic_mean_policy_optimization     ratio mathematics and AGM history

The details are tested in `tests/`; here every promise is met once, on the public imports.
"""

import copy
import itertools
import math
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from torch import nn

from algorithms.gspo_vectorized import GSPOConfig, GSPOTrainer
from harmonic_mean_policy_optimization import (
    HMPOConfig,
    HMPOTrainer,
    PowerMeanConfig,
    PowerMeanTrainer,
)
from hmpo import ahm_mean, log_power_mean, power_mean_weights
from hmpo.objective.means import ahm_iterate, ahm_steps
from optimizers.muon_clip import MuonClip, MuonClipConfig
from rl_core.sampling import compute_log_probs_batch, sample_responses_batch

PROMPTS = [[5, 6, 7], [8, 9], [3, 4, 5, 6], [11]]
SAMPLING = {"group_size": 8, "max_length": 6, "eos_token": 2}


class TinyPolicy(nn.Module):
    """A causal language model of 17 tokens: ids (N, S) to logits (N, S, 17)."""

    def __init__(self, vocabulary: int = 17, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.mix = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.embed(ids))[0])


def low_tokens(prompts, completions, completion_ids, **columns):
    """Share of a response's tokens below 8."""
    return [sum(token < 8 for token in ids) / len(ids) for ids in completion_ids]


def some_log_ratios() -> tuple[torch.Tensor, torch.Tensor]:
    """Four responses of 5, 3, 1 and 4 tokens; what lies in the padding is absurd on purpose."""
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(4, 5, generator=generator, dtype=torch.float64) / 2
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4])[:, None]
    return d.masked_fill(~mask, 1e6), mask


def mean_by_definition(d: torch.Tensor, mask: torch.Tensor, p: float) -> list[float]:
    values = []
    for row, keep in zip(d, mask):
        ratios = [math.exp(x) for x in row[keep].tolist()]
        if p == 0:
            values.append(math.prod(ratios) ** (1 / len(ratios)))
        else:
            values.append((sum(r**p for r in ratios) / len(ratios)) ** (1 / p))
    return values


# ------------------------------------------------------------------------- ratio mathematics


@pytest.mark.parametrize("p", [-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
def test_harmonic_mean_policy_optimization_means_are_those_of_the_definition(p: float) -> None:
    d, mask = some_log_ratios()
    assert log_power_mean(d, mask, p).exp().tolist() == pytest.approx(
        mean_by_definition(d, mask, p), rel=1e-12
    )


def test_harmonic_mean_policy_optimization_harmonic_mean_in_numbers() -> None:
    ratios = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    means = {p: float(log_power_mean(ratios.log(), mask, p).exp()) for p in (-1, 0, 1)}
    assert means == pytest.approx({-1: 12 / 7, 0: 2, 1: 7 / 3}, rel=1e-14)
    weights = power_mean_weights(ratios.log(), mask, -1)
    assert weights[0].tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7], rel=1e-14)


def test_harmonic_mean_policy_optimization_means_are_ordered() -> None:
    d, mask = some_log_ratios()
    harmonic, geometric, arithmetic = (log_power_mean(d, mask, p) for p in (-1, 0, 1))
    many = mask.sum(1) > 1
    assert bool((harmonic < geometric)[many].all()) and bool((geometric < arithmetic)[many].all())
    one = ~many
    assert torch.equal(harmonic[one], arithmetic[one]), "one token: every mean is its ratio"


def test_harmonic_mean_policy_optimization_all_means_are_1_at_identical_policies() -> None:
    _, mask = some_log_ratios()
    for p in (-3.0, -1.0, 0.0, 1.0, 3.0):
        assert torch.equal(log_power_mean(torch.zeros(4, 5), mask, p), torch.zeros(4))


def test_harmonic_mean_policy_optimization_mean_of_a_response_ignores_the_batch() -> None:
    d, mask = some_log_ratios()
    together = log_power_mean(d, mask, -1.0)
    alone = torch.cat([log_power_mean(d[i : i + 1], mask[i : i + 1], -1.0) for i in range(4)])
    assert torch.allclose(together, alone, rtol=0, atol=1e-14), "but for the last bits"


def test_harmonic_mean_policy_optimization_gradient_is_the_token_weight() -> None:
    d, mask = some_log_ratios()
    d = d.masked_fill(~mask, 0).requires_grad_()
    log_power_mean(d, mask, -1.0).sum().backward()
    assert torch.allclose(d.grad, power_mean_weights(d.detach(), mask, -1.0), rtol=0, atol=1e-15)
    torch.autograd.gradcheck(lambda x: log_power_mean(x, mask, -1.0), (d,))


# ------------------------------------------------------------------------------- AGM history


def history(arithmetic: float, harmonic: float, steps: int) -> list[tuple[float, float]]:
    """The pairs (A_n, H_n) of the iteration A' = (A + H) / 2, H' = 2 A H / (A + H)."""
    pairs = [(arithmetic, harmonic)]
    for _ in range(steps):
        a, h = pairs[-1]
        pairs.append(((a + h) / 2, 2 * a * h / (a + h)))
    return pairs


def first_means() -> tuple[list[float], list[float]]:
    """A_0 and H_0 of the responses with several tokens."""
    d, mask = some_log_ratios()
    return tuple(log_power_mean(d, mask, p).exp()[[0, 1, 3]].tolist() for p in (1.0, -1.0))


def test_harmonic_mean_policy_optimization_agm_history_contracts_monotonically() -> None:
    for arithmetic, harmonic in zip(*first_means()):
        pairs = history(arithmetic, harmonic, 4)
        gaps = [a - h for a, h in pairs]
        assert gaps[0] > 0 and gaps[-1] < 1e-12
        assert all(later <= 0.5 * gap for gap, later in itertools.pairwise(gaps))
        for a, h in pairs:
            assert a * h == pytest.approx(arithmetic * harmonic, rel=1e-14), "A H never changes"


def test_harmonic_mean_policy_optimization_agm_history_has_a_closed_form() -> None:
    for arithmetic, harmonic in zip(*first_means()):
        log_gap = torch.tensor(math.log(arithmetic / harmonic), dtype=torch.float64)
        for n, (a, h) in enumerate(history(arithmetic, harmonic, 3)):
            # The loop's own rounding of a / h is what the tolerance allows.
            assert float(ahm_iterate(log_gap, n)) == pytest.approx(math.log(a / h), abs=1e-14)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-8])
def test_harmonic_mean_policy_optimization_agm_history_length_is_known(tolerance: float) -> None:
    for arithmetic, harmonic in zip(*first_means()):
        log_gap = torch.tensor(math.log(arithmetic / harmonic), dtype=torch.float64)
        pairs = history(arithmetic, harmonic, 12)
        needed = next(n for n, (a, h) in enumerate(pairs) if (a - h) / (a + h) <= tolerance)
        assert int(ahm_steps(log_gap, tolerance)) == needed


def test_harmonic_mean_policy_optimization_agm_history_ends_at_sqrt_of_a_times_h() -> None:
    ratios = torch.tensor([[1.0, 1.0, 8.0]], dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    limit = history(10 / 3, 3 / (1 + 1 + 1 / 8), 8)[-1][0]
    assert float(ahm_mean(ratios.log(), mask).exp()) == pytest.approx(limit, rel=1e-14)
    assert limit == pytest.approx(2.169305, abs=1e-6), "not the geometric mean, which is 2"


# ------------------------------------------------------- sampling, trainers, GSPO, MuonClip


def test_log_probs_of_sampled_responses_are_those_recorded_while_sampling() -> None:
    torch.manual_seed(0)
    policy = TinyPolicy()
    ids = torch.tensor([[5, 6, 7], [8, 9, 4]])
    rollout = sample_responses_batch(
        policy, ids, **SAMPLING, generator=torch.Generator().manual_seed(1)
    )
    again = compute_log_probs_batch(
        policy, rollout.input_ids, rollout.attention_mask, rollout.response_ids.shape[1]
    )
    assert rollout.response_ids.shape[0] == 16
    assert torch.allclose(again, rollout.old_logprobs, rtol=0, atol=1e-5)


def make_trainer(kind: str, policy: nn.Module, **changes):
    ref = copy.deepcopy(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
    common = SAMPLING | {"minibatches": 2} | changes
    if kind == "gspo":
        # GSPO's own bounds suit long responses; six tokens need a wider band.
        config = GSPOConfig(epsilon_low=0.2, epsilon_high=0.2, **common)
        return GSPOTrainer(policy, ref, optimizer, config, low_tokens)
    if kind == "hmpo":
        return HMPOTrainer(policy, ref, optimizer, HMPOConfig(**common), low_tokens)
    config = PowerMeanConfig(mean_type=kind, **common)
    return PowerMeanTrainer(policy, ref, optimizer, config, low_tokens)


@pytest.mark.parametrize("kind", ["hmpo", "arithmetic", "geometric", "harmonic", "power", "gspo"])
def test_update_step_trains_and_measures(kind: str) -> None:
    torch.manual_seed(0)
    policy = TinyPolicy()
    before = copy.deepcopy(policy.state_dict())
    trainer = make_trainer(kind, policy)
    metrics = trainer.update_step(PROMPTS)
    assert all(isinstance(value, float | int) for value in metrics.values())
    for name in ("loss", "grad_norm", "reward/mean"):
        assert math.isfinite(metrics[name]), name
    assert metrics["update_skipped"] == 0 and trainer.step == 2
    assert any(not torch.equal(v, before[k]) for k, v in policy.state_dict().items())


@pytest.mark.parametrize("kind", ["hmpo", "gspo"])
def test_training_raises_the_reward(kind: str) -> None:
    torch.manual_seed(0)
    trainer = make_trainer(kind, TinyPolicy())
    rewards = [trainer.update_step(PROMPTS)["reward/mean"] for _ in range(20)]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.25


def test_hmpo_is_the_harmonic_member_and_refuses_another_exponent() -> None:
    weights = []
    for kind in ("hmpo", "harmonic"):
        torch.manual_seed(0)
        policy = TinyPolicy()
        make_trainer(kind, policy).update_step(PROMPTS)
        weights.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    assert torch.equal(*weights)
    with pytest.raises(ValueError, match="expected -1 in HMPOConfig"):
        HMPOConfig(mean_type="arithmetic")


def attention_model(spread: float) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=spread,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def muon_clip_step(model: nn.Module, threshold: float) -> MuonClip:
    optimizer = MuonClip(
        torch.optim.SGD(model.parameters(), lr=0.0), MuonClipConfig(max_qk_score=threshold)
    )
    optimizer.attach(model)
    ids = torch.randint(3, 20, (2, 12), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids).logits.square().mean().backward()
    optimizer.step(model=model)
    return optimizer


def test_muon_clip_brings_the_largest_attention_logit_to_its_threshold() -> None:
    model = attention_model(spread=0.6)
    before = muon_clip_step(model, threshold=5.0).last_stats
    assert before.max_logit > 5.0 and before.clipped_heads > 0
    after = muon_clip_step(model, threshold=5.0).last_stats
    assert after.max_by_layer["model.layers.0.self_attn"] <= 5.0 * (1 + 1e-4)


def test_muon_clip_leaves_a_healthy_model_untouched() -> None:
    model = attention_model(spread=0.02)
    weights = copy.deepcopy(model.state_dict())
    stats = muon_clip_step(model, threshold=100.0).last_stats
    assert stats.max_logit < 100.0 and stats.clipped_heads == 0
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
