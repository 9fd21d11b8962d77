"""Rewards of form as slow loops over tokens and characters, written from the definitions."""

import math


def overlong(length, longest, cache):
    """DAPO, eq. 13, token by token: a share 1 / cache for each token of the last `cache`."""
    penalty = 0.0
    for position in range(1, length + 1):
        if position > longest:
            return -1.0
        if position > longest - cache:
            penalty -= 1 / cache
    return penalty


def cosine(right, tokens, longest, ends):
    """Yeo et al. (2025), app. C.1: from `ends[0]` at no token to `ends[1]` at the longest."""
    angle = math.pi * min(tokens, longest) / longest
    return ends[1] + (ends[0] - ends[1]) / 2 * (1 + math.cos(angle)) if right is not None else None


def repetition(ids, n, most):
    """Share of the n-grams that stand for the second time or more, times `most`."""
    seen, again, count = [], 0, 0
    for i in range(len(ids)):
        gram = list(ids[i : i + n])
        if len(gram) < n:
            break
        count += 1
        again += gram in seen
        seen.append(gram)
    return most * again / count if count else 0.0


def box(text):
    r"""What the last `\boxed{` holds, by counting braces character by character."""
    begin = text.rfind("\\boxed{")
    if begin < 0:
        return None
    depth, i, inside = 1, begin + len("\\boxed{"), ""
    while i < len(text):
        if text[i] == "\\":
            inside += text[i : i + 2]
            i += 2
            continue
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return inside
        inside += text[i]
        i += 1
    return None
