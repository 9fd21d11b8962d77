"""Objectives with constant weights, and two with a penalty, as float64 loops (no torch).

As in `tests/oracles/family.py`: `d` is a list of responses, each a list of token log ratios, `a`
one advantage for each, `new` the log-probs themselves; the result is (loss, gradient in the
log-probs, as lists like `d`). All take the mean over all tokens but `atr`. Where a source has a
surrogate whose gradient has a constant weight, the loss is that weight times A log pi, which has
the same gradient.
"""

import math


def dppo(d, a, new, distance, low, high, cap):
    """arXiv 2602.04879 as verl has it: -A sg(min(r, cap)) log pi while the token is near enough."""
    tokens = sum(len(row) for row in d)
    loss, grad = 0.0, []
    for row, adv, logs in zip(d, a, new, strict=True):
        slopes = []
        for v, log_pi in zip(row, logs, strict=True):
            weight = min(math.exp(v), cap) if near(v, log_pi, adv, distance, low, high) else 0.0
            loss -= adv * weight * log_pi / tokens
            slopes.append(-adv * weight / tokens)
        grad.append(slopes)
    return loss, grad


def near(v, log_pi, adv, distance, low, high):
    """Whether a token stays in: its probability has not moved too far the way A pushes it."""
    pi, mu = math.exp(log_pi), math.exp(log_pi - v)
    if distance == "tv":
        return pi - mu <= high if adv > 0 else pi - mu >= -low
    other, before = max(1 - pi, 1e-8), max(1 - mu, 1e-8)
    divergence = mu * math.log(mu / pi) + before * math.log(before / other)
    if adv > 0:
        return divergence <= high or pi <= mu
    return divergence <= low or pi >= mu


def drpo(d, a, new, eps):
    """arXiv 2606.09821: -A r + |A| mu (r - 1)^2 / (2 eps)."""
    tokens = sum(len(row) for row in d)
    loss, grad = 0.0, []
    for row, adv, logs in zip(d, a, new, strict=True):
        slopes = []
        for v, log_pi in zip(row, logs, strict=True):
            r, mu = math.exp(v), math.exp(log_pi - v)
            loss += (-adv * r + abs(adv) * mu * (r - 1) ** 2 / (2 * eps)) / tokens
            slopes.append((-adv * r + abs(adv) * mu * (r - 1) * r / eps) / tokens)
        grad.append(slopes)
    return loss, grad


def dro(d, a, new, beta):
    """verl's dro: -(A log pi - beta / 2 d^2)."""
    tokens = sum(len(row) for row in d)
    loss, grad = 0.0, []
    for row, adv, logs in zip(d, a, new, strict=True):
        for v, log_pi in zip(row, logs, strict=True):
            loss -= (adv * log_pi - beta / 2 * v * v) / tokens
        grad.append([-(adv - beta * v) / tokens for v in row])
    return loss, grad


def aspo(d, a, new, low, high, cap):
    """arXiv 2510.06062: 1 / min(r, 1 + high), at most cap, for A > 0; PPO with a dual clip else."""
    tokens = sum(len(row) for row in d)
    loss, grad = 0.0, []
    for row, adv, logs in zip(d, a, new, strict=True):
        slopes = []
        for v, log_pi in zip(row, logs, strict=True):
            r = math.exp(v)
            if adv >= 0:
                weight = min(1 / min(r, 1 + high), cap)
            else:
                weight = r if 1 - low <= r <= cap else 0.0
            loss -= adv * weight * log_pi / tokens
            slopes.append(-adv * weight / tokens)
        grad.append(slopes)
    return loss, grad


def vespo(d, a, new, up, down):
    """arXiv 2602.10693: -A sg(W^k e^(lambda (1 - W))) log pi, W = exp sum d, by the sign of A."""
    tokens = sum(len(row) for row in d)
    loss, grad = 0.0, []
    for row, adv, logs in zip(d, a, new, strict=True):
        k, decay = up if adv >= 0 else down
        whole = math.exp(min(math.fsum(row), 700.0))
        weight = whole**k * math.exp(decay * (1 - whole)) if decay * whole < 700 else 0.0
        loss -= adv * weight * math.fsum(logs) / tokens
        grad.append([-adv * weight / tokens for _ in row])
    return loss, grad


def ctpo(d, a, new, low, high, dual):
    """arXiv 2605.07331: PPO on rho_t = prod_{s <= t} r_s with bounds that grow with sqrt(t).

    The gradient goes through token t alone, and only where min(rho A, clip(rho) A), for A < 0 the
    larger of that and its dual, is rho A itself.
    """
    tokens = sum(len(row) for row in d)
    loss, grad = 0.0, []
    for row, adv, logs in zip(d, a, new, strict=True):
        total, slopes = 0.0, []
        for t, (v, log_pi) in enumerate(zip(row, logs, strict=True), start=1):
            total += v
            rho, root = math.exp(min(total, 700.0)), math.sqrt(t)
            clipped = min(max(rho, math.exp(-low * root)), math.exp(high * root))
            chosen = min(rho * adv, clipped * adv)
            if adv < 0:
                chosen = max(chosen, math.exp(dual * root) * adv)
            weight = rho if chosen == rho * adv else 0.0
            loss -= adv * weight * log_pi / tokens
            slopes.append(-adv * weight / tokens)
        grad.append(slopes)
    return loss, grad


def atr(d, a, delta):
    """arXiv 2602.05494: PPO whose clip holds r - 1 - log r <= delta; mean over responses."""
    loss, grad = 0.0, []
    for row, adv in zip(d, a, strict=True):
        slopes = []
        for v in row:
            far = math.expm1(v) - v > delta and v * adv > 0
            value = math.exp(edge(v, delta)) if far else math.exp(v)
            loss -= adv * value / len(row) / len(d)
            slopes.append(0.0 if far else -adv * value / len(row) / len(d))
        grad.append(slopes)
    return loss, grad


def edge(v, delta):
    """The log ratio between 0 and v at which the divergence is delta, by bisection."""
    inside, outside = 0.0, v
    for _ in range(200):
        middle = (inside + outside) / 2
        if math.expm1(middle) - middle > delta:
            outside = middle
        else:
            inside = middle
    return inside
