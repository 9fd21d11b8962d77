"""Gradients of objectives on recorded batches: by the oracle, in both spaces, and their angles."""

import math

import pytest
import torch

from hmpo.config import TrainerConfig
from hmpo.lab.probe import directions as module
from hmpo.lab.probe.directions import (
    cosine_distances,
    parameter_directions,
    thinning,
    token_direction,
)
from hmpo.lab.probe.measures import expected_cosine, expected_distance
from hmpo.lab.probe.variants import (
    EXPONENTS,
    Variant,
    exponent_variants,
    member_variants,
    plain,
)
from hmpo.logprobs.responses import token_logprobs
from hmpo.types import Rollout
from tests.lab.probe.recorded import recorded, rows_of
from tests.oracles import token_weights as oracle
from tests.support import padded_prompts, tiny_llama


def variant(p: float, clip: float | None = None) -> Variant:
    return Variant(name=f"{p}", kind="exponent", objective=plain(p, clip))


@pytest.mark.parametrize("clip", [None, 0.4])
@pytest.mark.parametrize("seed", range(5))
def test_token_gradients_and_their_angles_are_those_of_the_slow_loop(
    seed: int, clip: float | None
) -> None:
    batch = recorded(seed, sigma=(0.05, 0.3, 1.0, 0.3, 2.0)[seed])
    d, a = rows_of(batch)
    expected = [oracle.direction(d, a, p, clip) for p in EXPONENTS]
    found = [token_direction(batch, variant(p, clip)) for p in EXPONENTS]
    for mine, theirs in zip(found, expected, strict=True):
        flat = torch.tensor([v for row in theirs for v in row], dtype=torch.float64)
        torch.testing.assert_close(mine[batch.mask], flat, rtol=1e-12, atol=1e-15)
        assert bool((mine[~batch.mask] == 0).all())
    distances = cosine_distances(torch.stack(found).flatten(1))
    for i, one in enumerate(expected):
        for j, other in enumerate(expected):
            assert float(distances[i, j]) == pytest.approx(1 - oracle.cosine(one, other), abs=1e-12)


