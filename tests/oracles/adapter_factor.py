"""The largest factor on an adapter that keeps one head at or under tau, by looking at many."""

import math


def logit(query, query_step, key, key_step, scale, c):
    """One pair's logit with the adapter's part of query and key times c."""
    q = [a + c * b for a, b in zip(query, query_step, strict=True)]
    k = [a + c * b for a, b in zip(key, key_step, strict=True)]
    return scale * math.fsum(a * b for a, b in zip(q, k, strict=True))


def largest_logit(queries, query_steps, keys, key_steps, scale, c):
    """S(c) of one causal head; each argument is a list of rows."""
    return max(
        logit(queries[i], query_steps[i], keys[j], key_steps[j], scale, c)
        for i in range(len(queries))
        for j in range(i + 1)
    )


def scan(largest, tau, points):
    """The largest of `points` + 1 even factors with S(c) <= tau, or -inf."""
    for i in range(points, -1, -1):
        if largest(i / points) <= tau:
            return i / points
    return -math.inf
