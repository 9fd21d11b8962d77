"""The papers' objectives as float64 loops (no torch): loss and its gradient in the log-probs.

Each function is written from its own paper and shares no code with the others or with `hmpo`.
`d` is a list of responses, each a list of token log ratios; `a` one advantage for each; bounds
are given in nat. All return (loss, gradient), the gradient as lists like `d`.
"""

import math


def grpo(d, a, low, high):
    """arXiv 2402.03300, eq. 3: mean over responses of the token mean of min(r A, clip(r) A)."""
    loss, grad = 0.0, []
    for row, adv in zip(d, a, strict=True):
        terms, slopes = ppo_tokens(row, adv, low, high)
        loss -= math.fsum(terms) / len(row) / len(d)
        grad.append([-s / len(row) / len(d) for s in slopes])
    return loss, grad


def dapo(d, a, low, high):
    """arXiv 2503.14476, eq. 8: mean over all tokens."""
    tokens = sum(len(row) for row in d)
    loss, grad = 0.0, []
    for row, adv in zip(d, a, strict=True):
        terms, slopes = ppo_tokens(row, adv, low, high)
        loss -= math.fsum(terms) / tokens
        grad.append([-s / tokens for s in slopes])
    return loss, grad


def drgrpo(d, a, low, high, max_length):
    """arXiv 2503.20783: sums over tokens divided by a constant."""
    loss, grad = 0.0, []
    for row, adv in zip(d, a, strict=True):
        terms, slopes = ppo_tokens(row, adv, low, high)
        loss -= math.fsum(terms) / (len(d) * max_length)
        grad.append([-s / (len(d) * max_length) for s in slopes])
    return loss, grad


def ppo_tokens(row, adv, low, high):
    """arXiv 1707.06347, eq. 7, per token, with its derivative in log pi (kept on a bound)."""
    terms, slopes = [], []
    for v in row:
        ratio = math.exp(v)
        clipped = min(max(ratio, math.exp(low)), math.exp(high))
        if ratio * adv <= clipped * adv:
            terms.append(ratio * adv)
            slopes.append(ratio * adv)
        else:
            terms.append(clipped * adv)
            slopes.append(0.0)
    return terms, slopes


def gspo(d, a, low, high):
    """arXiv 2507.18071, eqs. 5 and 7: min(s A, clip(s) A), s = (prod of ratios)^(1/L)."""
    loss, grad = 0.0, []
    for row, adv in zip(d, a, strict=True):
        s = math.exp(math.fsum(row) / len(row))
        clipped = min(max(s, math.exp(low)), math.exp(high))
        kept = s * adv <= clipped * adv
        loss -= min(s * adv, clipped * adv) / len(d)
        grad.append([-s * adv / len(row) / len(d) if kept else 0.0 for _ in row])
    return loss, grad


def gmpo(d, a, low, high):
    """arXiv 2507.20673: (prod |min(w^sgn, clip(w^sgn))|^sgn)^(1/L) A, bounds symmetric."""
    assert low == -high
    loss, grad = 0.0, []
    for row, adv in zip(d, a, strict=True):
        sgn = 1 if adv >= 0 else -1
        logs, kept = [], []
        for v in row:
            signed = sgn * v
            logs.append(sgn * min(signed, min(max(signed, low), high)))
            kept.append(signed <= high)
        mean = math.exp(math.fsum(logs) / len(row))
        loss -= adv * mean / len(d)
        grad.append([-adv * mean / len(row) / len(d) if k else 0.0 for k in kept])
    return loss, grad


def hmpo_callsys(d, a, low, high):
    """The harmonic trainer of callsys/GMPO: L / sum_t 1 / c_t, c_t clipped on one side."""
    loss, grad = 0.0, []
    for row, adv in zip(d, a, strict=True):
        inverses, kept = [], []
        for v in row:
            limited = min(v, high) if adv >= 0 else max(v, low)
            kept.append(limited == v)
            inverses.append(math.exp(-limited))
        harmonic = len(row) / math.fsum(inverses)
        loss -= adv * harmonic / len(d)
        grad.append(
            [
                -adv * harmonic**2 / len(row) * inv / len(d) if k else 0.0
                for k, inv in zip(kept, inverses, strict=True)
            ]
        )
    return loss, grad


def holder(d, a, p, low, high):
    """arXiv 2605.12058: sequence clip of M_p = (mean r^p)^(1/p), p != 0."""
    loss, grad = 0.0, []
    for row, adv in zip(d, a, strict=True):
        powers = [math.exp(p * v) for v in row]
        m = (math.fsum(powers) / len(row)) ** (1 / p)
        clipped = min(max(m, math.exp(low)), math.exp(high))
        kept = m * adv <= clipped * adv
        loss -= min(m * adv, clipped * adv) / len(d)
        total = math.fsum(powers)
        grad.append([-adv * m * w / total / len(d) if kept else 0.0 for w in powers])
    return loss, grad


def holder_clamped(d, a, p, clamp, low, high):
    """The same code's `sequence_w_clip`: each log ratio within +-clamp first, then `holder`."""
    held = [[min(max(v, -clamp), clamp) for v in row] for row in d]
    loss, grad = holder(held, a, p, low, high)
    kept = [
        [slope if abs(v) <= clamp else 0.0 for v, slope in zip(row, slopes, strict=True)]
        for row, slopes in zip(d, grad, strict=True)
    ]
    return loss, kept


def holder_token(d, a, p, low, high):
    """The same code's `holder_token`: PPO's pessimistic token clip, then the mean; no clip of it.

    A ratio above the upper bound (A >= 0) or below the lower one (A < 0) counts as the bound.
    """
    loss, grad = 0.0, []
    for row, adv in zip(d, a, strict=True):
        ratios, kept = [], []
        for v in row:
            ratio = math.exp(v)
            beyond = v > high if adv >= 0 else v < low
            ratios.append(math.exp(high if adv >= 0 else low) if beyond else ratio)
            kept.append(not beyond)
        powers = [r**p for r in ratios]
        total = math.fsum(powers)
        m = (total / len(row)) ** (1 / p)
        loss -= adv * m / len(d)
        grad.append(
            [-adv * m * w / total / len(d) if k else 0.0 for w, k in zip(powers, kept, strict=True)]
        )
    return loss, grad


def reinforce(logs, a):
    """Williams 1992 with one advantage per response: the token mean of A log pi, mean over N."""
    loss, grad = 0.0, []
    for row, adv in zip(logs, a, strict=True):
        loss -= adv * math.fsum(row) / len(row) / len(logs)
        grad.append([-adv / len(row) / len(logs) for _ in row])
    return loss, grad


def sign_aware(d, a, low, high):
    """The harmonic mean of clipped ratios for A >= 0, their arithmetic mean for A < 0."""
    loss, grad = 0.0, []
    for row, adv in zip(d, a, strict=True):
        part = hmpo_callsys if adv >= 0 else grpo
        value, (slopes,) = part([row], [adv], low, high)
        loss += value / len(d)
        grad.append([s / len(d) for s in slopes])
    return loss, grad


def group_advantages(rewards, size, scale, ddof):
    """Rewards minus their group's mean, over its standard deviation."""
    out = []
    for start in range(0, len(rewards), size):
        group = rewards[start : start + size]
        mean = math.fsum(group) / size
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / (size - ddof))
        out += [(r - mean) / (std if scale == "std" else 1.0) for r in group]
    return out