def test_weights_of_tokens_and_of_responses_scale_the_gradient() -> None:
    batch = recorded()
    whole = token_direction(batch, variant(-1.0))
    rows = torch.rand(9, dtype=torch.float64)
    tokens = torch.rand(9, 12, dtype=torch.float64)
    by_row = token_direction(recorded(weights=rows), variant(-1.0))
    by_token = token_direction(recorded(weights=tokens), variant(-1.0))
    torch.testing.assert_close(by_row, whole * rows[:, None], rtol=1e-12, atol=0)
    torch.testing.assert_close(by_token, whole * tokens, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sigma", [0.05, 0.3, 0.6])
def test_the_cosine_of_two_exponents_is_what_normal_log_ratios_give(sigma: float) -> None:
    pairs = [(-2.0, 0.0), (-1.0, 0.0), (0.5, 0.0), (1.0, 0.0), (2.0, 0.0), (-1.0, 1.0)]
    found = torch.zeros(24, len(pairs), dtype=torch.float64)
    for seed in range(len(found)):
        batch = recorded(
            seed, rows=1, length=20_000, sigma=sigma, advantages=torch.ones(1).double()
        )
        for k, pair in enumerate(pairs):
            vectors = torch.stack([token_direction(batch, variant(p))[batch.mask] for p in pair])
            found[seed, k] = 1 - cosine_distances(vectors)[0, 1]
    mean, error = found.mean(0), found.std(0) / math.sqrt(len(found))
    for k, pair in enumerate(pairs):
        bias = expected_distance(*pair, sigma) * 2e-2  # a ratio of means over 20,000 tokens
        assert abs(float(mean[k]) - expected_cosine(*pair, sigma)) < 5 * float(error[k]) + bias, (
            pair
        )
        assert 1 - expected_cosine(*pair, sigma) == pytest.approx(expected_distance(*pair, sigma))


def test_a_small_angle_keeps_its_digits_and_none_exists_beside_zero() -> None:
    angle = 1e-7
    rows = [[1.0, 0.0], [math.cos(angle), math.sin(angle)], [0.0, 0.0], [-3.0, 0.0]]
    scale = torch.tensor([[1e-200], [1e150], [1.0], [1.0]], dtype=torch.float64)
    found = cosine_distances(scale * torch.tensor(rows, dtype=torch.float64))
    assert float(found[0, 1]) == pytest.approx(angle**2 / 2, rel=1e-6, abs=0)
    assert float(found[0, 3]) == pytest.approx(2)
    assert bool(found[2].isnan().all()) and bool(found[:, 2].isnan().all())


def rollout_of(model) -> Rollout:
    ids, mask = padded_prompts()
    response = torch.randint(3, 40, (3, 5), generator=torch.Generator().manual_seed(2))
    kept = torch.arange(5) < torch.tensor([5, 2, 4])[:, None]
    return Rollout(
        prompt_ids=ids,
        prompt_mask=mask,
        response_ids=response.masked_fill(~kept, 0),
        response_mask=kept,
        old_logprobs=torch.zeros(3, 5),
        sampling_logprobs=torch.zeros(3, 5),
        finished=torch.ones(3, dtype=torch.bool),
        group_size=3,
    )


@pytest.mark.parametrize("micro", [None, 2])
def test_the_space_of_weights_is_the_jacobian_applied_to_each_direction(micro: int | None) -> None:
    model = tiny_llama()
    rollout = rollout_of(model)
    directions = torch.randn(4, 3, 5, dtype=torch.float64) * rollout.response_mask
    directions[2] = directions[0]
    directions[3] = 0
    found = parameter_directions(
        model, rollout, directions, TrainerConfig(micro_batch_size=micro, temperature=0.7)
    )
    for direction, vector in zip(directions, found, strict=True):
        model.zero_grad()
        logprobs = token_logprobs(
            model, rollout.input_ids, rollout.attention_mask, 5, temperature=0.7
        )
        (logprobs * direction.to(logprobs)).sum().backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        flat = torch.cat([g.flatten() for g in grads])
        torch.testing.assert_close(vector, flat, rtol=1e-4, atol=1e-5)
    assert torch.equal(found[0], found[2]) and not bool(found[3].any())


def test_gradients_in_the_parameters_are_left_alone_and_of_too_many_weights_some_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_llama()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    rollout = rollout_of(model)
    directions = torch.randn(2, 3, 5, dtype=torch.float64) * rollout.response_mask
    whole = parameter_directions(model, rollout, directions, TrainerConfig())
    assert thinning(model, 2) == 1
    monkeypatch.setattr(module, "LARGEST", whole.numel())  # a quarter of its bytes
    assert thinning(model, 2) == 4
    some = parameter_directions(model, rollout, directions, TrainerConfig())
    assert torch.equal(some, whole[:, ::4])
    assert bool((model.lm_head.weight.grad == 1).all())
    assert all(p.grad is None for p in model.parameters() if p is not model.lm_head.weight)


def test_every_member_has_a_gradient_and_on_policy_only_weights_of_responses_tell_them_apart() -> (
    None
):
    batch = recorded(sigma=0.0)
    members = member_variants(batch.rewards)
    vectors = torch.stack([token_direction(batch, v)[batch.mask] for v in members])
    plain_vectors = torch.stack(
        [token_direction(batch, v)[batch.mask] for v in exponent_variants(EXPONENTS, 0.4)]
    )
    assert float(cosine_distances(plain_vectors).max()) < 1e-14
    distances = cosine_distances(vectors)
    for i, one in enumerate(members):
        for j, other in enumerate(members):
            if one.objective.reduction == other.objective.reduction:
                assert float(distances[i, j]) < 1e-14, (one.name, other.name)
