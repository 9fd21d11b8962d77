"""More of the papers' objectives as float64 loops (no torch), each from its own source.

As in `tests/oracles/objective.py`: `d` is a list of responses, each a list of token log ratios,
`a` one advantage for each, bounds are given in nat, and the result is (loss, gradient in the
log-probs, as lists like `d`). `new` are the log-probs themselves, where a loss contains them.
"""

import math


def gspo_token(d, a, low, high):
    """arXiv 2507.18071, eqs. 13-14: s_it = sg[s_i] pi / sg[pi], clipped token by token."""
    loss, grad = 0.0, []
    for row, adv in zip(d, a, strict=True):
        s = math.exp(math.fsum(row) / len(row))
        slopes = []
        for _ in row:
            clipped = min(max(s, math.exp(low)), math.exp(high))
            loss -= min(s * adv, clipped * adv) / len(row) / len(d)
            kept = s * adv <= clipped * adv
            slopes.append(-s * adv / len(row) / len(d) if kept else 0.0)
        grad.append(slopes)
    return loss, grad


def luspo(d, a, low, high):
    """arXiv 2602.05261: GSPO's term of each response times its length, mean over responses."""
    loss, grad = 0.0, []
    for row, adv in zip(d, a, strict=True):
        s = math.exp(math.fsum(row) / len(row))
        clipped = min(max(s, math.exp(low)), math.exp(high))
        loss -= min(s * adv, clipped * adv) * len(row) / len(d)
        kept = s * adv <= clipped * adv
        grad.append([-s * adv / len(d) if kept else 0.0 for _ in row])
    return loss, grad


def sapo(d, a, tau_positive, tau_negative):
    """arXiv 2511.20347: token mean of f(r) A, f(r) = sigmoid(tau (r - 1)) 4 / tau."""
    loss, grad = 0.0, []
    for row, adv in zip(d, a, strict=True):
        tau = tau_positive if adv > 0 else tau_negative
        slopes = []
        for v in row:
            r = math.exp(v)
            x = tau * (r - 1)
            gate = 1 / (1 + math.exp(-x)) if x > -700 else 0.0
            other = 1 / (1 + math.exp(x)) if x < 700 else 0.0
            loss -= 4 / tau * gate * adv / len(row) / len(d)
            slopes.append(-4 * gate * other * r * adv / len(row) / len(d))
        grad.append(slopes)
    return loss, grad


def cispo(d, a, new, low, high):
    """arXiv 2506.13585, eqs. 4-5: mean over all tokens of sg(clip(r)) A log pi."""
    tokens = sum(len(row) for row in d)
    loss, grad = 0.0, []
    for row, adv, logs in zip(d, a, new, strict=True):
        weights = [min(max(math.exp(v), math.exp(low)), math.exp(high)) for v in row]
        loss -= adv * math.fsum(w * x for w, x in zip(weights, logs, strict=True)) / tokens
        grad.append([-adv * w / tokens for w in weights])
    return loss, grad


def truncated(d, a, new, cap):
    """Truncated importance sampling: mean over all tokens of min(r, cap) A log pi."""
    tokens = sum(len(row) for row in d)
    loss, grad = 0.0, []
    for row, adv, logs in zip(d, a, new, strict=True):
        weights = [min(math.exp(v), cap) for v in row]
        loss -= adv * math.fsum(w * x for w, x in zip(weights, logs, strict=True)) / tokens
        grad.append([-adv * w / tokens for w in weights])
    return loss, grad


def apmpo_rule(rewards, gamma, low, gain):
    """arXiv 2605.04066: (p, lower, upper bound of the ratio) from a batch's rewards."""
    mu = math.fsum(rewards) / len(rewards)
    sigma = math.sqrt(math.fsum((r - mu) ** 2 for r in rewards) / len(rewards))
    return math.exp(-gamma * mu), 1 - low, 1 + low + gain * math.tanh(mu / sigma)


def apmpo(d, a, p, low, high):
    """arXiv 2605.04066: sgn(A) times the power mean of the magnitudes |A| c_t, c_t as in PPO."""
    loss, grad = 0.0, []
    for row, adv in zip(d, a, strict=True):
        if adv == 0:
            grad.append([0.0] * len(row))
            continue
        sgn = 1 if adv > 0 else -1
        magnitudes, kept = [], []
        for v in row:
            r = math.exp(v)
            clipped = min(max(r, math.exp(low)), math.exp(high))
            kept.append(r * adv <= clipped * adv)
            magnitudes.append(abs(min(r * adv, clipped * adv)))
        powers = [m**p for m in magnitudes]
        mean = (math.fsum(powers) / len(row)) ** (1 / p)
        loss -= sgn * mean / len(d)
        total = math.fsum(powers)
        grad.append([-sgn * mean * x / total / len(d) if k else 0.0 for x, k in zip(powers, kept)])
    return loss, grad


def pmpo_exponent(row, adv, low, high, saturation):
    """Our reconstruction: p of a response by bisection on ESS(p) / L = target, and its clips."""
    clipped = [min(v, high) if adv >= 0 else max(v, low) for v in row]
    share = sum(c != v for c, v in zip(clipped, row, strict=True)) / len(row)

    def size(p):
        weights = [math.exp(p * (c - clipped[0])) for c in clipped]
        total = math.fsum(weights)
        return total**2 / math.fsum(w * w for w in weights) / len(row)

    phi = min(1.0, share / saturation)
    if phi in (0.0, 1.0):
        return 1.0 - phi, clipped
    target = size(1.0) + (1 - size(1.0)) * phi
    below, above = 0.0, 1.0
    for _ in range(200):
        middle = (below + above) / 2
        below, above = (middle, above) if size(middle) > target else (below, middle)
    return (below + above) / 2, clipped


