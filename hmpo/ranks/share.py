"""Who does what: pieces of known cost, dealt to ranks."""

from collections.abc import Sequence

from hmpo.errors import require


def dealt(costs: Sequence[int | float], ranks: int) -> list[list[int]]:
    """Each piece to one rank, the costliest first, always to the rank that has the least to do.

    The most loaded rank has at most 4/3 of what it would have in the best division (Graham, 1969,
    "Bounds on multiprocessing timing anomalies", theorem 2).

    Args:
        costs: of the pieces, finite and not negative.
        ranks: at least 1.

    Returns:
        For each rank its pieces in rising order; () where there are fewer pieces than ranks.
    """
    require(ranks >= 1, "ranks", ranks, "an integer >= 1")
    load, pieces = [0.0] * ranks, [[] for _ in range(ranks)]
    for piece in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(ranks), key=lambda r: (load[r], len(pieces[r]), r))
        load[rank] += costs[piece]
        pieces[rank].append(piece)
    return [sorted(own) for own in pieces]
