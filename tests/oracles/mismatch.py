"""Mismatch weights and metrics as slow float64 loops (no torch), written from the definitions."""

import math


def log_rhos(old, sampling):
    """Token log ratios of one response."""
    return [a - b for a, b in zip(old, sampling, strict=True)]


def row_weights(old, sampling, *, correction, level, low, high, mean_low=None, mean_high=None):
    """One weight per token of one response (a sequence's weight repeated)."""
    d = log_rhos(old, sampling)
    if not d:
        return []
    whole = math.exp(math.fsum(d))
    rhos = [whole if level == "sequence" else math.exp(v) for v in d]
    if correction == "none":
        weights = [1.0] * len(d)
    elif correction == "truncate":
        weights = [min(max(r, low), high) for r in rhos]
    else:
        weights = [r if low <= r <= high else 0.0 for r in rhos]
    geometric = math.exp(math.fsum(d) / len(d))
    if (mean_low is not None and geometric < mean_low) or (
        mean_high is not None and geometric > mean_high
    ):
        weights = [0.0] * len(d)
    return weights


def metrics(rows):
    """Metrics of a rollout, rows of (old, sampling) log-probs."""
    d = [log_rhos(*row) for row in rows if row[0]]
    flat = [v for row in d for v in row]
    rho = [math.exp(v) for v in flat]
    n = len(flat)
    return {
        "mismatch/k1": -math.fsum(flat) / n,
        "mismatch/k3": math.fsum(r - 1 - v for r, v in zip(rho, flat)) / n,
        "mismatch/ppl_gap": -math.fsum(math.fsum(row) / len(row) for row in d) / len(d),
        "mismatch/rho_mean": math.fsum(rho) / n,
        "mismatch/rho_min": min(rho),
        "mismatch/rho_max": max(rho),
        "mismatch/ess": math.fsum(rho) ** 2 / (n * math.fsum(r * r for r in rho)),
        "mismatch/chi2_tok": math.fsum(r * r for r in rho) / n - 1,
        "mismatch/chi2_seq": math.fsum(math.exp(math.fsum(row)) ** 2 for row in d) / len(d) - 1,
    }
