"""What must hold for every response, whatever its length, its tokens and its neighbours."""

import math

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from hmpo.objective.means import ahm_mean, effective_sample_size, log_power_mean, power_mean_weights
from hmpo.objective.solve import solve_exponent

tokens = st.lists(st.floats(-10, 10), min_size=1, max_size=30)
exponents = st.one_of(
    st.floats(-50, 50), st.sampled_from([0.0, 1.0, -1.0, 1e-9, -1e-4, 0.5, 50.0, -50.0])
)
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def tensor(values):
    d = torch.tensor([values], dtype=torch.float64)
    return d, torch.ones_like(d, dtype=torch.bool)


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **(CLOSE | tolerance))


@given(tokens, exponents)
def test_between_the_smallest_and_the_largest_token(values, p):
    log_mean = log_power_mean(*tensor(values), p).item()
    assert min(values) - 1e-12 <= log_mean <= max(values) + 1e-12


@given(tokens, exponents, exponents)
def test_monotone_in_p(values, p, q):
    d, mask = tensor(values)
    low, high = log_power_mean(d, mask, min(p, q)), log_power_mean(d, mask, max(p, q))
    assert low.item() <= high.item() + 1e-12


@given(tokens, exponents, st.floats(-20, 20))
def test_homogeneous(values, p, shift):
    d, mask = tensor(values)
    close(log_power_mean(d + shift, mask, p), log_power_mean(d, mask, p) + shift, atol=1e-11)
    close(power_mean_weights(d + shift, mask, p), power_mean_weights(d, mask, p), atol=1e-10)


@given(tokens, exponents)
def test_inversion(values, p):
    d, mask = tensor(values)
    close(log_power_mean(d, mask, -p), -log_power_mean(-d, mask, p))


@given(tokens, exponents, st.randoms(use_true_random=False))
def test_order_of_tokens_does_not_matter(values, p, random):
    shuffled = random.sample(values, len(values))
    close(log_power_mean(*tensor(values), p), log_power_mean(*tensor(shuffled), p))


@given(tokens, exponents, st.integers(0, 9), st.floats(width=32))
def test_padding_does_not_matter(values, p, amount, garbage):
    d, mask = tensor(values)
    padded = torch.cat([d, torch.full((1, amount), garbage, dtype=torch.float64)], 1)
    wider = torch.arange(padded.shape[1]).unsqueeze(0) < len(values)
    close(log_power_mean(padded, wider, p), log_power_mean(d, mask, p))
    close(power_mean_weights(padded, wider, p)[:, : len(values)], power_mean_weights(d, mask, p))
    close(ahm_mean(padded, wider), ahm_mean(d, mask))


@given(st.lists(tokens, min_size=1, max_size=5), st.data())
def test_neighbours_do_not_matter(rows, data):
    p = torch.tensor([data.draw(exponents) for _ in rows], dtype=torch.float64)
    width = max(len(r) for r in rows)
    d = torch.tensor([r + [math.nan] * (width - len(r)) for r in rows], dtype=torch.float64)
    mask = torch.arange(width) < torch.tensor([len(r) for r in rows]).unsqueeze(1)
    whole = log_power_mean(d, mask, p)
    for i, values in enumerate(rows):
        close(whole[i : i + 1], log_power_mean(*tensor(values), p[i].item()))


@given(tokens)
def test_repeating_every_token_changes_nothing(values):
    for p in (-3.0, 0.0, 0.5):
        close(log_power_mean(*tensor(values), p), log_power_mean(*tensor(values * 3), p))


@given(tokens)
def test_limits(values):
    """|log M_p - extreme| <= log L / |p|."""
    d, mask = tensor(values)
    for p in (1e3, 1e6):
        room = math.log(len(values)) / p + 1e-9
        assert abs(log_power_mean(d, mask, p).item() - max(values)) <= room
        assert abs(log_power_mean(d, mask, -p).item() - min(values)) <= room


@given(tokens, exponents)
def test_weights_are_a_distribution_and_the_gradient(values, p):
    d, mask = tensor(values)
    weights = power_mean_weights(d, mask, p)
    assert (weights >= 0).all()
    close(weights.sum(1), torch.ones(1, dtype=torch.float64))
    x = d.clone().requires_grad_()
    log_power_mean(x, mask, p).sum().backward()
    assert torch.equal(x.grad, weights)


@given(tokens, exponents)
def test_slope_in_p_is_never_negative(values, p):
    exponent = torch.tensor(p, dtype=torch.float64, requires_grad=True)
    log_power_mean(*tensor(values), exponent).sum().backward()
    spread = max(values) - min(values)
    assert -1e-15 <= exponent.grad.item() <= spread**2 / 8 + 1e-12


@given(tokens, exponents)
def test_harmonic_geometric_arithmetic_and_their_limit(values, p):
    d, mask = tensor(values)
    low, middle, high = (log_power_mean(d, mask, q).item() for q in (-1.0, 0.0, 1.0))
    assert low - 1e-12 <= middle <= high + 1e-12
    assert low - 1e-12 <= ahm_mean(d, mask).item() <= high + 1e-12
    assert 0 < effective_sample_size(d, mask, p).item() <= 1


@given(tokens, st.floats(0.05, 0.999), st.sampled_from([1, -1]))
def test_solved_exponent_meets_its_target(values, target, sign):
    assume(max(values) - min(values) > 1e-3)
    d, mask = tensor(values)
    p = solve_exponent(d, mask, target, p_max=50.0, sign=sign)
    assert 0 <= sign * p.item() <= 50
    reached = effective_sample_size(d, mask, p).item()
    assert abs(reached - target) < 1e-9 or (abs(p.item()) == 50 and reached >= target)
