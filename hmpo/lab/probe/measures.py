"""What is told of one objective's gradient on a recorded batch, beside its angle to the others."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hmpo.checkpoint import RecordedBatch
from hmpo.lab.probe.directions import cosine_distances, token_direction
from hmpo.lab.probe.variants import Variant, alike, plain, without_limits

EDGES = tuple((2 * k - 1) / 8 for k in range(-16, 18))
"""Of the histogram's bins: log2 of a token's share over an equal one, which lies within a bin."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How a gradient spreads over the tokens of the responses of one advantage sign.

    Example: `Spread(rows=12, ess=0.96, entropy=0.994, clipped=0.02, silent=0.0)`.
    """

    rows: int
    """Responses with an advantage of this sign."""
    ess: float | None
    """Mean over them of 1 / (L sum_t u_t^2), with u the shares of the tokens in the response's
    gradient; without a clip u are the token weights. None where no response has a gradient."""
    entropy: float | None
    """Mean of the entropy of u over log L; 1 for a response of one token."""
    clipped: float | None
    """Share of their tokens whose gradient the clip took; None of no token."""
    silent: float | None
    """Share of them that lost the gradient of every token."""
    histogram: tuple[int, ...] = ()
    """Tokens by log2(L u), where 0 is an equal share, in bins between `EDGES`; the first and the
    last bin take what lies beyond, and tokens without a gradient are in none."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What sets a member apart, one cause at a time, as cosine distances of token gradients.

    Example: GSPO has `mean` 0 (its mean is that of p = 0), `clip` 0.4, `responses` 0.
    """

    mean: float | None
    """Of its mean without limits from the geometric mean without: what the exponent does."""
    clip: float | None
    """Of the member from itself without clip or gate: what these do."""
    responses: float | None
    """Of its weights of responses from equal ones, both without limits."""


def measure_spreads(batch: RecordedBatch, direction: Float[Tensor, "N T"]) -> dict[str, Spread]:
    """`positive` and `negative`: how a gradient spreads, by the sign of the advantage."""
    return {
        "positive": _spread(batch, direction, batch.advantages > 0),
        "negative": _spread(batch, direction, batch.advantages < 0),
    }


def measure_parts(batch: RecordedBatch, variant: Variant) -> Parts:
    """The causes of a member's distance from the plain geometric mean."""
    free = without_limits(variant)
    equal = alike(free)
    geometric = Variant(name="p = 0", kind="exponent", objective=plain(0.0))
    vectors = [token_direction(batch, v)[batch.mask] for v in (variant, free, equal, geometric)]
    distances = cosine_distances(torch.stack(vectors))
    return Parts(
        mean=finite(distances[2, 3]),
        clip=finite(distances[0, 1]),
        responses=finite(distances[1, 2]),
    )


def token_sigma(batch: RecordedBatch) -> float:
    """Population standard deviation of the token log ratios (nat), over all tokens that count.

    0 of none.
    """
    d = (batch.logprobs.double() - batch.old_logprobs.double())[batch.mask]
    return float(d.std(correction=0)) if len(d) else 0.0


def expected_cosine(p: float, q: float, sigma: float) -> float:
    """Cosine between the token weights of two exponents for normal log ratios of that spread.

    exp(-(p - q)^2 sigma^2 / 2); with q = 0 the cosine to equal weights.
    """
    return math.exp(-0.5 * (p - q) ** 2 * sigma**2)


def expected_distance(p: float, q: float, sigma: float) -> float:
    """One minus `expected_cosine`, exact for small ones."""
    return -math.expm1(-0.5 * (p - q) ** 2 * sigma**2)


def finite(value: Tensor | float) -> float | None:
    """A number, or None for NaN and infinity, which JSON has no form for."""
    number = float(value)
    return number if math.isfinite(number) else None


def _spread(batch: RecordedBatch, direction: Tensor, of_sign: Tensor) -> Spread:
    """Of the rows of one sign that have tokens."""
    rows = of_sign & batch.mask.any(1)
    mask, size = batch.mask[rows], direction[rows].abs()
    total = size.sum(1)
    moving = total > 0
    tokens = int(mask.sum())
    if not tokens:
        return Spread(rows=0, ess=None, entropy=None, clipped=None, silent=None)
    lengths = mask.sum(1).double()
    shares = size[moving] / total[moving].unsqueeze(1)
    ess = 1 / (lengths[moving] * shares.square().sum(1))
    most = lengths[moving].log()
    entropy = torch.special.entr(shares).sum(1)
    entropy = torch.where(most > 0, entropy / most.masked_fill(most == 0, 1), 1)
    equal = (lengths[moving].unsqueeze(1) * shares)[shares > 0]
    edges = torch.tensor(EDGES[1:-1], dtype=torch.float64)
    bins = torch.bucketize(equal.log2(), edges, right=True)
    return Spread(
        rows=int(rows.sum()),
        ess=finite(ess.mean()),
        entropy=finite(entropy.mean()),
        clipped=int(((size == 0) & mask).sum()) / tokens,
        silent=float((~moving).double().mean()),
        histogram=tuple(torch.bincount(bins, minlength=len(EDGES) - 1).tolist()),
    )
