"""Whether the exponent can matter in a run, from angles alone; the rule, and the sentence.

An update moves the policy along a unit vector, roughly. Two that differ in the exponent alone are
sqrt(2 delta) apart, delta their cosine distance; two of different seeds, which see other
minibatches, sqrt(2 eta) apart, eta the cosine distance between gradients of independent
minibatches. How far U updates take two exponents apart depends on whether the differences line up:

    not at all            sqrt(2 U delta)     so another exponent is another seed where delta < eta
    all of them           U sqrt(2 delta)     which passes two seeds, sqrt(2 U eta), at
                                              U = eta / delta updates, the fewest that can do

So p cannot matter while U < eta / delta, however the differences line up; beyond that it can, and
whether it does is for runs to say. Where delta < eta as well, no single update shows it: another
exponent changes each of them less than another seed does, and only what lines up comes out, over
many updates and seeds. In the first line delta is the mean over the updates of a rollout, in the
second sqrt(delta) is: the first updates are often fresh.

The answer is of p = -1 against 1, the named members, where both were compared; the pair that is
furthest apart, for most runs -2 against 2 and four times as far, is told beside it.

eta comes from the two halves of a minibatch: a gradient of half the rows has twice the variance,
so halves at distance h belong to whole minibatches at eta = h / (2 - h).
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Space = Literal["weights", "log-probs"]
Word = Literal["cannot", "can", "unknown"]
_WHERE = {"weights": "in the space of weights", "log-probs": "in the space of token log-probs"}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether p can matter, and every figure that the answer rests on.

    Example: `Verdict(word="cannot", sentence="p cannot matter in this run: ...",
    pair=(-2.0, 2.0), distance=0.0004, expected=0.0005, ...)`.
    """

    word: Word
    """cannot: not even where all differences line up. can: where they do. unknown: no gradient,
    or no number of updates."""
    clear: bool
    """Whether the exponents differ at least as much as gradient noise in the updates themselves,
    so that nothing need line up."""
    sentence: str
    pair: tuple[float, float]
    """The exponents that the answer is of: -1 and 1, or the furthest apart where they were not both
    compared."""
    space: Space
    """Where the distance was measured."""
    distance: float | None
    """Their cosine distance at the stalest update, without a clip."""
    clipped: float | None
    """The same under the token clip that all exponents share."""
    expected: float
    """What exp(-(p - q)^2 sigma^2 / 2) gives for that distance in the space of log-probs."""
    mean: float | None
    """Mean of their distance over the updates of the rollout (delta)."""
    noise: float
    """Cosine distance between the gradients of independent minibatches (eta)."""
    halves: float | None
    """Cosine distance between two halves of a minibatch, of which it was made; None where it was
    not measured and unrelated halves are taken."""
    updates: int | None
    """Of the run."""
    fewest: float | None
    """Updates after which exponents whose differences all line up are as far apart as two seeds;
    None where there is no difference."""
    extreme: "Extreme | None" = None
    """The exponents that are furthest apart, where they are others than `pair`."""


@dataclass(frozen=True, kw_only=True)
class Extreme:
    """The same question of the two exponents that are furthest apart.

    Example: `Extreme(pair=(-2.0, 2.0), distance=0.15, fewest=12.0, word="can")`.
    """

    pair: tuple[float, float]
    distance: float | None
    """Their cosine distance at the stalest update, without a clip."""
    fewest: float | None
    """Updates after which differences that all line up take them as far apart as two seeds."""
    word: Word


@dataclass(frozen=True, kw_only=True)
class Angles:
    """What the rule looks at.

    Example: `Angles(pair=(-2.0, 2.0), space="weights", distances=(0.0, 0.2), clipped=0.1,
    expected=0.03, halves=(0.7, 0.6), updates=130)`.
    """

    pair: tuple[float, float]
    """The exponents that the answer is of."""
    space: Space
    distances: Sequence[float | None]
    """Theirs without a clip, at each update of a rollout that was seen, the stalest last; None
    where there is no gradient."""
    clipped: float | None
    """Theirs under the shared clip, at the stalest."""
    expected: float
    """What the spread of the log ratios gives for the last."""
    halves: Sequence[float | None]
    """Distances between halves of the minibatches; None where not measured."""
    updates: int | None
    """Of the whole run; None where nobody knows."""
    extreme: tuple[float, float] | None = None
    """The exponents that are furthest apart, where they are others."""
    extreme_distances: Sequence[float | None] = ()
    """Theirs, as `distances`."""


