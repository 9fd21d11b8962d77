"""Power means of token ratios as slow float64 loops (no torch), written from the definitions."""

import math


def log_mean_exp(values):
    """log of the mean of exp(values), values anchored at their maximum."""
    top = max(values)
    return top + math.log(math.fsum(math.exp(v - top) for v in values) / len(values))


def log_power_mean(d, p):
    """log M_p of the ratios exp(d): the p-th root of the mean p-th power."""
    if not d:
        return 0.0
    centre = math.fsum(d) / len(d)
    if p == 0:
        return centre
    e = [v - centre for v in d]
    if max(abs(p * v) for v in e) < 1:
        return centre + math.log1p(math.fsum(math.expm1(p * v) for v in e) / len(d)) / p
    return centre + log_mean_exp([p * v for v in e]) / p


def weights(d, p):
    """d log M_p / d d_t = softmax of p d."""
    if not d:
        return []
    top = max(p * v for v in d)
    powers = [math.exp(p * v - top) for v in d]
    total = math.fsum(powers)
    return [v / total for v in powers]


def slope(d, p):
    """d log M_p / dp: KL(w || uniform) / p^2, or, where that cancels, its integral form.

    The integral over u in [0, 1] of u Var_{w(u p)}(d) has positive terms only; here by 40
    Gauss-Legendre nodes, for exponents so small that they are exact to rounding.
    """
    if not d:
        return 0.0
    if abs(p) * (max(d) - min(d)) > 1:
        w = weights(d, p)
        return math.fsum(a * math.log(a * len(d)) for a in w if a > 0) / p**2
    total = 0.0
    pieces = 8
    for piece in range(pieces):
        for node, weight in GAUSS_LEGENDRE_5:
            u = (piece + 0.5 + 0.5 * node) / pieces
            total += 0.5 * weight / pieces * u * _tilted_variance(d, p * u)
    return total


def _tilted_variance(d, s):
    w = weights(d, s)
    mean = math.fsum(a * b for a, b in zip(w, d, strict=True))
    return math.fsum(a * (b - mean) ** 2 for a, b in zip(w, d, strict=True))


GAUSS_LEGENDRE_5 = [
    (0.0, 128 / 225),
    *[
        (sign * math.sqrt(5 - 2 * math.sqrt(10 / 7)) / 3, (322 + 13 * math.sqrt(70)) / 900)
        for sign in (-1, 1)
    ],
    *[
        (sign * math.sqrt(5 + 2 * math.sqrt(10 / 7)) / 3, (322 - 13 * math.sqrt(70)) / 900)
        for sign in (-1, 1)
    ],
]


def ess(d, p):
    """Effective sample size of the weights as a share of the tokens."""
    return 1 / (len(d) * math.fsum(w * w for w in weights(d, p)))


def solve_exponent(d, target, p_max, sign):
    """Bisection for ESS(sign * x) = target, x in [0, p_max]."""
    if ess(d, sign * p_max) >= target or max(d) == min(d):
        return sign * p_max
    low, high = 0.0, p_max
    for _ in range(200):
        middle = 0.5 * (low + high)
        if ess(d, sign * middle) > target:
            low = middle
        else:
            high = middle
    return sign * 0.5 * (low + high)


def ahm_loop(log_gap, steps):
    """log(A_n / H_n) by running A' = (A + H) / 2, H' = 2 A H / (A + H) from A H = 1."""
    a, h = math.exp(log_gap / 2), math.exp(-log_gap / 2)
    for _ in range(steps):
        a, h = (a + h) / 2, 2 * a * h / (a + h)
    return math.log(a / h)


def ahm_loop_steps(log_gap, tolerance):
    """Iterations until (A - H) / (A + H) <= tolerance."""
    a, h = math.exp(log_gap / 2), math.exp(-log_gap / 2)
    steps = 0
    while (a - h) / (a + h) > tolerance:
        a, h = (a + h) / 2, 2 * a * h / (a + h)
        steps += 1
    return steps
