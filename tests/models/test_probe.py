"""What a policy does with padding, caches and lengths is found out, and what is right is taken."""

import logging

import pytest
import torch

from hmpo.errors import ModelError
from hmpo.logprobs.responses import token_logprobs
from hmpo.models.probe import policy_facts, refuse_length
from hmpo.sampling.engines import WholeSequences, start_engine
from hmpo.sampling.options import SamplingOptions
from hmpo.sampling.prefill import distinct_prompts
from hmpo.sampling.responses import sample_responses
from tests.models.families import FAMILIES, family
from tests.oracles.rows_alone import logprobs_alone
from tests.support import padded_prompts, tiny_causal, tiny_llama

SLOW = {"rwkv", "recurrent_gemma", "roberta", "openai-gpt", "nemotron_h"}
"""Families whose own cache does not give the logits of the whole sequence."""


def rollout(model, **options):
    ids, mask = padded_prompts(61)
    return sample_responses(
        model,
        ids,
        mask,
        group_size=2,
        max_length=5,
        eos_token=tuple(range(3, 9)),
        generator=torch.Generator().manual_seed(0),
        **options,
    )


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_is_sampled_and_scored_as_its_rows_alone(kind: str) -> None:
    model = family(kind)
    drawn = rollout(model)
    truth = logprobs_alone(model, drawn)
    scored = token_logprobs(
        model, drawn.input_ids, drawn.attention_mask, drawn.response_ids.shape[1]
    )
    assert (drawn.old_logprobs - truth).abs().max() < 1e-4
    assert (scored - truth).abs().max() < 1e-4
    assert policy_facts(model).cache == (kind not in SLOW)


@pytest.mark.parametrize("kind", ["rwkv", "recurrent_gemma"])
def test_rows_move_to_the_left_edge_where_padding_before_them_is_read(kind: str) -> None:
    model = family(kind)
    facts = policy_facts(model)
    assert not facts.left_padding and facts.right_padding
    assert "left_padding" in facts.obstacles


def test_the_way_that_is_taken_is_told(caplog) -> None:
    with caplog.at_level(logging.INFO, logger="hmpo"):
        rollout(family("rwkv"))
    assert "by whole sequences, which is slow" in caplog.text


def test_rows_go_alone_where_padding_is_read_on_both_sides() -> None:
    model = family("rwkv")
    facts = policy_facts(model)
    vars(facts).update(right_padding=False, bare_padding=False)
    drawn = rollout(model)
    truth = logprobs_alone(model, drawn)
    scored = token_logprobs(
        model, drawn.input_ids, drawn.attention_mask, drawn.response_ids.shape[1]
    )
    assert (drawn.old_logprobs - truth).abs().max() < 1e-5
    assert (scored - truth).abs().max() < 1e-5


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    with pytest.raises(ModelError, match="expected a causal language model"):
        policy_facts(family("bert"))
    assert policy_facts(family("bert", is_decoder=True)).cache


def test_asking_leaves_random_numbers_training_flags_and_weights_alone() -> None:
    model = family("gpt2").train()
    before, weights = torch.random.get_rng_state(), model.transformer.wte.weight.clone()
    policy_facts(model)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(module.training for module in model.modules())
    assert torch.equal(weights, model.transformer.wte.weight)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_policy_is_asked_once() -> None:
    model, calls = family("llama"), []
    model.register_forward_hook(lambda *_: calls.append(1))
    first = policy_facts(model)
    asked = len(calls)
    assert policy_facts(model) is first and 0 < asked == len(calls) <= 20


def test_a_plain_module_is_taken_at_its_word() -> None:
    model = tiny_causal()
    assert policy_facts(model).obstacles == {} and policy_facts(model).context is None


ROPES = {
    "llama": {
        "max_position_embeddings": 12,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    },
    "phi3": {
        "max_position_embeddings": 96,
        "original_max_position_embeddings": 12,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
            "long_factor": [1.5, 2.0, 4.0, 8.0], "original_max_position_embeddings": 12,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_a_rotary_embedding_that_changes_with_the_length_is_refused_beyond_it(kind: str) -> None:
    model = family(kind, **ROPES[kind])
    assert policy_facts(model).one_rope == 12
    ids = torch.randint(3, 61, (2, 7))
    drawn = sample_responses(model, ids, max_length=5, eos_token=60)
    truth = logprobs_alone(model, drawn)
    assert (drawn.old_logprobs - truth).abs().max() < 1e-4
    with pytest.raises(ModelError, match="longest row has more than 12"):
        sample_responses(model, ids, max_length=6, eos_token=60)
    long = torch.randint(3, 61, (1, 13))
    with pytest.raises(ModelError, match="longest row has more than 12"):
        token_logprobs(model, long, torch.ones_like(long, dtype=torch.bool), 4)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_prompt_and_response_beyond_the_positions_are_refused_before_the_first_token(kind) -> None:
    sizes = {"opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}}
    model = family(kind, max_position_embeddings=16, **sizes.get(kind, {}))
    ids = torch.randint(3, 61, (2, 10))
    assert sample_responses(model, ids, max_length=6, eos_token=60).lengths.max() <= 6
    with pytest.raises(ModelError, match=r"has 16 positions; lower max_length"):
        sample_responses(model, ids, max_length=7, eos_token=60)
    refuse_length(model, 16, "row")


def test_models_without_a_cache_of_their_own_read_whole_sequences() -> None:
    model = family("rwkv").eval()
    ids, mask = padded_prompts(61)
    options = SamplingOptions(max_length=3)
    with torch.no_grad():
        engine = start_engine(model, distinct_prompts(ids, mask, 2), options, fast=False)
    assert isinstance(engine, WholeSequences)


def test_a_bfloat16_copy_has_its_buffers_in_bfloat16_too() -> None:
    sizes = {"d_model": 32, "ffn_dim": 40, "num_layers": 1, "attention_heads": 4}
    drawn = rollout(family("xglm", **sizes), dtype=torch.bfloat16)
    expected = logprobs_alone(family("xglm", **sizes).bfloat16(), drawn)
    assert (drawn.sampling_logprobs - expected).abs().max() < 0.1


def test_rotary_frequencies_stay_exact_in_a_bfloat16_copy() -> None:
    model = tiny_llama(61)
    seen = []
    rotary = model.model.rotary_emb
    rotary.register_forward_hook(lambda module, *_: seen.append(module.inv_freq.dtype))
    rollout(model, dtype=torch.bfloat16, decoder="module")
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "rwkv"])
def test_a_pad_token_beyond_the_vocabulary_is_embedded_as_another(kind: str) -> None:
    model = family(kind)
    plain, beyond = rollout(model), rollout(model, pad_token=999)
    shown = beyond.response_ids.masked_fill(~beyond.response_mask, 0)
    assert torch.equal(plain.response_ids.masked_fill(~plain.response_mask, 0), shown)
    assert torch.equal(plain.old_logprobs, beyond.old_logprobs)
    assert torch.equal(plain.response_mask, beyond.response_mask)


def test_asking_a_compiled_policy_compiles_nothing() -> None:
    model = family("llama")
    model.model.layers[0].mlp.compile(backend=lambda graph, inputs: pytest.fail("compiled"))
    assert policy_facts(model).cache
