"""Slow, obvious statistics: what hmpo.agm.primitives must agree with."""

from fractions import Fraction


def straight_line(steps, values):
    """Exact slope and residuals of the least-squares line."""
    n = len(values)
    t = [Fraction(s) for s in steps]
    x = [Fraction(v) for v in values]
    t_mean, x_mean = sum(t) / n, sum(x) / n
    slope = sum((a - t_mean) * (b - x_mean) for a, b in zip(t, x)) / sum(
        (a - t_mean) ** 2 for a in t
    )
    residuals = [b - x_mean - slope * (a - t_mean) for a, b in zip(t, x)]
    return slope, residuals


def trend(steps, values):
    """Slope, t, effect and lag-1 autocorrelation, as spelt out in the head of primitives.py."""
    n = len(values)
    slope, r = straight_line(steps, values)
    square = sum(a * a for a in r)
    rho = float(sum(r[i] * r[i + 1] for i in range(n - 1)) / square)
    memory = min(max(rho, 0.0), 0.95)
    n_eff = max(3.0, n * (1 - memory) / (1 + memory))
    t_mean = sum(Fraction(s) for s in steps) / n
    s_tt = float(sum((Fraction(s) - t_mean) ** 2 for s in steps))
    sd = (float(square) / (n - 2)) ** 0.5
    t = float(slope) / (sd / s_tt**0.5 * (n / n_eff) ** 0.5)
    rise = float(slope) * (steps[-1] - steps[0])
    return float(slope), t, rise / sd, rho


def weighted(values, halflife):
    """Exponentially weighted mean and population variance from their definition."""
    weights = [0.5 ** ((len(values) - 1 - i) / halflife) for i in range(len(values))]
    total = sum(weights)
    mean = sum(w * v for w, v in zip(weights, values)) / total
    return mean, sum(w * (v - mean) ** 2 for w, v in zip(weights, values)) / total