def pmpo(d, a, low, high, saturation):
    """Power mean of the clipped ratios with each response's own exponent, a constant."""
    loss, grad = 0.0, []
    for row, adv in zip(d, a, strict=True):
        p, clipped = pmpo_exponent(row, adv, low, high, saturation)
        top = max(clipped)
        powers = [math.exp(p * (c - top)) for c in clipped]
        if p == 0:
            mean = math.exp(math.fsum(clipped) / len(row))
        else:
            mean = math.exp(top) * (math.fsum(powers) / len(row)) ** (1 / p)
        loss -= adv * mean / len(d)
        total = math.fsum(powers)
        grad.append(
            [
                -adv * mean * x / total / len(d) if c == v else 0.0
                for x, c, v in zip(powers, clipped, row, strict=True)
            ]
        )
    return loss, grad


def ahm(d, a, low, high, weight):
    """A^w H^(1-w) of the clipped ratios; for w = 1/2 the limit of the iteration, run here."""
    loss, grad = 0.0, []
    for row, adv in zip(d, a, strict=True):
        clipped = [min(v, high) if adv >= 0 else max(v, low) for v in row]
        ratios = [math.exp(c) for c in clipped]
        arithmetic = math.fsum(ratios) / len(row)
        harmonic = len(row) / math.fsum(1 / r for r in ratios)
        if weight == 0.5:
            x, y = arithmetic, harmonic
            for _ in range(80):
                x, y = (x + y) / 2, 2 * x * y / (x + y)
            mean = x
        else:
            mean = arithmetic**weight * harmonic ** (1 - weight)
        loss -= adv * mean / len(d)
        slopes = []
        for c, v, r in zip(clipped, row, ratios, strict=True):
            share = weight * r / arithmetic + (1 - weight) * harmonic / r
            slopes.append(-adv * mean * share / len(row) / len(d) if c == v else 0.0)
        grad.append(slopes)
    return loss, grad


def gmpo_paper(d, a, low, high):
    """arXiv 2507.20673, eq. 4 as printed: min(w^sgn, clip(w^sgn, e^low, e^high))^sgn."""
    loss, grad = 0.0, []
    for row, adv in zip(d, a, strict=True):
        sgn = 1 if adv >= 0 else -1
        values, kept = [], []
        for v in row:
            w = math.exp(sgn * v)
            clipped = min(max(w, math.exp(low)), math.exp(high))
            values.append(math.log(min(w, clipped)) * sgn)
            kept.append(w <= clipped)
        mean = math.exp(math.fsum(values) / len(row))
        loss -= adv * mean / len(d)
        grad.append([-adv * mean / len(row) / len(d) if k else 0.0 for k in kept])
    return loss, grad


def gmpo_verl(d, a, low, high):
    """verl's geo_mean, whose clip takes the lower bound where the advantage is negative."""
    loss, grad = 0.0, []
    for row, adv in zip(d, a, strict=True):
        sgn = 1 if adv >= 0 else -1
        values = [sgn * min(sgn * v, sgn * min(max(v, low), high)) for v in row]
        mean = math.exp(math.fsum(values) / len(row))
        loss -= adv * mean / len(d)
        grad.append(
            [-adv * mean / len(row) / len(d) if x == v else 0.0 for x, v in zip(values, row)]
        )
    return loss, grad


def dual_clip_verl(d, a, low, high, c):
    """verl's vanilla: for A < 0, min(max(-A r, -A clip(r)), -A c); mean over responses."""
    loss, grad = 0.0, []
    for row, adv in zip(d, a, strict=True):
        slopes = []
        for v in row:
            r = math.exp(v)
            clipped = min(max(r, math.exp(low)), math.exp(high))
            one = max(-adv * r, -adv * clipped)
            slope = -adv * r if -adv * r >= -adv * clipped else 0.0
            if adv < 0 and one > -adv * c:
                one, slope = -adv * c, 0.0
            loss += one / len(row) / len(d)
            slopes.append(slope / len(row) / len(d))
        grad.append(slopes)
    return loss, grad


def delta_trl(d, a, low, high, delta):
    """TRL's two-sided clip (arXiv 2505.07291): -min(min(r, delta) A, clip(r) A)."""
    loss, grad = 0.0, []
    for row, adv in zip(d, a, strict=True):
        slopes = []
        for v in row:
            r = math.exp(v)
            clipped = min(max(r, math.exp(low)), math.exp(high))
            one, two = min(r, delta) * adv, clipped * adv
            loss -= min(one, two) / len(row) / len(d)
            slope = r * adv if one <= two and r <= delta else 0.0
            slopes.append(-slope / len(row) / len(d))
        grad.append(slopes)
    return loss, grad


def drift(d, p):
    """Mean over responses of log M_p - log M_1 (p != 0), by definition."""
    gaps = []
    for row in d:
        means = [math.log(math.fsum(math.exp(q * v) for v in row) / len(row)) / q for q in (p, 1.0)]
        gaps.append(means[0] - means[1])
    return math.fsum(gaps) / len(d)


def sequence_clip(d, a, p, bounds):
    """min(M_p A, clip(M_p) A) with each response's own bounds (nat), p != 0, mean over them."""
    loss, grad = 0.0, []
    for row, adv, (low, high) in zip(d, a, bounds, strict=True):
        powers = [math.exp(p * v) for v in row]
        mean = (math.fsum(powers) / len(row)) ** (1 / p)
        clipped = min(max(mean, math.exp(low)), math.exp(high))
        kept = mean * adv <= clipped * adv
        loss -= min(mean * adv, clipped * adv) / len(d)
        total = math.fsum(powers)
        grad.append([-adv * mean * x / total / len(d) if kept else 0.0 for x in powers])
    return loss, grad
