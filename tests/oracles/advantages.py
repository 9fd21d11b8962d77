"""Estimators of advantages as loops (no torch), each from its own source.

`rewards` and `groups` are lists with an entry a response; a reward of None was dropped. All return
a list. `lengths` repeats a response as often as it has tokens in statistics of the batch.
"""

import math


def members(groups, rewards, own):
    """Indices of the responses of a group whose reward is there."""
    return [i for i, g in enumerate(groups) if g == own and rewards[i] is not None]


def std(values, ddof):
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - ddof))


def grpo(rewards, groups, ddof=1, scale="group", batch=None):
    """arXiv 2402.03300: centred by the group, over the deviation of group or batch, or neither."""
    out = []
    for r, g in zip(rewards, groups, strict=True):
        own = [rewards[j] for j in members(groups, rewards, g)]
        if r is None or len(own) < 2 or len(set(own)) == 1:
            out.append(0.0)
            continue
        centred = r - math.fsum(own) / len(own)
        divisor = {"none": 1.0, "group": std(own, ddof), "batch": batch}[scale]
        out.append(centred / divisor)
    return out


def rloo(rewards, groups):
    """arXiv 2402.14740: less the mean of all others."""
    out = []
    for i, (r, g) in enumerate(zip(rewards, groups, strict=True)):
        others = [rewards[j] for j in members(groups, rewards, g) if j != i]
        out.append(0.0 if r is None or not others else r - math.fsum(others) / len(others))
    return out


def repeated(values, rewards, lengths):
    """Every value as often as its response has tokens."""
    kept = zip(values, rewards, lengths, strict=True)
    return [v for v, r, n in kept if r is not None for _ in range(n)]


def whiten(values, rewards, lengths, ddof=1):
    """Mean 0 and deviation 1 over all tokens."""
    every = repeated(values, rewards, lengths)
    mean, deviation = math.fsum(every) / len(every), std(every, ddof)
    scaled = [0.0 if deviation == 0 else (v - mean) / deviation for v in values]
    return [0.0 if r is None else s for r, s in zip(rewards, scaled, strict=True)]


def silent(rewards, groups, values):
    """0 for groups without two different rewards."""
    out = []
    for r, g, v in zip(rewards, groups, values, strict=True):
        own = {rewards[j] for j in members(groups, rewards, g)}
        out.append(0.0 if r is None or len(own) < 2 else v)
    return out


def reinforce_pp(rewards, lengths, ddof=1):
    """arXiv 2501.03262: rewards whitened over the batch, no groups."""
    return whiten([0.0 if r is None else r for r in rewards], rewards, lengths, ddof)


def reinforce_pp_baseline(rewards, groups, lengths, ddof=1):
    """arXiv 2501.03262: less the group's mean first."""
    centred = grpo(rewards, groups, scale="none")
    return silent(rewards, groups, whiten(centred, rewards, lengths, ddof))


def max_rl(rewards, groups):
    """arXiv 2602.02710: centred by the group, over its mean; 0 where nothing succeeded."""
    out = []
    for r, g in zip(rewards, groups, strict=True):
        own = [rewards[j] for j in members(groups, rewards, g)]
        mean = math.fsum(own) / len(own) if own else 0.0
        out.append(0.0 if r is None or mean == 0 or len(set(own)) < 2 else (r - mean) / mean)
    return out


def pass_at_k(rewards, groups, ddof=1):
    """arXiv 2503.19595 as in verl: r_best - r_second over the deviation, to the best alone."""
    out = [0.0] * len(rewards)
    for g in set(groups):
        own = members(groups, rewards, g)
        ranked = sorted(own, key=lambda j: -rewards[j])
        if len(own) > 1 and len({rewards[j] for j in own}) > 1:
            lead = rewards[ranked[0]] - rewards[ranked[1]]
            out[ranked[0]] = lead / std([rewards[j] for j in own], ddof)
    return out


def gdpo(table, groups, weights, lengths, ddof=1):
    """arXiv 2601.05242: each column normalised by its group, weighed, summed, whitened."""
    rows = [None if row is None else 0.0 for row in table]
    total = [0.0] * len(table)
    for k, weight in enumerate(weights):
        column = [None if row is None else row[k] for row in table]
        total = [t + weight * x for t, x in zip(total, grpo(column, groups, ddof), strict=True)]
    values = whiten(total, rows, lengths, ddof)
    silence = [None if row is None else tuple(row) for row in table]
    return silent(silence, groups, values)


def gdpo_where(table, groups, weights, lengths, ddof=1):
    """`gdpo` where a reward of None does not apply: 0 in its response's sum, in no statistic."""
    alive = [None if all(v is None for v in row) else 0.0 for row in table]
    total = [0.0] * len(table)
    for k, weight in enumerate(weights):
        column = [row[k] for row in table]
        total = [t + weight * x for t, x in zip(total, grpo(column, groups, ddof), strict=True)]
    values = whiten(total, alive, lengths, ddof)
    out = []
    for r, g, v in zip(alive, groups, values, strict=True):
        own = members(groups, alive, g)
        columns = [{table[j][k] for j in own} - {None} for k in range(len(weights))]
        loud = len(own) > 1 and any(len(column) > 1 for column in columns)
        out.append(v if r is not None and loud else 0.0)
    return out


def divergence(own, other, estimator, over):
    """KL of the tokens of a response by J. Schulman's estimators, summed or averaged."""
    total = 0.0
    for mine, theirs in zip(own, other, strict=True):
        x = mine - theirs
        total += {"k1": x, "k2": x * x / 2, "k3": math.exp(-x) - 1 + x}[estimator]
    return total if over == "sum" else total / max(1, len(own))
