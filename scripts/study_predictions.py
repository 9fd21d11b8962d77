"""What the runs say of the predictions P1 to P8 of studies/protocol.toml.

Each judge looks only at suites that are complete. `held` and `did not hold` need an interval, or a
count or share that the prediction itself names; all else is `undecided`.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from lab_tables import BOUND
from results import load
from study_judged import (
    HELD,
    NOT,
    ONE,
    READY,
    UNDECIDED,
    Found,
    Reader,
    above,
    awaited,
    metric_of,
    of_cell,
    ratio,
    span,
    within,
)

from hmpo.lab.statistics.intervals import holm, paired_t, rate
from hmpo.lab.study.analysis import Study, endpoints
from hmpo.lab.study.outcomes import Outcome

SEVEN = ("p-2", "p-1", "p-0.5", "p0", "p0.5", "p1", "p2")
SMALL = 1e-6
"""k3 (nat) below which float32's rounding is as large, so that a ratio of two says nothing."""
RESAMPLES = 10_000


def one_update(read: Reader) -> list[Found]:
    """P1: cells with one update a rollout, seed by seed."""
    found = []
    for suite in ("headline", "sweep", "signs"):
        study = read(suite)
        if study is None:
            found.append(Found(suite, "runs are missing", READY))
            continue
        pairs, equal, largest = 0, 0, 0.0
        for cell in study.cells("negative"):
            others = of_cell(study, cell.against)
            for seed, one in of_cell(study, cell.name).items():
                if seed in others:
                    pairs += 1
                    equal += bool(one.passed) and one.passed == others[seed].passed
                    largest = max(largest, prompts_apart(one, others[seed]))
        if pairs:
            told = f"{equal} of {pairs} pairs of runs pass the same prompts at every evaluation; "
            told += f"largest difference {largest:g} prompts"
            found.append(Found(suite, told, HELD if largest <= 1 else NOT))
    return found


def prompts_apart(one: Outcome, other: Outcome) -> float:
    """Most held-out prompts by which any evaluation differs in number; infinite if none match."""
    if one.evals["step"] != other.evals["step"] or not one.after.get("n"):
        return math.inf
    rates = zip(one.evals["sampled"], other.evals["sampled"], strict=True)
    return round(max(abs(a - b) for a, b in rates) * one.after["n"], 3)


def cosines(read: Reader) -> list[Found]:
    """P2: from the probe's file."""
    rows = [
        row
        for row in load("probe_prediction")["rows"]
        if row["case"] != "normal" and row["sigma"] < 0.3 and "weights" in row
    ]
    errors = [
        a - b
        for row in rows
        for p, a, b in zip(row["p"], row["weights"], row["formula"], strict=True)
        if p and a is not None and b is not None
    ]
    inside = sum(abs(error) <= BOUND for error in errors)
    told = f"in weights {inside} of {len(errors)} exponents and batches within {BOUND:g}, "
    told += f"furthest {max(errors, key=abs):+.2f}"
    return [Found("probe", told, HELD if inside == len(errors) else NOT)]


def clipped_signs(read: Reader) -> list[Found]:
    """P3: clipped shares of both signs under a sequence clip, p = -1."""
    study = read("sweep")
    if study is None:
        return awaited("sweep")
    one = {regime: _sign_gaps(study, f"p-1+one+{regime}") for regime in ("fresh", "stale")}
    found = []
    for regime, gaps in one.items():
        e = paired_t(list(gaps.values()))
        told = f"clip/frac_neg - clip/frac_pos {e.value:+.3f} ({span(e.low, e.high, form='+.3f')})"
        found.append(Found(f"sweep, {regime}, centre one", told, above(e.low, e.high)))
    sizes = {r: metric_of(study, f"p-1+one+{r}", "sigma_sqrt_l").values() for r in one}
    means = {r: math.fsum(values) / len(values) for r, values in sizes.items()}
    wide, narrow = sorted(one, key=lambda r: means[r], reverse=True)
    seeds = sorted(one[wide].keys() & one[narrow].keys())
    e = paired_t([one[wide][seed] - one[narrow][seed] for seed in seeds])
    told = f"that difference in {wide} (sigma sqrt(L) {means[wide]:.2f}) less in {narrow} "
    told += f"({means[narrow]:.2f}): {e.value:+.3f} ({span(e.low, e.high, form='+.3f')})"
    found.append(Found("sweep, growth", told, above(e.low, e.high)))
    for regime in one:
        e = paired_t(list(_sign_gaps(study, f"p-1+drift+{regime}").values()), 0.9)
        told = f"difference {e.value:+.3f} (90 % {span(e.low, e.high, form='+.3f')})"
        word = within(e.low, e.high, -0.05, 0.05)
        found.append(Found(f"sweep, {regime}, centre drift", told, word))
    return found


