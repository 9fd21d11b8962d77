"""The lab's statistics as slow loops over plain numbers, written from the definitions."""

import itertools
import math


def mean(values):
    return math.fsum(values) / len(values)


def variance(values):
    m = mean(values)
    return math.fsum((v - m) ** 2 for v in values) / (len(values) - 1)


def holm(p_values):
    """The closed test: the largest p of all subsets that hold the hypothesis, by Bonferroni."""
    m = len(p_values)
    adjusted = []
    for i in range(m):
        worst = 0.0
        for size in range(1, m + 1):
            for subset in itertools.combinations(range(m), size):
                if i in subset:
                    worst = max(worst, min(1.0, size * min(p_values[j] for j in subset)))
        adjusted.append(worst)
    return adjusted


def kaplan_meier(times, reached):
    """[(event time, share still without the event)]."""
    out, left = [], 1.0
    for t in sorted({t for t, r in zip(times, reached) if r}):
        risk = sum(1 for s in times if s >= t)
        events = sum(1 for s, r in zip(times, reached) if r and s == t)
        left *= 1 - events / risk
        out.append((t, left))
    return out


def expected_best(scores, draws, replace):
    """Mean of the maximum over every draw that could happen."""
    choose = (
        itertools.product(scores, repeat=draws)
        if replace
        else itertools.combinations(scores, draws)
    )
    return mean([max(c) for c in choose])


def improvement(a, b):
    """Share of pairs in which a is above b, ties half."""
    return mean([1.0 if x > y else 0.5 if x == y else 0.0 for x in a for y in b])


def two_way(d):
    """Mean squares of rows, columns and rest of a table without replication."""
    s, p = len(d), len(d[0])
    grand = mean([v for row in d for v in row])
    rows = [mean(row) for row in d]
    columns = [mean([row[j] for row in d]) for j in range(p)]
    of_rows = p * math.fsum((r - grand) ** 2 for r in rows) / (s - 1)
    of_columns = s * math.fsum((c - grand) ** 2 for c in columns) / (p - 1)
    rest = math.fsum(
        (d[i][j] - rows[i] - columns[j] + grand) ** 2 for i in range(s) for j in range(p)
    )
    return of_rows, of_columns, rest / ((s - 1) * (p - 1))


def sigmoid(c, start, top, middle, slope):
    return start + (top - start) / (1 + (middle / c) ** slope)


def first_at(kl, reward, level):
    """Reward where a path of straight lines first reaches `level`."""
    if kl[0] > level:
        return None
    if kl[0] == level:
        return reward[0]
    for (x0, y0), (x1, y1) in itertools.pairwise(zip(kl, reward)):
        if x1 >= level:
            return y0 + (level - x0) / (x1 - x0) * (y1 - y0)
    return None
