"""Words that follow numbers: better, worse, no difference, undecided.

* "better" and "worse": the interval excludes 0, p (adjusted by Holm within the block) is below
  alpha, and the mean difference is at least the smallest that matters.
* "no difference": the two one-sided tests show that it is smaller than that, with their p (adjusted
  by Holm within the block, a family of its own) below alpha.
* else "undecided", with the seeds that would decide.
"""

from dataclasses import dataclass

import numpy as np

from hmpo.errors import StatisticsError
from hmpo.lab.statistics import power as seeds_and_power
from hmpo.lab.statistics.equivalence import Equivalence, two_one_sided
from hmpo.lab.statistics.inputs import Array, Values, level_of, number, vector
from hmpo.lab.statistics.intervals import Estimate, paired_t

WANTED = 0.8
"""Chance to decide on which the number of further seeds rests."""


@dataclass(frozen=True)
class Verdict:
    """What paired differences allow to say; all numbers in the unit of the score."""

    word: str
    """better, worse, no difference or undecided."""
    sentence: str
    """Ready to print, in points."""
    estimate: Estimate
    equivalence: Equivalence
    detectable: float | None
    """Smallest true difference that these seeds see with chance .8; None from one seed."""
    seeds_needed: int | None
    """Further seeds that would decide, for "undecided"; None: decided, more than 1000, or unknown
    (one seed)."""


def verdict(
    differences: Values,
    smallest: float,
    adjusted_p: float | None = None,
    alpha: float = 0.05,
    *,
    adjusted_equivalence: float | None = None,
    method: str = "the method",
    baseline: str = "the baseline",
    unit: str = "points of success",
    scale: float = 100.0,
) -> Verdict:
    """The word for a method against its baseline, and why.

    Args:
        differences: score of the method less that of the baseline on each shared seed, shape [n].
        smallest: smallest difference that matters, > 0, in the unit of the score.
        adjusted_p: Holm's p where several comparisons were made; None takes the test's own.
        adjusted_equivalence: the same of the two one-sided tests, a family of their own.
        alpha: error; the interval has level 1 - alpha, the equivalence 1 - 2 alpha.
        method: name for the sentence.
        baseline: name for the sentence.
        unit: of the score times `scale`, for the sentence.
        scale: 100 turns a success rate into points.

    The seeds that would decide are those with which a difference of `smallest` would be seen, and
    none be shown to be less, each with chance .8. Where that many are there already, the truth
    lies near the smallest difference that matters or the family is large, and they are those that
    the observed difference needs. The sd is the observed one and uncertain by itself (`pilot`).
    """
    d, smallest = vector("differences", differences), number("smallest", smallest)
    estimate = paired_t(d, 1 - level_of("alpha", alpha))
    equivalence = two_one_sided(d, smallest, alpha)
    given = {"adjusted_p": adjusted_p, "adjusted_equivalence": adjusted_equivalence}
    for name, value in given.items():
        if value is not None and not 0 <= value <= 1:
            raise StatisticsError(f"{name}: got {value}, expected a number in [0, 1]")
    p = estimate.p_value if adjusted_p is None or d.size == 1 else float(adjusted_p)
    equal = equivalence.p_value
    if adjusted_equivalence is not None and d.size > 1:
        equal = float(adjusted_equivalence)
    word = _word(estimate, equal, p, smallest, alpha)
    visible = more = None
    if d.size > 1:
        visible = seeds_and_power.detectable(float(d.std(ddof=1)), d.size, WANTED, alpha)
        if word == "undecided":
            own = (_strict(alpha, estimate.p_value, p), _strict(alpha, equivalence.p_value, equal))
            more = _more(estimate, float(d.std(ddof=1)), smallest, *own)
    text = _Text(method, baseline, unit, scale)
    shown = None if adjusted_equivalence is None else equal
    sentence = text.sentence(
        word, estimate, equivalence, p, adjusted_p is not None, more, alpha, shown
    )
    return Verdict(word, sentence, estimate, equivalence, visible, more)


def direction(
    mean: Array,
    low: Array,
    high: Array,
    p: Array,
    smallest: float,
    alpha: float,
) -> Array:
    """1 for better, -1 for worse, 0 for neither, of intervals and (adjusted) p values [...]."""
    apart = (low > 0) | (high < 0)
    return np.sign(mean) * (apart & (p < alpha) & (np.abs(mean) >= smallest))