def _sign_gaps(study: Study, cell: str) -> dict[int, float]:
    """Clipped share of negative advantages less that of positive ones, by seed."""
    low, high = (metric_of(study, cell, f"clip_frac_{sign}") for sign in ("neg", "pos"))
    return {seed: low[seed] - high[seed] for seed in sorted(low.keys() & high.keys())}


def clip_narrows(read: Reader) -> list[Found]:
    """P4: range of the endpoint over seven exponents, both clips, seeds resampled."""
    study = read("sweep")
    if study is None:
        return awaited("sweep")
    found = []
    for regime in ("fresh", "stale"):
        tables = [table_of(study, [f"{p}+{c}+{regime}" for p in SEVEN]) for c in ("token", "one")]
        ranges = [float(np.ptp(table.mean(0))) for table in tables]
        seeds = np.random.default_rng(0).integers(0, len(tables[0]), (RESAMPLES, len(tables[0])))
        spread = [np.ptp(table[seeds].mean(1), axis=1) for table in tables]
        low, high = np.quantile(spread[1] - spread[0], (0.025, 0.975))
        told = f"range {100 * ranges[0]:.1f} points with the token clip, {100 * ranges[1]:.1f} with"
        told += f" the sequence clip: {100 * (ranges[1] - ranges[0]):+.1f} more "
        told += f"(bootstrap over seeds {span(low, high, 100)})"
        found.append(Found(f"sweep, {regime}", told, above(low, high)))
    return found


def table_of(study: Study, cells: Sequence[str]) -> np.ndarray:
    """Endpoints by shared seed and cell, shape [seeds, cells]."""
    ends = [endpoints(study.runs.get(cell, {})) for cell in cells]
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in ends)))
    return np.array([[by_seed[seed] for by_seed in ends] for seed in seeds], float)


def learned_exponents(read: Reader) -> list[Found]:
    """P5: where learned exponents end, in numbers of seeds."""
    study = read("controllers")
    if study is None:
        return awaited("controllers")
    asked = (
        ("surrogate", "p_last", "|p| > 3.5 at the end", lambda v: abs(v) > 3.5),
        ("ess", "p_late_range", "|p| moves less than 0.5 over the last quarter", lambda v: v < 0.5),
    )
    found = []
    for cell, metric, words, holds in asked:
        values, runs = metric_of(study, cell, metric), of_cell(study, cell)
        if not values:
            found.append(Found(f"controllers, {cell}", f"outcomes hold no {metric}", UNDECIDED))
            continue
        count = sum(map(holds, values.values()))
        e = rate(count, len(runs))
        told = f"{words} in {count} of {len(runs)} runs ({span(e.low, e.high, 100, '.0f')} %); "
        told += f"{metric} {min(values.values()):.2f} to {max(values.values()):.2f}"
        word = HELD if count >= 0.8 * len(runs) else NOT
        found.append(Found(f"controllers, {cell}", told, word))
    return found


