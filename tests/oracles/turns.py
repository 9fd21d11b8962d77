"""The objective over the turns of conversations, as float64 loops (no torch).

`conversations` is a list of responses, each a list of turns, each a list of token log ratios; `a`
one advantage for each response; bounds are in nat. The result is (loss, gradient in the log-probs,
as lists like `conversations`).
"""

import math


def mean(row, p):
    """(M_p of the ratios, its token weights)."""
    if p == 0:
        return math.exp(math.fsum(row) / len(row)), [1 / len(row)] * len(row)
    powers = [math.exp(p * v) for v in row]
    total = math.fsum(powers)
    return (total / len(row)) ** (1 / p), [x / total for x in powers]


def weight(turns, conversations, reduction, max_length):
    """omega of a response."""
    length = sum(len(turn) for turn in turns)
    responses = len(conversations)
    if reduction == "sequence_mean":
        return 1 / responses
    if reduction == "token_mean":
        return length / sum(len(turn) for other in conversations for turn in other)
    return length / responses / (max_length if reduction == "constant" else 1)


def by_turn(conversations, a, p, level, low, high, reduction, max_length=None):
    """Each turn its own clipped mean; of its response's weight the share of its tokens."""
    loss, grad = 0.0, []
    for turns, adv in zip(conversations, a, strict=True):
        omega = weight(turns, conversations, reduction, max_length)
        length = sum(len(turn) for turn in turns)
        slopes = []
        for turn in turns:
            share = omega * len(turn) / length
            if level == "token":
                limited = [min(v, high) if adv >= 0 else max(v, low) for v in turn]
                m, weights = mean(limited, p)
                kept = [x == v for x, v in zip(limited, turn, strict=True)]
                loss -= share * adv * m
            else:
                m, weights = mean(turn, p)
                clipped = min(max(m, math.exp(low)), math.exp(high))
                kept = [m * adv <= clipped * adv] * len(turn)
                loss -= share * min(m * adv, clipped * adv)
            slopes.append(
                [-share * adv * m * w if k else 0.0 for w, k in zip(weights, kept, strict=True)]
            )
        grad.append(slopes)
    return loss, grad
