"""Invariances of the surrogate and of the advantages, for every member of the family."""

import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hmpo import members
from hmpo.config import ExponentConfig, ObjectiveConfig
from hmpo.objective.advantages import group_advantages, zero_variance_groups
from hmpo.objective.loss import power_mean_loss
from hmpo.objective.terms import count_denominators, minibatch_band
from hmpo.types import Denominators

MEMBERS = [make() for make in members.BY_NAME.values()]
PLAIN = [m for m in MEMBERS if m.gate == "clip" and m.exponent.kind != "matched"]
clipping = st.builds(
    dataclasses.replace,
    st.sampled_from([m for m in PLAIN if m.token_clamp is None]),
    p=st.floats(-5, 5),
    clip_level=st.sampled_from(["token", "sequence", "none"]),
)
clamped = st.builds(
    dataclasses.replace,
    st.sampled_from([m for m in PLAIN if m.token_clamp is not None]),
    p=st.floats(-5, 5),
    clip_level=st.sampled_from(["sequence", "none"]),
)
configs = st.one_of(clipping, clamped, st.sampled_from(MEMBERS))
unordered = configs.filter(lambda config: config.weight.level != "prefix")
pulled = ("drpo", "dro")
"""Members that draw a token back to the old policy, whatever its advantage."""
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


BANDED = [
    ObjectiveConfig(
        name=f"drift_{width}", p=-1.0, clip_level="sequence", clip_center="drift", clip_width=width
    )
    for width in ("absolute", "z")
]


