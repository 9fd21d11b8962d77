"""The mean entropy that a bonus weighs, as loops (no torch)."""

import math


def bonus(rows, reduction, max_length=None):
    """Entropies of each response's tokens (lists, perhaps empty), reduced as the policy term is."""
    counted = [row for row in rows if row]
    tokens = sum(len(row) for row in counted)
    if reduction == "sequence_mean":
        return math.fsum(math.fsum(row) / len(row) for row in counted) / len(counted)
    total = math.fsum(value for row in counted for value in row)
    divisor = {
        "token_mean": tokens,
        "constant": len(counted) * (max_length or 0),
        "length_sum": len(counted),
    }
    return total / divisor[reduction]
