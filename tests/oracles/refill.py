"""Dynamic sampling as one would do it by hand: prompt after prompt, with no array."""

from collections.abc import Sequence


def refilled(
    groups: Sequence[Sequence[float | None]],
    wanted: int,
    *,
    attempts: int,
    tokens: int,
    responses: int,
    least: int,
    tokens_of_group: int,
) -> tuple[list[int], list[int]]:
    """Which of a stream of groups are trained on, and how many each attempt has drawn.

    Args:
        groups: accuracies of the stream's groups; None for a response that does not count.
        wanted: groups of a full batch.
        attempts: most attempts.
        tokens: from which on no further attempt is made; 0 for no limit.
        responses: most responses; 0 for no limit.
        least: groups that a batch must have, with or without a signal.
        tokens_of_group: what each group costs.
    """
    sizes: list[int] = []
    kept: list[int] = []
    dead: list[int] = []
    at = 0
    while True:
        room = wanted - len(kept)
        if responses:
            room = min(room, responses // len(groups[0]) - at) if sizes else room
        if (
            room <= 0
            or len(sizes) == attempts
            or (sizes and tokens and at * tokens_of_group >= tokens)
        ):
            break
        for _ in range(room):
            values = {value for value in groups[at] if value is not None}
            (kept if len(values) > 1 else dead).append(at)
            at += 1
        sizes.append(room)
    if not kept:
        return list(range(wanted)), sizes
    while len(kept) < least and dead:
        kept.append(dead.pop(0))
    return sorted(kept), sizes
