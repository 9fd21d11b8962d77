"""What the runs say of each hypothesis of studies/protocol.toml: measured, and held or not."""

from collections.abc import Callable, Sequence

import numpy as np
from study_judged import (
    HELD,
    NOT,
    ONE,
    READY,
    UNDECIDED,
    Found,
    Reader,
    awaited,
    complete_study,
    span,
)
from study_predictions import PREDICTIONS
from study_rates import STUDIES

from hmpo.lab.statistics.intervals import holm, paired_t
from hmpo.lab.statistics.verdicts import Verdict, verdict
from hmpo.lab.study.analysis import Study, endpoints
from hmpo.lab.suite.protocol import read_protocol


def words_of(sides: dict[str, dict[int, float]], pairs: Sequence[tuple[str, str]], smallest: float
             ) -> list[Verdict]:  # fmt: skip
    """The verdict of each pair of sides over the seeds they share; Holm over the pairs."""
    gaps = []
    for one, other in pairs:
        seeds = sorted(sides[one].keys() & sides[other].keys())
        gaps.append([sides[one][seed] - sides[other][seed] for seed in seeds])
    chances = holm([paired_t(gap).p_value or 1.0 for gap in gaps])
    return [
        verdict(gap, smallest, float(p), method=one, baseline=other)
        for gap, p, (one, other) in zip(gaps, chances, pairs, strict=True)
    ]


def told_pairs(pairs: Sequence[tuple[str, str]], found: Sequence[Verdict]) -> str:
    """Differences in points with both intervals' better one: 95 %, or 90 % for equivalence."""
    parts = []
    for (one, other), v in zip(pairs, found, strict=True):
        same = v.word == "no difference"
        e = v.equivalence.interval if same else v.estimate
        level = f"{100 * e.level:.0f} % "
        parts.append(
            f"{one} less {other} {100 * e.value:+.1f} ({level}{span(e.low, e.high, 100)}): {v.word}"
        )
    return "; ".join(parts)


def all_equivalent(found: Sequence[Verdict]) -> str:
    """All pairs at once: each passes its own test (intersection-union, so nothing to adjust)."""
    if all(v.equivalence.equivalent for v in found):
        return HELD
    return NOT if any(v.word in ("better", "worse") for v in found) else UNDECIDED


PAIRS = (("p1", "p0"), ("p1", "p-1"), ("p0", "p-1"))


def of_levels(study: Study, names: Sequence[str], rest: str) -> dict[str, dict[int, float]]:
    """Endpoints by seed of cells that differ in their first level."""
    return {name: endpoints(study.runs.get(f"{name}+{rest}", {})) for name in names}


def fresh_and_short(read: Reader) -> list[Found]:
    """a: p = 1, 0 and -1 on fresh data and short answers."""
    found = []
    for suite, rest in (("sweep", "token+fresh"), ("signs", "key+fresh")):
        study = read(suite)
        if study is None:
            found.append(Found(suite, "runs are missing", READY))
            continue
        words = words_of(of_levels(study, ONE, rest), PAIRS, study.plan.smallest)
        found.append(Found(f"{suite}, {rest}", told_pairs(PAIRS, words), all_equivalent(words)))
    return found


def stale_and_long(read: Reader) -> list[Found]:
    """b: p = 1 and -1 on stale data and long answers."""
    study = read("signs")
    if study is None:
        return awaited("signs")
    pair = (("p1", "p-1"),)
    words = words_of(of_levels(study, ONE, "carry+stale"), pair, study.plan.smallest)
    told = {"better": HELD, "worse": HELD, "no difference": f"{NOT}, equivalent"}
    word = told.get(words[0].word, UNDECIDED)
    return [Found("signs, carry+stale", told_pairs(pair, words), word)]


def as_rates(read: Reader) -> list[Found]:
    """c: each exponent at its own best rate, which for each seed the other seeds choose."""
    study = read("envelope")
    if study is None:
        return awaited("envelope")
    rates = ("r1e-5", "r3e-5", "r1e-4", "r3e-4", "r1e-3", "r3e-3")
    found = []
    for regime in ("fresh", "stale"):
        sides = {
            p: best_by_others([endpoints(study.runs.get(f"{p}+{regime}+{r}", {})) for r in rates])
            for p in ONE
        }
        words = words_of(sides, PAIRS, study.plan.smallest)
        found.append(Found(f"envelope, {regime}", told_pairs(PAIRS, words), all_equivalent(words)))
    return found


def best_by_others(by_rate: Sequence[dict[int, float]]) -> dict[int, float]:
    """Each seed's endpoint at the rate that is best for the other seeds; of equals the lower."""
    seeds = sorted(set.intersection(*(set(values) for values in by_rate)))
    table = np.array([[values[seed] for values in by_rate] for seed in seeds])
    others = (table.sum(0) - table).argmax(1)
    return dict(zip(seeds, table[np.arange(len(seeds)), others].tolist(), strict=True))


def sign_aware(read: Reader) -> list[Found]:
    """d: the pessimistic pair against every fixed exponent."""
    study = read("signs")
    if study is None:
        return awaited("signs")
    pairs = tuple(("pessimistic", p) for p in ONE)
    sides = of_levels(study, ("pessimistic", *ONE), "carry+stale")
    words = words_of(sides, pairs, study.plan.smallest)
    told = {v.word for v in words}
    word = HELD if told == {"better"} else NOT if told & {"worse", "no difference"} else UNDECIDED
    return [Found("signs, carry+stale", told_pairs(pairs, words), word)]


JUDGES: dict[str, Callable[[Reader], list[Found]]] = {
    **PREDICTIONS,
    "a": fresh_and_short,
    "b": stale_and_long,
    "c": as_rates,
    "d": sign_aware,
}


def hypotheses(read: Reader = complete_study) -> str:
    """The table: one row for each hypothesis and place where it was looked at."""
    lines = ["| | prediction | where | measured | |", "|---|---|---|---|---|"]
    for one in read_protocol(STUDIES / "protocol.toml").data["hypotheses"]:
        for number, found in enumerate(JUDGES[one["id"]](read)):
            head = [one["id"], one["prediction"]] if number == 0 else ["", ""]
            cells = [*head, found.place, found.measured, found.word]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