def _word(
    estimate: Estimate, equal: float | None, p: float | None, smallest: float, alpha: float
) -> str:
    if p is not None:
        mean, low, high, chance = np.array([estimate.value, estimate.low, estimate.high, p], float)
        sign = int(direction(mean, low, high, chance, smallest, alpha))
        if sign:
            return "better" if sign > 0 else "worse"
    return "no difference" if equal is not None and equal < alpha else "undecided"


def _strict(alpha: float, own: float | None, adjusted: float | None) -> float:
    """The level that a test of its own p must pass so that the adjusted one passes `alpha`."""
    return min(alpha, alpha * own / adjusted) if own and adjusted else alpha


def _more(
    estimate: Estimate, sd: float, smallest: float, strict: float, alpha: float
) -> int | None:
    """Further seeds that would decide; None beyond `MOST` in all.

    Args:
        estimate: of the mean difference.
        sd: of the differences.
        smallest: difference that matters.
        strict: level of the test of a difference, in its family.
        alpha: level of the two one-sided tests, in theirs.
    """
    see = seeds_and_power.seeds_needed(sd, smallest, WANTED, strict)
    show = seeds_and_power.seeds_for_equivalence(sd, smallest, 0.0, WANTED, alpha)
    if see is None or show is None:
        return None
    total: int | None = max(see, show)
    size = abs(estimate.value)
    if total is not None and total <= estimate.n:
        if size >= smallest:
            total = seeds_and_power.seeds_needed(sd, size, WANTED, strict)
        else:
            total = seeds_and_power.seeds_for_equivalence(sd, smallest, size, WANTED, alpha)
    return None if total is None else max(total - estimate.n, 1)


@dataclass(frozen=True)
class _Text:
    """Names and unit of a sentence."""

    method: str
    baseline: str
    unit: str
    scale: float

    def sentence(
        self,
        word: str,
        estimate: Estimate,
        equivalence: Equivalence,
        p: float | None,
        adjusted: bool,
        more: int | None,
        alpha: float,
        equal: float | None,
    ) -> str:
        """The verdict in one sentence."""
        if estimate.low is None or estimate.high is None or p is None:
            return (
                f"undecided: {self.method} differs from {self.baseline} by "
                f"{self.points(estimate.value)} {self.unit} on one seed, which gives no interval"
            )
        name = "Holm-adjusted p" if adjusted else "p"
        by = f"({self.interval(estimate)}, {estimate.n} seeds, {name} {p_text(p)})"
        if word in ("better", "worse"):
            size = f"{abs(estimate.value) * self.scale:.1f} {self.unit}"
            return f"{self.method} is {word} than {self.baseline} by {size} {by}"
        margin = f"{equivalence.margin * self.scale:.1f}"
        if word == "no difference":
            why = "" if equal is None else f", Holm-adjusted p {p_text(equal)}"
            return (
                f"no difference between {self.method} and {self.baseline} as large as {margin} "
                f"{self.unit} ({self.interval(equivalence.interval)}, {estimate.n} seeds{why})"
            )
        why = ""
        if p < alpha and abs(estimate.value) < equivalence.margin:
            why = f", there is a difference, which may be less than the {margin} that matter"
        elif estimate.excludes_zero:
            why = ", not after correction for the number of comparisons"
        elif equivalence.equivalent:
            why = ", equivalent, but not after correction for the number of comparisons"
        return (
            f"undecided: {self.method} differs from {self.baseline} by "
            f"{self.points(estimate.value)} {self.unit} {by}{why}; {self.further(more)}"
        )

    def points(self, value: float) -> str:
        """A signed difference; never `-0.0`."""
        return f"{round(value * self.scale, 1) + 0.0:+.1f}"

    def interval(self, estimate: Estimate) -> str:
        """`95 % interval -1.2 to +3.4`."""
        low, high = self.points(estimate.low or 0.0), self.points(estimate.high or 0.0)
        return f"{100 * estimate.level:.0f} % interval {low} to {high}"

    @staticmethod
    def further(more: int | None) -> str:
        """How many seeds would decide."""
        if more is None:
            return f"{seeds_and_power.seeds_text(None)} would be needed"
        return f"about {more} more seed{'s' * (more != 1)} would decide"


def p_text(p: float) -> str:
    """`= 0.034`, `< 0.0001`."""
    return "< 0.0001" if p < 1e-4 else f"= {p:.2g}"
