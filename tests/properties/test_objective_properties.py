"""Invariances of the surrogate and of the advantages, for every member of the family."""

import dataclasses
import math

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from hmpo import members
from hmpo.advantages import group_advantages, zero_variance_groups
from hmpo.objective import count_denominators, power_mean_loss

MEMBERS = [make() for make in members.BY_NAME.values()]
clipping = st.builds(
    dataclasses.replace,
    st.sampled_from([m for m in MEMBERS if m.gate == "clip" and m.exponent.kind != "matched"]),
    p=st.floats(-5, 5),
    clip_level=st.sampled_from(["token", "sequence", "none"]),
)
configs = st.one_of(clipping, st.sampled_from(MEMBERS))
rewards = st.lists(st.integers(-1000, 1000), min_size=12, max_size=12)


@st.composite
def batches(draw):
    """Log ratios (N, T), mask with holes and empty rows, advantages of either sign or 0."""
    rows, width = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    cells = st.lists(st.floats(-3, 3), min_size=width, max_size=width)
    keep = st.lists(st.booleans(), min_size=width, max_size=width)
    d = torch.tensor(draw(st.lists(cells, min_size=rows, max_size=rows)), dtype=torch.float64)
    mask = torch.tensor(draw(st.lists(keep, min_size=rows, max_size=rows)))
    advantages = draw(st.lists(st.floats(-3, 3), min_size=rows, max_size=rows))
    return d, mask, torch.tensor(advantages, dtype=torch.float64)


def evaluate(config, d, mask, advantages, **options):
    logprobs = d.clone().requires_grad_()
    loss = power_mean_loss(logprobs, torch.zeros_like(d), mask, advantages, config, **options)
    loss.backward()
    return loss.detach(), logprobs.grad


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@given(configs, batches(), st.data())
def test_any_split_into_micro_batches_adds_up(config, inputs, data):
    d, mask, advantages = inputs
    order = torch.tensor(data.draw(st.permutations(range(len(d)))))
    cut = data.draw(st.integers(0, len(d)))
    loss, grad = evaluate(config, d, mask, advantages)
    total, pieces = torch.zeros_like(loss), torch.zeros_like(grad)
    for rows in (order[:cut], order[cut:]):
        part = evaluate(
            config,
            d[rows],
            mask[rows],
            advantages[rows],
            denominators=count_denominators(mask),
        )
        total += part[0]
        pieces[rows] = part[1]
    close(total, loss)
    close(pieces, grad)


@given(configs, batches(), st.integers(0, 4), st.sampled_from([0.0, math.nan, math.inf, 1e30]))
def test_padding_does_not_matter(config, inputs, amount, garbage):
    d, mask, advantages = inputs
    wide = torch.cat([d, torch.zeros(len(d), amount, dtype=torch.float64)], 1)
    wider = torch.cat([mask, torch.zeros(len(d), amount, dtype=torch.bool)], 1)
    dirty = torch.where(wider, wide, torch.full_like(wide, garbage))
    loss, grad = evaluate(config, d, mask, advantages)
    padded_loss, padded_grad = evaluate(config, dirty, wider, advantages)
    close(padded_loss, loss)
    close(padded_grad[:, : d.shape[1]], grad)
    assert not padded_grad[:, d.shape[1] :].any()


@given(configs, batches(), st.randoms(use_true_random=False))
def test_order_of_tokens_and_responses_does_not_matter(config, inputs, random):
    d, mask, advantages = inputs
    rows = torch.tensor(random.sample(range(len(d)), len(d)))
    columns = torch.tensor(random.sample(range(d.shape[1]), d.shape[1]))
    loss, grad = evaluate(config, d, mask, advantages)
    other, moved = evaluate(config, d[rows][:, columns], mask[rows][:, columns], advantages[rows])
    close(other, loss)
    close(moved, grad[rows][:, columns])


@given(configs, batches(), st.floats(0.125, 8))
def test_linear_in_the_advantages(config, inputs, factor):
    d, mask, advantages = inputs
    loss, grad = evaluate(config, d, mask, advantages)
    scaled, scaled_grad = evaluate(config, d, mask, factor * advantages)
    close(scaled, factor * loss)
    close(scaled_grad, factor * grad)


@given(clipping, batches())
def test_clipped_surrogate_is_a_lower_bound(config, inputs):
    """The clip only ever makes the objective smaller: it is pessimistic."""
    clipped, _ = evaluate(config, *inputs)
    free, _ = evaluate(dataclasses.replace(config, clip_level="none"), *inputs)
    assert clipped.item() >= free.item() - 1e-12 * (1 + abs(free.item()))


@given(configs, batches())
def test_gradient_pushes_in_the_direction_of_the_advantage(config, inputs):
    d, mask, advantages = inputs
    _, grad = evaluate(config, d, mask, advantages)
    assert (grad * advantages.unsqueeze(1) <= 0).all()


@given(rewards, st.integers(-50, 50), st.integers(1, 50), st.sampled_from([2, 3, 4, 6, 12]))
def test_advantages_ignore_shift_and_scale_of_rewards(values, shift, factor, size):
    r = torch.tensor(values, dtype=torch.float64)
    base = group_advantages(r, size)
    close(group_advantages(r + shift, size), base)
    close(group_advantages(r * factor, size), base)
    centred = group_advantages(r, size, scale="none")
    torch.testing.assert_close(
        group_advantages(r * factor, size, scale="none"), factor * centred, rtol=1e-12, atol=1e-9
    )


@given(rewards, st.sampled_from([2, 3, 4, 6, 12]), st.sampled_from([0, 1]))
def test_advantages_of_a_group_have_mean_zero_and_unit_deviation(values, size, ddof):
    r = torch.tensor(values, dtype=torch.float64)
    groups = group_advantages(r, size, std_ddof=ddof).reshape(-1, size)
    equal = zero_variance_groups(r, size)
    assert groups.sum(1).abs().max() < 1e-12 * size * size
    assert not groups[equal].any()
    close(groups.square().sum(1) / (size - ddof), (~equal).double())


@given(rewards, st.sampled_from([2, 3, 4, 6]), st.data())
def test_groups_do_not_see_each_other_nor_invalid_rewards(values, size, data):
    r = torch.tensor(values, dtype=torch.float64)
    keep = data.draw(st.lists(st.booleans(), min_size=12, max_size=12))
    valid = torch.tensor(keep)
    dirty = torch.where(valid, r, torch.full_like(r, math.nan))
    ours = group_advantages(dirty, size, valid=valid)
    assert torch.equal(ours, group_advantages(r, size, valid=valid))
    assert not ours[~valid].any()
    for rows in torch.arange(12).split(size):
        assert torch.equal(ours[rows], group_advantages(dirty[rows], size, valid=valid[rows]))
        left = rows[valid[rows]]
        assume(len(left) >= 2)
        close(ours[left], group_advantages(r[left], len(left)))