@pytest.mark.parametrize("config", [*MEMBERS, *BANDED], ids=lambda config: config.name)
@settings(max_examples=20)
@given(inputs=batches(), ranks=st.sampled_from([2, 4]), data=st.data())
def test_any_split_over_ranks_sums_to_the_gradient_of_the_whole(config, inputs, ranks, data):
    """Each rank takes its rows through its own copy of the parameters, in micro-batches.

    The ranks share the sums of their counts, and the band where there is one, and afterwards add
    up their gradients. A rank may be without rows, and a row without tokens.
    """
    d, mask, advantages = inputs
    places = st.lists(st.integers(0, 2 * ranks - 1), min_size=len(d), max_size=len(d))
    place = torch.tensor(data.draw(places))  # 2 micro-batches on each rank
    columns = torch.arange(1, d.numel() * 3 + 1, dtype=torch.float64)
    features = torch.sin(columns).reshape(*d.shape, 3)
    band = minibatch_band(d, torch.zeros_like(d), mask, advantages, config)

    def gradient(rows, **shared):
        parameters = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        logprobs = d[rows] + features[rows] @ parameters
        old = torch.zeros_like(d[rows])
        power_mean_loss(logprobs, old, mask[rows], advantages[rows], config, **shared).backward()
        return parameters.grad

    counts = [count_denominators(mask[place // 2 == rank]) for rank in range(ranks)]
    total = Denominators(
        sequences=sum(count.sequences for count in counts),
        tokens=sum(count.tokens for count in counts),
    )
    parts = [gradient(place == part, denominators=total, band=band) for part in range(2 * ranks)]
    whole = gradient(torch.ones(len(d), dtype=torch.bool))
    torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=1e-12, atol=1e-12)


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


@given(unordered, batches(), st.randoms(use_true_random=False))
def test_order_of_tokens_and_responses_does_not_matter(config, inputs, random):
    d, mask, advantages = inputs
    rows = torch.tensor(random.sample(range(len(d)), len(d)))
    columns = torch.tensor(random.sample(range(d.shape[1]), d.shape[1]))
    loss, grad = evaluate(config, d, mask, advantages)
    other, moved = evaluate(config, d[rows][:, columns], mask[rows][:, columns], advantages[rows])
    close(other, loss)
    close(moved, grad[rows][:, columns])


@given(configs, batches(), st.data())
def test_a_response_does_not_see_the_others(config, inputs, data):
    """With the whole's denominators each row has the same part in any company."""
    d, mask, advantages = inputs
    counts = {"denominators": count_denominators(mask)}
    _, grad = evaluate(config, d, mask, advantages, **counts)
    row = data.draw(st.integers(0, len(d) - 1))
    other = torch.flip(advantages, [0])
    strange = torch.where(torch.arange(len(d)).unsqueeze(1) == row, d, -2 * d.flip(0) + 0.3)
    other[row] = advantages[row]
    close(evaluate(config, strange, mask, other, **counts)[1][row], grad[row])


@given(st.floats(-5, 5), st.sampled_from(["power", "ahm"]), batches(), st.floats(-2, 2))
def test_scaling_all_ratios_scales_the_surrogate(p, mean, inputs, shift):
    """M_p(c r) = c M_p(r), for value and gradient, without a clip."""
    config = ObjectiveConfig(mean=mean, p=p, clip_level="none")
    d, mask, advantages = inputs
    loss, grad = evaluate(config, d, mask, advantages)
    moved, moved_grad = evaluate(config, d + shift, mask, advantages)
    factor = math.exp(shift)
    torch.testing.assert_close(moved, factor * loss, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(moved_grad, factor * grad, rtol=1e-10, atol=1e-11)


@given(batches(), st.sampled_from([1.0, -1.0]))
def test_large_exponents_go_to_the_largest_and_smallest_ratio(inputs, sign):
    d, mask, advantages = inputs
    loss, grad = evaluate(ObjectiveConfig(p=sign * 1e6, clip_level="none"), d, mask, advantages)
    edge = sign * (sign * d).masked_fill(~mask, -math.inf).amax(1).masked_fill(~mask.any(1), 0)
    expected = -(edge.exp() * advantages * mask.any(1)).sum() / mask.any(1).sum().clamp(min=1)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert grad.isfinite().all()


@given(clipping, batches(), st.floats(-5, 5))
def test_on_policy_every_mean_is_the_same(config, inputs, p):
    """All ratios 1: neither p nor the kind of mean matters, for value or gradient."""
    d, mask, advantages = inputs
    loss, grad = evaluate(config, 0 * d, mask, advantages)
    for change in ({"p": p}, {"mean": "ahm", "exponent": ExponentConfig()}):
        other = dataclasses.replace(config, **change)
        same, same_grad = evaluate(other, 0 * d, mask, advantages)
        close(same, loss)
        close(same_grad, grad)


@given(batches(), st.sampled_from([m for m in MEMBERS if m.reduction == "sequence_mean"]))
def test_on_policy_every_gradient_is_the_plain_policy_gradient(inputs, config):
    """SAPO's gate and matched exponents included."""
    d, mask, advantages = inputs
    _, grad = evaluate(config, 0 * d, mask, advantages)
    lengths, rows = mask.sum(1).clamp(min=1), mask.any(1).sum().clamp(min=1)
    close(grad, -advantages.unsqueeze(1) * mask / lengths.unsqueeze(1) / rows)


@given(
    st.sampled_from(["one", "drift"]),
    st.sampled_from(["absolute", "z"]),
    st.floats(-4, 4),
    batches(),
    st.data(),
)
def test_bands_of_the_whole_batch_survive_splits_padding_and_order(center, width, p, inputs, data):
    config = ObjectiveConfig(p=p, clip_level="sequence", clip_center=center, clip_width=width)
    d, mask, advantages = inputs
    loss, grad = evaluate(config, d, mask, advantages)
    band = minibatch_band(d, torch.zeros_like(d), mask, advantages, config)
    order = torch.tensor(data.draw(st.permutations(range(len(d)))))
    cut = data.draw(st.integers(0, len(d)))
    total, pieces = torch.zeros_like(loss), torch.zeros_like(grad)
    for rows in (order[:cut], order[cut:]):
        wide = torch.cat([d[rows], torch.full((len(rows), 2), math.nan).double()], 1)
        wider = torch.cat([mask[rows], torch.zeros(len(rows), 2, dtype=torch.bool)], 1)
        given = {"denominators": count_denominators(mask), "band": band}
        part = evaluate(config, wide, wider, advantages[rows], **given)
        total += part[0]
        pieces[rows] = part[1][:, : d.shape[1]]
    close(total, loss)
    close(pieces, grad)


@given(rewards, st.sampled_from([2, 3, 4, 6]), st.data())
def test_order_of_groups_does_not_matter(values, size, data):
    groups = torch.tensor(values, dtype=torch.float64).reshape(-1, size)
    order = torch.tensor(data.draw(st.permutations(range(len(groups)))))
    inside = torch.tensor(data.draw(st.permutations(range(size))))
    base = group_advantages(groups.reshape(-1), size).reshape(-1, size)
    moved = group_advantages(groups[order][:, inside].reshape(-1), size).reshape(-1, size)
    close(moved, base[order][:, inside])


@given(configs.filter(lambda c: c.name != "dro"), batches(), st.floats(0.125, 8))
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


@given(configs.filter(lambda c: c.name not in pulled), batches())
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
        close(ours[rows], group_advantages(dirty[rows], size, valid=valid[rows]))
        left = rows[valid[rows]]
        assume(len(left) >= 2)
        close(ours[left], group_advantages(r[left], len(left)))
