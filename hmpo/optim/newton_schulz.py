"""Newton-Schulz iterations: the orthogonal polar factor of a matrix by products alone.

Sources of the coefficients: K. Jordan's Muon, J. You's (after Jordan's page), Polar Express
(arXiv 2505.16932), CANS (arXiv 2506.10935), DeepSeek-V4 (eight of Jordan's steps, then two that
converge). The Gram form (after Gram-Newton-Schulz) iterates on the small n x n product alone.
Deviation: it restarts wherever its own rounding would be amplified too much, see `GAIN`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hmpo.errors import ConfigError, require
from hmpo.processor import multiplies_bfloat16

Triple = tuple[float, float, float]

JORDAN: Triple = (3.4445, -4.7750, 2.0315)
SAFETY = 1.01
"""Polar Express divides its input by this before every step but the last, against rounding."""

NS_COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    "jordan": (JORDAN,),
    "you": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "polar_express": (
        *(
            (a / SAFETY, b / SAFETY**3, c / SAFETY**5)
            for a, b, c in (
                (8.28721201814563, -23.595886519098837, 17.300387312530933),
                (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
                (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
                (3.3184196573706015, -2.488488024314874, 0.51004894012372),
                (2.300652019954817, -1.6689039845749518, 0.4188073119525673),
                (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
                (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
            )
        ),
        (1.875, -1.25, 0.375),
    ),
    "cans": (
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ),
    "deepseek_v4": (JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2,
}
"""Named (a, b, c) of x -> a x + b (x x') x + c (x x')^2 x; the last triple repeats."""

STEPS = {"deepseek_v4": 10}
"""Steps of a named set, where not 5."""

GAIN = {torch.float64: 1024.0, torch.float32: 64.0, torch.float16: 16.0}
"""Growth of small singular values after which the Gram form starts afresh, by dtype.

Forming x x' loses what is smaller than its rounding, and the iteration multiplies that loss by the
square of the growth: 64^2 * 6e-8 stays below 1e-3. bfloat16 is not here: it loses too much at once.
"""

GRAM_RATIO = 2
"""Least m / n of an (n, m) matrix for the Gram form; below, it costs about as much or more."""


def ns_triples(coefficients: str | Sequence[Any], steps: int | None = None) -> tuple[Triple, ...]:
    """One triple for each step, from a name, one triple, or a sequence of triples.

    Args:
        coefficients: a name of `NS_COEFFICIENTS`, (a, b, c), or a list of such.
        steps: iterations; None means the length of a list, 10 for "deepseek_v4", else 5.

    Raises:
        ConfigError: unknown name, or not triples of numbers.
    """
    if steps is not None:
        require(isinstance(steps, int) and 0 < steps < 100, "ns_steps", steps, "integer in 1..99")
    given: Sequence[Any] = () if isinstance(coefficients, str) else tuple(coefficients)
    if isinstance(coefficients, str):
        known = ", ".join(NS_COEFFICIENTS)
        require(coefficients in NS_COEFFICIENTS, "ns_coefficients", coefficients, f"one of {known}")
        given, length = NS_COEFFICIENTS[coefficients], STEPS.get(coefficients, 5)
    elif given and all(isinstance(c, (int, float)) for c in given):
        given, length = (given,), 5
    else:
        length = len(given)
    if not given or any(len(t) != 3 or not all(map(math.isfinite, t)) for t in given):
        raise ConfigError(f"ns_coefficients: got {coefficients!r}, expected triples (a, b, c)")
    triples = [(float(a), float(b), float(c)) for a, b, c in given]
    return tuple(triples[min(i, len(triples) - 1)] for i in range(steps or length))


def newton_schulz(
    matrices: Float[Tensor, "... n m"],
    triples: Sequence[Triple],
    eps: float = 1e-7,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "... n m"]:
    """Approximate the orthogonal polar factor U V' of each matrix U S V'.

    Args:
        matrices: one matrix (n, m) or a batch (b, n, m).
        triples: coefficients, one triple for each iteration.
        eps: least Frobenius norm to divide by.
        dtype: precision of the iteration and of the result.
    """
    x, tall = _normalised(matrices, eps, dtype)
    addmm = torch.addmm if x.ndim == 2 else torch.baddbmm
    for a, b, c in triples:
        gram = x @ x.mT
        x = addmm(x, addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def gram_newton_schulz(
    matrices: Float[Tensor, "... n m"],
    triples: Sequence[Triple],
    eps: float = 1e-7,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "... n m"]:
    """`newton_schulz` by products of n x n matrices: cheaper where m is much larger than n.

    The steps are polynomials in g = x x', so they act on q with x_k = q x, and on g itself; x is
    multiplied once for every restart.

    Raises:
        ConfigError: a dtype without an entry in `GAIN`, bfloat16 above all.
    """
    require(dtype in GAIN, "dtype", dtype, "float64, float32 or float16")
    x, tall = _normalised(matrices, eps, dtype)
    addmm = torch.addmm if x.ndim == 2 else torch.baddbmm
    for block in _restarts(triples, GAIN[dtype]):
        gram, q = x @ x.mT, None
        for i, (a, b, c) in enumerate(block):
            step = addmm(gram, gram, gram, beta=b, alpha=c)
            step.diagonal(dim1=-2, dim2=-1).add_(a)
            q = step if q is None else step @ q
            if i + 1 < len(block):
                gram = step @ gram @ step
        x = x if q is None else q @ x
    return x.mT if tall else x


def polar_factor(
    matrices: Float[Tensor, "... n m"],
    triples: Sequence[Triple],
    eps: float = 1e-7,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "... n m"]:
    """The cheaper of the two forms: Gram for wide matrices in a dtype where it is sound."""
    short, long = sorted(matrices.shape[-2:])
    wide = dtype in GAIN and long >= GRAM_RATIO * short > 0
    return (gram_newton_schulz if wide else newton_schulz)(matrices, triples, eps, dtype)


def _normalised(matrices: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, bool]:
    # float16 holds no small gradient: it comes in after the division.
    x = matrices.to(torch.float32 if dtype == torch.float16 else dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    return (x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)).to(dtype), tall


def _restarts(triples: Sequence[Triple], limit: float) -> list[list[Triple]]:
    """The steps in runs whose slopes at zero multiply to at most `limit`, one step at least."""
    runs: list[list[Triple]] = []
    gain = math.inf
    for triple in triples:
        gain *= abs(triple[0])
        if gain > limit or not runs:
            runs.append([])
            gain = abs(triple[0])
        runs[-1].append(triple)
    return runs


def fast_dtype(device: str) -> torch.dtype:
    """bfloat16 where the machine has instructions for its products, else float32.

    Told by what the machine is, never by a clock: on a CPU its instruction sets (AVX-512 BF16, AMX,
    ARM's), where the products are 2 times as fast or more; on a CUDA device its own generation.

    Args:
        device: a device type, "cpu" or "cuda".
    """
    if device == "cuda":
        native = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(False)
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if device == "cpu" and multiplies_bfloat16() else torch.float32