def gap_and_kl(read: Reader) -> list[Found]:
    """P6: g over twice k3, in stretches of updates with sigma < 0.3."""
    study = read("headline")
    if study is None:
        return awaited("headline")
    found = []
    blocks: dict[str, list[float]] = {}
    for cell in study.cells("main"):
        if "member" in cell.levels:
            block = f"{cell.levels['task']}, {cell.levels['regime']}"
            own = [value for o in of_cell(study, cell.name).values() for value in gap_ratios(o)]
            blocks.setdefault(block, []).extend(own)
    for block, ratios in blocks.items():
        place = f"headline, {block}"
        if not ratios:
            found.append(Found(place, "outcomes hold no sigma by updates", UNDECIDED))
            continue
        low, middle, high = np.quantile(ratios, (0.05, 0.5, 0.95))
        told = (
            f"median {middle:.2f}, nine in ten of {len(ratios)} stretches {low:.2f} to {high:.2f}"
        )
        word = HELD if low >= 0.9 and high <= 1.1 else NOT
        found.append(Found(place, told, word))
    return found


def gap_ratios(outcome: Outcome) -> Iterator[float]:
    """G / (2 k3) of every stretch in which sigma is below 0.3 and k3 above rounding."""
    curves = outcome.curves
    for g, k3, sigma in zip(*(curves.get(name, []) for name in ("g", "kl3", "sigma"))):
        if None not in (g, k3, sigma) and sigma < 0.3 and k3 >= SMALL:
            yield g / (2 * k3)


def least_moved(read: Reader) -> list[Found]:
    """P7: mean k3 of the pessimistic pair over that of each other; Holm over the four."""
    study = read("signs")
    if study is None:
        return awaited("signs")
    found = []
    for block in ("carry+stale", "key+fresh"):
        own = metric_of(study, f"pessimistic+{block}", "kl3_mean")
        logs = {}
        for other in (*ONE, "optimistic"):
            theirs = metric_of(study, f"{other}+{block}", "kl3_mean")
            seeds = [s for s in sorted(own.keys() & theirs.keys()) if own[s] > 0 < theirs[s]]
            logs[other] = [math.log(own[seed] / theirs[seed]) for seed in seeds]
        if min(map(len, logs.values())) < 2:
            found.append(Found(f"signs, {block}", "too few runs with a KL", UNDECIDED))
            continue
        estimates = {other: paired_t(values) for other, values in logs.items()}
        chances = holm([e.p_value or 0.0 for e in estimates.values()])
        signs = [
            int(np.sign(e.value)) if p < study.plan.alpha else 0
            for e, p in zip(estimates.values(), chances, strict=True)
        ]
        told = "mean k3 over that of " + ", ".join(f"{n}: {ratio(e)}" for n, e in estimates.items())
        word = HELD if set(signs) == {-1} else NOT if 1 in signs else UNDECIDED
        found.append(Found(f"signs, {block}", told, word))
    return found


def left_alone(read: Reader) -> list[Found]:
    """P8: weights with controllers off and advising, and runs that applying ones stopped."""
    study = read("controllers")
    if study is None:
        return awaited("controllers")
    off, advise = of_cell(study, "off"), of_cell(study, "advise")
    seeds = sorted(off.keys() & advise.keys())
    known = [seed for seed in seeds if off[seed].weights and advise[seed].weights]
    equal = sum(off[seed].weights == advise[seed].weights for seed in known)
    told = f"equal final weights in {equal} of {len(known)} pairs"
    if len(known) < len(seeds):
        told += f" ({len(seeds) - len(known)} pairs kept no hash of them)"
    word = UNDECIDED if len(known) < len(seeds) or not known else HELD
    found = [Found("controllers, off and advise", told, NOT if equal < len(known) else word)]
    applied = of_cell(study, "apply").values()
    stopped = sum(o.status == "stopped" for o in applied)
    e = rate(stopped, len(applied))
    told = f"stopped {stopped} of {len(applied)} runs ({span(e.low, e.high, 100, '.0f')} %)"
    return [*found, Found("controllers, apply", told, NOT if stopped else HELD)]


PREDICTIONS = {
    "P1": one_update,
    "P2": cosines,
    "P3": clipped_signs,
    "P4": clip_narrows,
    "P5": learned_exponents,
    "P6": gap_and_kl,
    "P7": least_moved,
    "P8": left_alone,
}
