"""exp(-p^2 sigma^2 / 2): what it is of, and what lies between it and a minibatch's cosine.

For normal log ratios of standard deviation s, and a long response, it is the cosine between the
token weights of p and those of 0 *within one response*, exp(p d_t) against equal weights, which is
sqrt(ESS / L) ([Mathematics](docs/maths.md)). The gradient of a minibatch is more than that:
responses have spreads of their own and weigh by advantage and length, and in the space of weights
their gradients add up and cancel. `Within` holds the figures that come before all that.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hmpo.checkpoint import RecordedBatch
from hmpo.lab.probe.measures import expected_cosine, token_sigma
from hmpo.objective.means import effective_sample_size


@dataclass(frozen=True, kw_only=True)
class Within:
    """One exponent against p = 0 within responses, averaged over all that have tokens.

    Example: `within_responses(batch, -1.0)` is `Within(p=-1.0, cosine=0.957, own=0.958,
    pooled=0.941)`.
    """

    p: float
    cosine: float | None
    """Mean cosine between the token weights; None without a response."""
    own: float | None
    """Mean of exp(-p^2 s^2 / 2), with the spread s of each response."""
    pooled: float
    """exp(-p^2 sigma^2 / 2), with sigma over all tokens: the prediction that is printed."""


def within_responses(batch: RecordedBatch, p: float) -> Within:
    """The cosine that the formula is about, and the formula with two kinds of sigma."""
    pooled = expected_cosine(p, 0.0, token_sigma(batch))
    cosines, sigmas = within_cosines(batch, p), row_sigmas(batch)
    if not len(cosines):
        return Within(p=p, cosine=None, own=None, pooled=pooled)
    own = (-0.5 * p**2 * sigmas.square()).exp()
    return Within(p=p, cosine=float(cosines.mean()), own=float(own.mean()), pooled=pooled)


def within_cosines(batch: RecordedBatch, p: float) -> Float[Tensor, " n"]:
    """Cosine of exp(p d_t) to equal weights, for each response with tokens; in (0, 1]."""
    rows = batch.mask.any(1)
    return effective_sample_size(_log_ratios(batch)[rows], batch.mask[rows], p).sqrt()


def row_sigmas(batch: RecordedBatch) -> Float[Tensor, " n"]:
    """Population standard deviation of the log ratios (nat) of each response with tokens."""
    mask = batch.mask[batch.mask.any(1)]
    return _centred(batch).square().sum(1).div(mask.sum(1)).sqrt()


def excess_kurtosis(batch: RecordedBatch) -> float | None:
    """Of the log ratios less their response's mean, over its own sigma: 0 for normal ones.

    A response of L tokens can show at most L - 3, so short ones hide their tails. None where no
    log ratio differs from its response's mean.
    """
    sigmas, mask = row_sigmas(batch), batch.mask[batch.mask.any(1)]
    moved = sigmas > 0
    if not bool(moved.any()):
        return None
    scaled = (_centred(batch)[moved] / sigmas[moved, None])[mask[moved]]
    found = float(scaled.pow(4).mean()) - 3
    return found if math.isfinite(found) else None


def _log_ratios(batch: RecordedBatch) -> Float[Tensor, "N T"]:
    """In float64, 0 on padding."""
    d = batch.logprobs.double() - batch.old_logprobs.double()
    return torch.where(batch.mask, d, 0)


def _centred(batch: RecordedBatch) -> Float[Tensor, "n T"]:
    """Log ratios of the responses with tokens, less their mean; 0 on padding."""
    rows = batch.mask.any(1)
    d, mask = _log_ratios(batch)[rows], batch.mask[rows]
    mean = d.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    return torch.where(mask, d - mean, 0)
