"""Sizes follow the preset until the memory says otherwise, in the order that is promised."""

import dataclasses

import pytest

from hmpo.config import PolicyConfig
from hmpo.config.reading import run_config
from hmpo.errors import ModelError
from hmpo.proposal import sizes
from hmpo.proposal.policy import look_at_policy
from hmpo.proposal.sizes import PRESETS, fit_memory, prompt_tokens, response_tokens

LAPTOP = PRESETS["laptop"]


@pytest.fixture(scope="module")
def policy(place):
    return look_at_policy(PolicyConfig(path=str(place / "llama")))


@pytest.fixture
def config(place):
    tables = {
        "policy": {"path": str(place / "llama")},
        "prompts_per_rollout": 8,
        "trainer": {"group_size": 4, "minibatches": 2, "micro_batch_size": 8, "max_length": 64},
        "eval": {"final_prompts": 8},
    }
    return run_config(tables)


@pytest.fixture
def bare(monkeypatch):
    """A process that holds nothing, so that only the run counts."""
    monkeypatch.setattr(sizes, "resident_bytes", lambda: 0)


def room(monkeypatch, config, policy, fit):
    """Give a machine just the memory of that run."""
    found = sizes.estimate(sizes.meta_policy(fit.policy), fit, 64, 0)
    monkeypatch.setattr(sizes, "available_bytes", lambda _: int(found.peak / sizes.ROOM) + 2)


def test_where_there_is_room_nothing_is_changed(config, policy, monkeypatch):
    monkeypatch.setattr(sizes, "available_bytes", lambda _: None)
    fit = fit_memory(config, LAPTOP, policy, 64, ())
    assert fit.config == config and not fit.adapters and not fit.card


def test_micro_batches_are_made_smaller_first(config, policy, monkeypatch, bare):
    small = dataclasses.replace(config.trainer, micro_batch_size=2)
    room(monkeypatch, config, policy, dataclasses.replace(config, trainer=small))
    fit = fit_memory(config, LAPTOP, policy, 64, ())
    assert fit.config.trainer == small and fit.config.policy == config.policy
    with pytest.raises(ModelError):
        fit_memory(config, LAPTOP, policy, 64, {"trainer.micro_batch_size"})


def test_large_models_get_adapters_and_small_ones_do_not(config, policy, monkeypatch):
    monkeypatch.setattr(sizes, "available_bytes", lambda _: None)
    eager = dataclasses.replace(LAPTOP, adapters_from=1e3)
    fit = fit_memory(config, eager, policy, 64, ())
    assert fit.config.policy.lora_rank == 16 and "more than 1.0k" in fit.adapters
    chosen = {"policy.lora_rank"}
    assert fit_memory(config, eager, policy, 64, chosen).config.policy.lora_rank == 0
    own = dataclasses.replace(policy, adapter=True)
    assert fit_memory(config, eager, own, 64, ()).config.policy.lora_rank == 0


def test_where_projections_are_missing_every_linear_layer_is_adapted(place, config, monkeypatch):
    monkeypatch.setattr(sizes, "available_bytes", lambda _: None)
    plain = look_at_policy(PolicyConfig(path=str(place / "plain")))
    tried = dataclasses.replace(config, policy=PolicyConfig(path=str(place / "plain")))
    fit = fit_memory(tried, dataclasses.replace(LAPTOP, adapters_from=1e3), plain, 64, ())
    assert fit.config.policy.lora_targets == "all-linear"


def test_what_fits_in_no_way_is_refused(config, policy, monkeypatch, bare):
    monkeypatch.setattr(sizes, "available_bytes", lambda _: 10_000)
    with pytest.raises(ModelError, match="take a smaller model") as caught:
        fit_memory(config, LAPTOP, policy, 64, ())
    assert "\n" not in str(caught.value)


def test_without_a_gpu_a_run_for_one_is_sized_for_a_card(config, policy):
    if sizes.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    fit = fit_memory(config, PRESETS["one-gpu"], policy, 64, ())
    assert fit.card and fit.available == sizes.CARD


def test_responses_are_as_long_as_the_data_want():
    def tokens(worked=(), short=(), template=True, thinks=False):
        options = {"worked": worked, "short": short, "template": template, "thinks": thinks}
        return response_tokens(LAPTOP, **options)[0]

    assert tokens() == LAPTOP.thoughts
    assert tokens(worked=[100] * 40) == 176 and tokens(worked=[9999]) == LAPTOP.longest
    assert tokens(worked=[3]) == LAPTOP.thoughts and tokens(worked=[3], template=False) == 32
    assert tokens(short=[3, 30], template=False) == 48 and tokens(short=[3, 30]) == LAPTOP.thoughts
    assert tokens(thinks=True) == 4 * LAPTOP.longest


def test_a_few_long_prompts_do_not_decide():
    assert prompt_tokens(LAPTOP, [30, 40]) == 48
    assert prompt_tokens(LAPTOP, [40] * 99 + [4000]) == LAPTOP.prompt_tokens
    assert prompt_tokens(LAPTOP, [3000] * 99 + [4000]) == 3008
