"""Token weights of a power mean, and what is told of them, as float64 loops (no torch).

`d` is a list of responses, each a list of token log ratios, and `a` one advantage for each.
"""

import math


def direction(d, a, p, clip=None):
    """-dloss/dlogprob of mean_i A_i M_p(c_i): A_i M_p w_t / N, 0 for a clipped token."""
    found = []
    for row, adv in zip(d, a, strict=True):
        limited = []
        for v in row:
            if clip is None:
                limited.append(v)
            else:
                limited.append(min(v, clip) if adv >= 0 else max(v, -clip))
        if p == 0:
            mean = math.exp(math.fsum(limited) / len(row))
        else:
            mean = (math.fsum(math.exp(p * v) for v in limited) / len(row)) ** (1 / p)
        total = math.fsum(math.exp(p * v) for v in limited)
        found.append(
            [
                adv * mean * math.exp(p * c) / total / len(d) if c == v else 0.0
                for v, c in zip(row, limited, strict=True)
            ]
        )
    return found


def cosine(one, other):
    """Cosine of two gradients, given as lists of responses."""
    x = [v for row in one for v in row]
    y = [v for row in other for v in row]
    dot = math.fsum(u * v for u, v in zip(x, y, strict=True))
    return dot / math.sqrt(math.fsum(u * u for u in x) * math.fsum(v * v for v in y))


def spread(row):
    """(effective sample size, entropy over log L) of one response's weights |g_t| / sum |g|."""
    total = math.fsum(abs(v) for v in row)
    weights = [abs(v) / total for v in row]
    size = 1 / (len(row) * math.fsum(w * w for w in weights))
    if len(row) == 1:
        return size, 1.0
    entropy = -math.fsum(w * math.log(w) for w in weights if w > 0)
    return size, entropy / math.log(len(row))


def within(row, p):
    """Cosine between the weights exp(p d_t) of one response and equal ones."""
    weights = [math.exp(p * v) for v in row]
    return math.fsum(weights) / math.sqrt(len(row) * math.fsum(w * w for w in weights))


def own_sigma(row):
    """Population standard deviation of one response's log ratios."""
    mean = math.fsum(row) / len(row)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in row) / len(row))
