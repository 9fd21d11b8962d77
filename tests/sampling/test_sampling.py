import itertools
import math

import pytest
import torch

from hmpo.errors import ConfigError, ShapeError
from hmpo.randomness import keyed_generator
from hmpo.sampling import draw
from hmpo.sampling.draw import draw_tokens
from hmpo.sampling.responses import sample_responses
from hmpo.trainer.base import minibatch_rows
from tests.oracles.logprobs import response_logprobs
from tests.support import padded_prompts, tiny_causal, tiny_llama


def seeded(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def sample(model, **changes):
    ids, mask = padded_prompts()
    options = {"group_size": 3, "max_length": 9, "eos_token": (2, 7), "generator": seeded()}
    return sample_responses(model, ids, mask, **(options | changes))


def test_sampling_deterministic_with_generator() -> None:
    model = tiny_llama()
    one, two, other = sample(model), sample(model), sample(model, generator=seeded(1))
    assert torch.equal(one.response_ids, two.response_ids)
    assert torch.equal(one.old_logprobs, two.old_logprobs)
    assert not torch.equal(one.response_ids, other.response_ids)


def test_the_global_generator_is_not_touched_when_one_is_given() -> None:
    model = tiny_llama()
    before = torch.get_rng_state()
    sample(model)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["llama", "plain"])
def test_kv_cache_equals_full_forward(kind: str) -> None:
    model = (tiny_llama() if kind == "llama" else tiny_causal(40)).double()
    fast, slow = sample(model), sample(model, use_cache=False)
    assert torch.equal(fast.response_ids, slow.response_ids)
    assert torch.equal(fast.finished, slow.finished)
    assert float((fast.old_logprobs - slow.old_logprobs).abs().max()) < 1e-12


def test_behaviour_logprobs_match() -> None:
    model = tiny_llama().double()
    rollout = sample(model, temperature=0.8)
    for i in range(len(rollout.finished)):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]].tolist()
        response = rollout.response_ids[i][rollout.response_mask[i]].tolist()
        expected, _ = response_logprobs(model.eval(), prompt, response, 0.8)
        assert rollout.old_logprobs[i, : len(response)].tolist() == pytest.approx(
            expected, abs=1e-12
        )
    assert rollout.sampling_logprobs is not None
    assert torch.equal(rollout.sampling_logprobs, rollout.old_logprobs)


def test_truncated_sampling_is_recorded_and_warned_of() -> None:
    model = tiny_llama().double()
    with pytest.warns(UserWarning, match="truncated distribution"):
        rollout = sample(model, top_k=3, top_p=0.9)
    mask = rollout.response_mask
    assert (rollout.sampling_logprobs[mask] >= rollout.old_logprobs[mask]).all()
    assert (rollout.sampling_logprobs[mask] > rollout.old_logprobs[mask]).any()


def test_sampling_invariant_to_left_padding() -> None:
    model = tiny_llama().double()
    ids, mask = padded_prompts()
    wide = torch.nn.functional.pad(ids, (5, 0), value=11)
    wide_mask = torch.nn.functional.pad(mask, (5, 0), value=False)
    options = {"group_size": 2, "max_length": 8}
    one = sample_responses(model, ids, mask, generator=seeded(), **options)
    two = sample_responses(model, wide, wide_mask, generator=seeded(), **options)
    assert torch.equal(one.response_ids, two.response_ids)
    assert torch.allclose(one.old_logprobs, two.old_logprobs, rtol=0, atol=1e-12)


def test_truncation_flag() -> None:
    rollout = sample(tiny_llama())
    last = rollout.response_ids.gather(1, (rollout.lengths - 1)[:, None])[:, 0]
    ended = (last == 2) | (last == 7)
    assert torch.equal(rollout.finished, ended)
    assert rollout.finished.any() and not rollout.finished.all()
    assert (rollout.lengths[~rollout.finished] == 9).all()
    body = rollout.response_ids.clone()
    body[torch.arange(len(body)), rollout.lengths - 1] = 5
    assert not ((body == 2) | (body == 7))[rollout.response_mask].any(), "an end token is the last"


def test_rows_do_not_depend_on_when_other_rows_finish() -> None:
    model = tiny_llama().double()
    ids, mask = padded_prompts()
    short = sample_responses(
        model, ids, mask, group_size=4, max_length=9, eos_token=(2, 7), generator=seeded()
    )
    free = sample_responses(
        model, ids, mask, group_size=4, max_length=9, eos_token=39 + 1000, generator=seeded()
    )
    for i, length in enumerate(short.lengths.tolist()):
        assert torch.equal(short.response_ids[i, :length], free.response_ids[i, :length])