def minibatch_noise(halves: float) -> float:
    """Cosine distance between independent minibatches, from that between halves of one.

    Halves further apart than at a right angle are so by chance, and count as at one.
    """
    halves = min(max(halves, 0.0), 1.0)
    return halves / (2 - halves)


def judge(angles: Angles) -> Verdict:
    """The rule."""
    known = [h for h in angles.halves if h is not None]
    half = sum(known) / len(known) if known else None
    noise = 1.0 if half is None else minibatch_noise(half)
    mean, fewest, word = _rule(angles.distances, noise, angles.updates)
    clear = mean is not None and mean >= noise and fewest is not None
    stalest = angles.distances[-1] if angles.distances else None
    extreme = None
    if angles.extreme is not None:
        _, least, other = _rule(angles.extreme_distances, noise, angles.updates)
        last = angles.extreme_distances[-1]
        extreme = Extreme(pair=angles.extreme, distance=last, fewest=least, word=other)
    found = Verdict(
        word=word,
        clear=clear,
        sentence="",
        pair=angles.pair,
        space=angles.space,
        distance=stalest,
        clipped=angles.clipped,
        expected=angles.expected,
        mean=mean,
        noise=noise,
        halves=half,
        updates=angles.updates,
        fewest=fewest,
        extreme=extreme,
    )
    return dataclasses.replace(found, sentence=_sentence(found))


def _rule(
    distances: Sequence[float | None], noise: float, updates: int | None
) -> tuple[float | None, float | None, Word]:
    """Of one pair: mean distance, fewest updates, the word."""
    seen = [d for d in distances if d is not None]
    if not seen:
        return None, None, "unknown"
    mean = sum(seen) / len(seen)
    aligned = (sum(map(math.sqrt, seen)) / len(seen)) ** 2
    fewest = noise / aligned if aligned > 0 else None
    return mean, fewest, _word(updates, mean >= noise, fewest)


def _word(updates: int | None, clear: bool, fewest: float | None) -> Word:
    if fewest is None:
        return "cannot"
    if updates is None:
        return "can" if clear else "unknown"
    return "cannot" if updates < fewest else "can"


def _sentence(found: Verdict) -> str:
    """The answer in one sentence, with the figures it rests on."""
    if found.distance is None:
        return (
            "nothing can be said of p: no response has an advantage and tokens, so there is no "
            "gradient; take another rollout"
        )
    if found.fewest is None:
        return (
            "p cannot matter in this run: every log ratio is 0 (nothing is stale), so all "
            "exponents have one and the same gradient"
        )
    p, q = found.pair
    figures = (
        f"the cosine distance of p = {p:g} against {q:g} is {found.distance:.2g} "
        f"({_WHERE[found.space]}), gradient noise makes {found.noise:.2g} between two minibatches"
    )
    if found.halves is None:
        figures += " at most (the policy is not at hand to measure it)"
    least = _count(found.fewest)
    if found.word == "cannot":
        apart = found.extreme is not None and found.extreme.word != "cannot"
        which = f" between {p:g} and {q:g}" if apart else ""
        said = (
            f"p cannot matter in this run{which}: {figures}; with this staleness the two will not "
            f"differ by more than seeds do, not even if all {found.updates} updates pulled the "
            f"same way (that would take {least})"
        )
    elif found.word == "can" and found.clear:
        said = (
            f"p can matter in this run: {figures}, so another exponent changes its updates at "
            "least as much as another seed does"
        )
    elif found.word == "can":
        said = (
            f"p can matter in this run, though not in one update alone: {figures}, so only "
            f"differences that line up over at least {least} of its {found.updates} updates show, "
            "and seeds are needed to tell"
        )
    else:
        said = (
            f"p cannot matter in fewer than {least} updates: {figures}; the number of updates of "
            "the run is not known, and beyond it differences that line up can show"
        )
    return said + _further(found.extreme)


def _further(extreme: Extreme | None) -> str:
    """What is told of the exponents that are furthest apart."""
    if extreme is None or extreme.distance is None or extreme.fewest is None:
        return ""
    p, q = extreme.pair
    told = {
        "cannot": "cannot matter either",
        "can": "can, where differences line up",
        "unknown": "can beyond that, where differences line up",
    }[extreme.word]
    return (
        f"; the exponents furthest apart, p = {p:g} against {q:g} at {extreme.distance:.2g}, "
        f"{told} (from {_count(extreme.fewest)} updates on)"
    )


def _count(number: float) -> str:
    """A number of updates, at least 1, as it is read."""
    number = max(1.0, number)
    return f"{math.ceil(number)}" if number < 1e6 else f"{number:.0e}"
