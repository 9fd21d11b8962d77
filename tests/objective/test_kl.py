import math

import pytest
import torch
from torch.autograd import gradcheck

from hmpo.errors import ConfigError
from hmpo.objective.kl import exp_minus_tangent, k1, k2, k3, token_kl


def exact_exp_minus_tangent(x):
    """exp(x) - 1 - x as a sum of its Taylor terms, or directly where nothing cancels."""
    if abs(x) > 1:
        return math.expm1(x) - x
    return math.fsum(x**n / math.factorial(n) for n in range(2, 30))


def test_values_by_hand():
    x = torch.tensor([0.0, math.log(2.0), -math.log(2.0)], dtype=torch.float64)
    assert k1(x).tolist() == x.tolist()
    assert k2(x).tolist() == pytest.approx([0.0, math.log(2) ** 2 / 2, math.log(2) ** 2 / 2])
    assert k3(x).tolist() == pytest.approx([0.0, math.log(2) - 0.5, 1 - math.log(2)])


def test_k3_follows_trl_sign_convention():
    logprobs, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.2])
    expected = torch.exp(reference - logprobs) - (reference - logprobs) - 1
    torch.testing.assert_close(token_kl(logprobs, reference, "k3"), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4e-7), (torch.float64, 1e-15)])
def test_k3_keeps_relative_precision_near_zero(dtype, tolerance):
    sizes = [1e-12, 1e-7, 1e-4, 1e-2, 0.1, 0.3, 0.4999, 0.5, 0.5001, 1.0, 5.0, 80.0]
    x = torch.tensor([s * size for size in sizes for s in (1, -1)], dtype=dtype)
    exact = [exact_exp_minus_tangent(v) for v in x.tolist()]
    assert exp_minus_tangent(x).tolist() == pytest.approx(exact, rel=4 * tolerance, abs=0)
    assert (k3(x) >= 0).all()


def test_expectation_of_k3_and_k1_is_the_divergence():
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    exact = (policy * (policy / reference).log()).sum()
    for name in ("k1", "k3"):
        estimate = (policy * token_kl(policy.log(), reference.log(), name)).sum()
        assert estimate.item() == pytest.approx(exact.item(), rel=1e-14)


def gradient_by_logits(loss_of, logits):
    """Gradient of a function of log-probs of all tokens by the logits."""
    free = logits.clone().requires_grad_()
    loss_of(free.log_softmax(0)).backward()
    return free.grad


@pytest.mark.parametrize("name", ["k1", "k2", "k3", "k3+"])
def test_only_k2_and_k3_plus_have_the_gradient_of_the_divergence(name):
    logits = torch.tensor([0.3, -1.1, 0.7, 0.0], dtype=torch.float64)
    reference = torch.tensor([0.9, 0.2, -0.4, 0.1], dtype=torch.float64).log_softmax(0)
    drawn = logits.softmax(0)  # the tokens are drawn once, and then are data
    wanted = gradient_by_logits(lambda own: (own.exp() * (own - reference)).sum(), logits)
    found = gradient_by_logits(lambda own: (drawn * token_kl(own, reference, name)).sum(), logits)
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-14) == (name in ("k2", "k3+"))


def test_k3_plus_has_the_value_of_k3():
    x = torch.tensor([0.0, 1e-6, 0.3, -0.4, 0.7, -3.0], dtype=torch.float64)
    torch.testing.assert_close(token_kl(x, torch.zeros_like(x), "k3+"), k3(x), rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_gradients(name):
    x = torch.tensor([0.0, 1e-6, 0.3, -0.4, 0.7, -3.0], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda v: token_kl(v, torch.zeros_like(v), name), (x,))


def test_gradient_of_k3_is_exact_near_zero_and_finite_far_away():
    x = torch.tensor([1e-6, -1e-6, 80.0, -80.0], requires_grad=True)
    k3(x).sum().backward()
    expected = [-math.expm1(-v) for v in x.tolist()]
    assert x.grad.tolist() == pytest.approx(expected, rel=1e-6)


def test_non_finite_input_is_not_hidden():
    for bad in (math.nan, math.inf, -math.inf):
        assert not k3(torch.tensor([bad])).isfinite().any()


def test_unknown_estimator():
    with pytest.raises(ConfigError, match="estimator: got 'k4', expected one of k1, k2, k3"):
        token_kl(torch.zeros(1), torch.zeros(1), "k4")
