"""Sampling in bfloat16: from a copy of the weights, and under autocast."""

import copy
import logging

import pytest
import torch

from hmpo.config import GSPOConfig, MismatchConfig
from hmpo.logprobs.responses import token_logprobs
from hmpo.sampling.responses import sample_responses
from hmpo.trainer import rollout as collect
from hmpo.trainer.gspo import GSPOTrainer
from tests.sampling.test_decoder import build
from tests.support import padded_prompts, tiny_causal, tiny_llama
from tests.trainer.test_trainer import PROMPTS, low_tokens, settings, trainer_for, weights

KINDS = ["llama", "llama, biases, tied", "mistral", "qwen2", "qwen3"]


def rollout(model, *, autocast: bool = False, **options):
    ids, mask = padded_prompts()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return sample_responses(
            model,
            ids,
            mask,
            group_size=8,
            max_length=30,
            eos_token=39,
            generator=torch.Generator().manual_seed(0),
            **options,
        )


def errors(model, drawn) -> torch.Tensor:
    """Of the log-probs (nat), against the float64 forward pass of the model."""
    exact = copy.deepcopy(model).double()
    shape = drawn.input_ids, drawn.attention_mask, drawn.response_ids.shape[1]
    with torch.no_grad():
        truth = token_logprobs(exact, *shape)
    return (drawn.old_logprobs - truth).abs()[drawn.response_mask]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [{"autocast": True}, {"dtype": torch.bfloat16}])
def test_fast_bfloat16_is_as_near_to_exact_log_probs_as_the_modules_are(kind: str, how) -> None:
    model = build(kind, initializer_range=0.1)
    fast, slow = (rollout(model, decoder=decoder, **how) for decoder in ("auto", "module"))
    assert fast.fast and not slow.fast
    assert fast.old_logprobs.dtype == slow.old_logprobs.dtype == torch.float32
    mine, theirs = errors(model, fast), errors(model, slow)
    assert 1e-4 < mine.mean() < 1.3 * theirs.mean(), "rounded, and not more than it must be"
    assert mine.max() < 0.05


def test_a_bfloat16_model_is_sampled_as_before() -> None:
    model = build("llama", torch.bfloat16, initializer_range=0.1)
    one, two = rollout(model), rollout(model, dtype=torch.bfloat16)
    assert torch.equal(one.response_ids, two.response_ids)
    assert torch.equal(one.old_logprobs, two.old_logprobs)


@pytest.mark.parametrize("decoder", ["auto", "module"])
@pytest.mark.parametrize("kind", ["llama", "llama, biases, tied", "plain"])
def test_the_copy_is_of_the_weights_of_the_moment(kind: str, decoder: str) -> None:
    model = tiny_causal(40) if kind == "plain" else build(kind)
    before = rollout(model, dtype=torch.bfloat16, decoder=decoder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.mul_(0.7)  # leaves the version counter as it was
    after = rollout(model, dtype=torch.bfloat16, decoder=decoder)
    assert not torch.equal(before.old_logprobs, after.old_logprobs)
    assert errors(model, after).max() < 0.1
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "change", [{"sampling_dtype": "bfloat16"}, {"autocast": "bfloat16"}], ids=["copy", "autocast"]
)
@pytest.mark.parametrize("decoder", ["auto", "module"])
def test_old_log_probs_are_the_trainers_own_and_the_mismatch_is_measured(change, decoder) -> None:
    trainer = trainer_for(tiny_llama(), settings(decoder=decoder, **change))
    trainer.begin_rollout(PROMPTS, {})
    drawn = trainer.batch.rollout
    gap = (drawn.old_logprobs - drawn.sampling_logprobs).abs()[drawn.response_mask]
    assert gap.mean() > 0 and gap.max() < 0.5, "the modules may round alike in both passes"
    metrics = trainer.next_update()
    assert metrics["rollout/fast"] == (decoder == "auto")
    assert abs(metrics["ratio/d_mean"]) < (1e-6 if "sampling_dtype" in change else 0.02)
    found = {name: value for name, value in metrics.items() if name.startswith("mismatch/")}
    assert len(found) > 8 and all(torch.tensor(value).isfinite() for value in found.values())
    assert 0 <= found["mismatch/k3"] < 0.1


def test_corrections_apply_to_a_bfloat16_sampler() -> None:
    correction = MismatchConfig(correction="truncate", high=1.0)
    metrics, policies = [], []
    for mismatch in (MismatchConfig(), correction):
        model = tiny_llama()
        config = settings(sampling_dtype="bfloat16", mismatch=mismatch)
        metrics.append(trainer_for(model, config).update_step(PROMPTS))
        policies.append(weights(model))
    assert metrics[1]["mismatch/truncated_frac"] > 0
    assert not torch.equal(*policies)


def test_the_baseline_recomputes_old_log_probs_too() -> None:
    model = tiny_llama()
    config = GSPOConfig(
        group_size=4, max_length=6, eos_token=(2, 7), minibatches=2, sampling_dtype="bfloat16"
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trainer = GSPOTrainer(model, None, optimizer, config, low_tokens)
    drawn = trainer.collector.collect(PROMPTS, {}, index=0, step=0).rollout
    assert not torch.equal(drawn.old_logprobs, drawn.sampling_logprobs)


def test_a_run_resumed_in_the_middle_of_a_rollout_ends_with_the_same_bytes() -> None:
    config = settings(sampling_dtype="bfloat16")
    whole, first, second = tiny_llama(), tiny_llama(), tiny_llama(seed=1)
    straight = trainer_for(whole, config)
    for _ in range(2):
        straight.update_step(PROMPTS)
    killed = trainer_for(first, config)
    killed.begin_rollout(PROMPTS, {})
    killed.next_update()
    resumed = trainer_for(second, config)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed.load_state_dict(copy.deepcopy(killed.state_dict()))
    while resumed.pending_updates:
        resumed.next_update()
    resumed.update_step(PROMPTS)
    assert torch.equal(weights(whole), weights(second))


@pytest.mark.parametrize("fast", [True, False])
def test_a_machine_that_is_slow_at_bfloat16_is_told(fast: bool, monkeypatch, caplog) -> None:
    monkeypatch.setattr(collect, "_fast_at_bfloat16", lambda device: fast)
    with caplog.at_level(logging.WARNING, "hmpo.trainer.rollout"):
        trainer_for(tiny_llama(), settings(sampling_dtype="bfloat16"))
    assert ("no fast bfloat16 products" in caplog.text) == (not fast)
    caplog.clear()
    trainer_for(tiny_llama(), settings())
    assert not caplog.text
