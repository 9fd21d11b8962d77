"""Per-token estimators of the KL divergence KL(pi || ref) from samples of pi.

With x = log pi(y) - log ref(y) at the sampled token (nat):

    k1 = x                   unbiased, of either sign
    k2 = x^2 / 2             biased, small variance
    k3 = exp(-x) - 1 + x     unbiased, never negative
    k3+ = k3, with the gradient of k2

What is unbiased is the value. The gradient of a KL is in expectation that of k2, x grad log pi;
that of k1 is 0, and that of k3, (1 - exp(-x)) grad log pi, belongs to KL(ref || pi) (arXiv
2506.09477). So k3+ has the value of the one and the gradient of the other; the name is verl's.

Names and derivation: J. Schulman, Approximating KL Divergence (2020). k3 is the per-token KL of
GRPO (arXiv 2402.03300, equation 4). Padding is the caller's: mask before calling.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hmpo.errors import ConfigError, ShapeError

SERIES_LIMIT = 0.5
SERIES_TERMS = 16


def k1(log_ratio: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """k1 = x for x = log pi - log ref (nat)."""
    return log_ratio


def k2(log_ratio: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """k2 = x^2 / 2 for x = log pi - log ref (nat)."""
    return 0.5 * log_ratio.square()


def k3(log_ratio: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """k3 = exp(-x) - 1 + x for x = log pi - log ref (nat), exact near 0; never negative."""
    return exp_minus_tangent(-log_ratio)


def exp_minus_tangent(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """exp(x) - 1 - x, to full relative precision around 0 (where it is x^2 / 2)."""
    near = x.abs() < SERIES_LIMIT
    small = torch.where(near, x, torch.zeros_like(x))
    series = torch.ones_like(x)
    for n in range(SERIES_TERMS, 2, -1):
        series = 1 + small / n * series
    far = torch.where(near, torch.ones_like(x), x)
    return torch.where(near, 0.5 * small.square() * series, torch.expm1(far) - far)


def k3_plus(log_ratio: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """k3 of x = log pi - log ref (nat), with the gradient of k2."""
    square = k2(log_ratio)
    return square + (k3(log_ratio) - square).detach()


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3, "k3+": k3_plus}


def token_kl(
    logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"], estimator: str
) -> Float[Tensor, "*shape"]:
    """Per-token KL(pi || ref) in nat, differentiable in `logprobs`.

    Args:
        logprobs: log pi of the sampled tokens.
        ref_logprobs: log ref of the same tokens.
        estimator: "k1", "k2", "k3" or "k3+".

    Raises:
        ShapeError: the shapes differ.
        ConfigError: the estimator is unknown.
    """
    if logprobs.shape != ref_logprobs.shape:
        raise ShapeError(
            f"ref_logprobs: got {tuple(ref_logprobs.shape)}, "
            f"expected {tuple(logprobs.shape)} like logprobs"
        )
    if estimator not in ESTIMATORS:
        raise ConfigError(f"estimator: got {estimator!r}, expected one of {', '.join(ESTIMATORS)}")
    return ESTIMATORS[estimator](logprobs - ref_logprobs)