@pytest.mark.parametrize("small", [0, 1024])
@pytest.mark.parametrize("width", [1, 100, 128, 300, 512])
def test_one_and_two_levels_draw_what_a_plain_walk_draws(small, width, monkeypatch) -> None:
    monkeypatch.setattr(draw, "SMALL", small)
    torch.manual_seed(width)
    logits = torch.randn(200, width, dtype=torch.float64) * 4
    logits[:, 1::3] = -torch.inf
    uniform = torch.rand(200, dtype=torch.float64, generator=seeded(1))
    uniform[:2] = torch.tensor([0.0, 1 - 2**-53])
    token, logprob, _ = draw_tokens(logits, uniform)
    for row, (probs, share) in enumerate(zip(logits.softmax(1).tolist(), uniform.tolist())):
        ends = list(itertools.accumulate(probs))
        assert probs[int(token[row])] > 0
        if share < 1 - 1e-12:  # there the sums' last bits decide
            assert int(token[row]) == sum(end <= share for end in ends)
        assert float(logprob[row]) == pytest.approx(math.log(probs[int(token[row])]), abs=1e-12)


@pytest.mark.parametrize("small", [0, 1024])
def test_draws_follow_the_distribution_by_chi_square(small: int, monkeypatch) -> None:
    monkeypatch.setattr(draw, "SMALL", small)
    torch.manual_seed(0)
    logits = torch.randn(1, 12) * 2
    draws = 60_000
    uniform = torch.rand(draws, dtype=torch.float64, generator=seeded(3))
    token, logprob, _ = draw_tokens(logits.expand(draws, -1), uniform, temperature=1.3)
    probs = (logits[0] / 1.3).double().softmax(0)
    counts = torch.bincount(token, minlength=12).double()
    statistic = float(((counts - draws * probs) ** 2 / (draws * probs)).sum())
    assert statistic < 31.3  # 99.9 % quantile of chi-square with 11 degrees of freedom
    assert torch.allclose(logprob.double().exp(), probs[token], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("top_k", "top_p"), [(4, 1.0), (0, 0.6), (5, 0.7), (1, 1.0)])
def test_truncation_keeps_the_right_tokens(top_k: int, top_p: float) -> None:
    torch.manual_seed(1)
    logits = torch.randn(1, 15, dtype=torch.float64) * 2
    probs = logits[0].softmax(0).tolist()
    order = sorted(range(15), key=lambda i: -probs[i])
    if top_k:
        order = order[:top_k]
    total = math.fsum(probs[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass >= top_p * total:
            break
        kept.append(i)
        mass += probs[i]
    uniform = torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1]
    token, logprob, drawn = draw_tokens(logits.expand(4000, -1), uniform, top_k=top_k, top_p=top_p)
    assert set(token.tolist()) <= set(kept)
    likely = [i for i in kept if probs[i] / mass > 1 / 1000]
    assert set(likely) <= set(token.tolist())
    expected = torch.tensor([math.log(probs[i] / mass) for i in token.tolist()])
    assert torch.allclose(drawn.float(), expected, rtol=0, atol=1e-6)
    full = torch.tensor([math.log(probs[i]) for i in token.tolist()])
    assert torch.allclose(logprob.float(), full, rtol=0, atol=1e-6)


def test_zero_temperature_takes_the_most_probable_token() -> None:
    model = tiny_llama()
    rollout = sample(model, temperature=0.0)
    again = sample(model, temperature=0.0, generator=seeded(9))
    assert torch.equal(rollout.response_ids, again.response_ids)
    groups = rollout.response_ids.view(3, 3, -1)
    assert (groups == groups[:, :1]).all()


def test_generators_and_minibatches_are_keyed_and_partition_the_rows() -> None:
    one = torch.rand(3, generator=keyed_generator(1, "rollout", 4))
    assert torch.equal(one, torch.rand(3, generator=keyed_generator(1, "rollout", 4)))
    for other in ((2, "rollout", 4), (1, "evaluation", 4), (1, "rollout", 5)):
        assert not torch.equal(one, torch.rand(3, generator=keyed_generator(*other)))
    parts = minibatch_rows(10, 4, seed=0, rollout=1, epoch=0)
    assert sorted(torch.cat(parts).tolist()) == list(range(10))
    assert [len(part) for part in parts] == [3, 3, 2, 2]
    later = minibatch_rows(10, 4, seed=0, rollout=1, epoch=1)
    assert torch.cat(parts).tolist() != torch.cat(later).tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "temperature: got -1.0, expected a number >= 0"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"group_size": 0}, "group_size: got 0"),
        ({"max_length": 0}, "max_length: got 0"),
    ],
)
def test_bad_options_are_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sample(tiny_causal(40), **changes)


def test_right_padded_and_empty_prompts_are_refused() -> None:
    ids, mask = padded_prompts()
    with pytest.raises(ShapeError, match="padding on the left"):
        sample_responses(tiny_causal(40), ids.flip(1), mask.flip(1))
    with pytest.raises(ShapeError, match="at least one token"):
        sample_responses(tiny_causal(40), ids[:, :0], mask[:, :0])
