"""Coverage of every interval of the lab, and how often its words are wrong, on known truths.

python benchmarks/statistics_coverage.py [--simulations N]   writes results/statistics_coverage.json

Nominal level 95 % (80 % for the pilot's one-sided limit). A row's `for` says whether the method is
meant for that distribution; the others show where it fails. `error` is the simulation's own
standard error. Wilson and Newcombe are enumerated, not simulated.
"""

import argparse
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import coverage_truths as truths
import numpy as np
from common import save
from scipy import special, stats

from hmpo.lab.statistics import curves, equivalence, intervals, power, resampling, survival
from hmpo.lab.statistics.verdicts import direction

LEVEL = 0.95
SMALLEST = 0.02
Row = dict[str, Any]


def row(
    method: str,
    truth: str,
    n: int,
    inside: np.ndarray,
    meant: bool = True,
    nominal: float = LEVEL,
    **more: Any,
) -> Row:
    """One line of the result; `inside` is averaged over simulations (first axis) and the rest."""
    share = float(np.mean(inside))
    per_simulation = inside.reshape(len(inside), -1).mean(1)
    error = float(per_simulation.std() / np.sqrt(len(inside)))
    return {
        "method": method,
        "truth": truth,
        "n": n,
        "for": meant,
        "nominal": nominal,
        "coverage": round(share, 4),
        "error": round(error, 4),
        "simulations": len(inside),
        **more,
    }


def generator(*name: object) -> np.random.Generator:
    """Random numbers of one row, whatever rows come before it."""
    return np.random.default_rng(zlib.crc32(repr(name).encode()))


def within(low: np.ndarray, high: np.ndarray, truth: float) -> np.ndarray:
    """Which intervals hold the truth, up to rounding."""
    return (low <= truth + 1e-12) & (truth - 1e-12 <= high)


def means(n: int, sims: int) -> Iterator[Row]:
    """Paired and unpaired t, and the pilot's limit of the sd."""
    for name, (draw, truth, meant) in truths.DIFFERENCES.items():
        d = draw(generator("paired t", name, n), (sims, n))
        _, low, high, _ = intervals.t_interval(d, LEVEL)
        yield row("paired t", name, n, within(low, high, truth), meant)
    for name, (draw, truth, meant) in truths.UNPAIRED.items():
        a, b = draw(generator("welch", name, n), (sims, n))
        _, low, high, _ = intervals.welch_interval(a, b, LEVEL)
        yield row("Welch", name, n, within(low, high, truth), meant)
    d = generator("pilot", n).normal(size=(sims, n))
    upper = [power.pilot(x).sd_upper for x in d[: sims // 2]]
    yield row("pilot: sd upper limit (80 %)", "normal", n, np.array(upper) >= 1.0, nominal=0.8)


def rates(n: int) -> Iterator[Row]:
    """Wilson and Newcombe by enumeration: mean over rates in [.02, .98], and the worst rate."""
    grid, counts = np.linspace(0.02, 0.98, 97), np.arange(n + 1)
    chance = stats.binom.pmf(counts, n, grid[:, None])
    single = [intervals.rate(int(k), n) for k in counts]
    low, high = np.array([[e.low, e.high] for e in single]).T
    covered = (chance * within(low, high, grid[:, None])).sum(1)
    yield row("Wilson", "rates .02 to .98", n, covered, worst=round(float(covered.min()), 4))
    pairs = [[intervals.rate_difference(int(k), n, int(j), n) for j in counts] for k in counts]
    low, high = (np.array([[getattr(e, s) for e in r] for r in pairs]) for s in ("low", "high"))
    covered = np.array(
        [[chance[i] @ within(low, high, grid[i] - grid[j]) @ chance[j] for j in range(0, 97, 3)]
         for i in range(0, 97, 3)]
    )  # fmt: skip
    worst = round(float(covered.min()), 4)
    yield row("Newcombe", "rates .02 to .98, both", n, covered, worst=worst)


def two_level(n: int, sims: int) -> Iterator[Row]:
    """Seeds x 256 prompts; besides, what plain percentiles and a paired t would have covered."""
    for name, (draw, meant) in truths.ANSWERS.items():
        rng = generator("two-level", name, n)
        inside, paired, plain = [], [], []
        for _ in range(sims // 100):
            d = draw(rng, (100, n, 256)) - draw(rng, (100, n, 256))
            mean, rows, columns, df = resampling.two_level_effects(d)
            picked, asked = (rng.multinomial(k, np.full(k, 1 / k), 1000) / k for k in (n, 256))
            error = (picked @ rows.T + asked @ columns.T).std(0)
            _, low, high, _ = intervals.t_from(mean, error, df, LEVEL)
            inside.append(within(low, high, 0.0))
            _, low, high, _ = intervals.t_interval(d.mean(-1), LEVEL)
            paired.append(within(low, high, 0.0))
            naive = np.array([((picked @ x) * asked).sum(1) for x in d[:10]])
            plain.append(within(*np.quantile(naive, [0.025, 0.975], axis=1), 0.0))
        yield row("two-level bootstrap", name, n, np.concatenate(inside), meant)
        yield row("paired t, as if for new prompts", name, n, np.concatenate(paired), False)
        yield row("two-level percentiles, uncorrected", name, n, np.concatenate(plain), False)


def several_tasks(n: int, sims: int) -> Iterator[Row]:
    """Interquartile mean, performance profile, probability of improvement."""
    for name, (draw, meant) in truths.TASKS.items():
        rng = generator("tasks", name, n)
        large = [x[0] for x in draw(rng, (1, 400_000))[0]]
        a, b = draw(rng, (sims, n))
        target = resampling.trimmed_mean(np.concatenate(large))
        _, low, high, _ = resampling.iqm_interval(a, None, 2500, 0, LEVEL)
        yield row("IQM", name, n, within(low, high, float(target)), meant)
        _, low, high, _ = resampling.iqm_interval(a, b, 2500, 0, LEVEL)
        steady = meant and "crashes" not in name
        yield row("IQM, paired difference", name, n, within(low, high, 0.0), steady)
        for paired in (True, False):
            _, low, high = resampling.improvement(a, b, paired, LEVEL)
            if not paired:
                b = draw(rng, (sims, n))[0]
                _, low, high = resampling.improvement(a, b, paired, LEVEL)
            kind = "paired" if paired else "unpaired"
            yield row(f"P(improvement), {kind}", name, n, within(low, high, 0.5), meant)
        tau = np.quantile(np.concatenate(large), np.linspace(0.05, 0.95, 19))
        share = np.mean([[(x > t).mean() for t in tau] for x in large], 0)
        counts = np.array([(x[..., None] > tau).sum(-2) for x in a])
        _, low, high = resampling.stratified_share(counts, np.full((len(a), 1, 1), n), LEVEL)
        yield row("performance profile", name, n, (low <= share) & (share <= high), meant)


def shifted(n: int, sims: int) -> Iterator[Row]:
    """Probability of improvement away from 1/2: normal scores, by tasks and pairing."""
    for tasks in (1, 3):
        for shift in (0.8, 1.6):
            for shared in (0.7, 0.0):
                rng = generator("improvement", tasks, shift, shared, n)
                common = np.sqrt(shared) * rng.normal(size=(tasks, sims, n))
                own = np.sqrt(1 - shared) * rng.normal(size=(2, tasks, sims, n))
                a, b = list(common + own[0] + shift), list(common + own[1])
                _, low, high = resampling.improvement(a, b, shared > 0, LEVEL)
                truth = float(special.ndtr(shift / np.sqrt(2)))
                kind = "paired" if shared else "unpaired"
                name = f"normal, {tasks} task(s), true {truth:.2f}"
                yield row(f"P(improvement), {kind}", name, n, within(low, high, truth))


def steps(n: int, sims: int) -> Iterator[Row]:
    """Kaplan-Meier: the curve at five times, the median; log-rank's false alarms."""
    for name, (draw, at, median, meant) in truths.TIMES.items():
        rng = generator("steps", name, n)
        curve, middle, alarms = [], [], []
        for _ in range(sims // 5):
            (t, hit), other = draw(rng, n), draw(rng, n)
            fit = survival.kaplan_meier(t, hit)
            i = np.searchsorted(fit.times, [x for x, _ in at], side="right") - 1
            low, high = (np.where(i >= 0, s[i] if s.size else 0, 1.0) for s in (fit.low, fit.high))
            low = np.where(i >= 0, low, n / (n + 1.96**2))  # before any event: all are left
            share = np.array([s for _, s in at])
            curve.append((low <= share) & (share <= high))
            e = fit.median
            ends = (0.0, None) if e is None else (e.low or 0.0, e.high)
            middle.append(ends[0] <= median and (ends[1] is None or median <= ends[1]))
            alarms.append(survival.log_rank([(t, hit), other])[1] >= 0.05)
        yield row("Kaplan-Meier, at a time", name, n, np.array(curve), meant)
        yield row("median steps to target", name, n, np.array(middle), meant)
        yield row("log-rank, no false alarm", name, n, np.array(alarms), meant)


def envelopes(n: int, sims: int) -> Iterator[Row]:
    """Expected best of k of five learning rates, k = 1..5; plain percentiles beside it."""
    for name, (cells, sd, meant) in truths.GRIDS.items():
        rng = generator("envelope", name, n)
        shared = rng.normal(size=(sims, 1, n)) * sd
        scores = np.array(cells)[:, None] + shared + rng.normal(size=(sims, 5, n)) * sd
        inside, plain = [], []
        picks = rng.integers(0, n, (500, n))
        for k in range(1, 6):
            weights = curves.draw_weights(5, k)
            truth = float(np.sort(cells) @ weights)
            _, low, high, _ = intervals.t_interval(curves.best_by_seed(scores, k), LEVEL)
            inside.append(within(low, high, truth))
            some = scores[: sims // 10]
            drawn = np.array([np.sort(some[..., i].mean(-1), -1) @ weights for i in picks])
            plain.append(within(*np.quantile(drawn, [0.025, 0.975], axis=0), truth))
        yield row("expected best", name, n, np.array(inside).T, meant)
        yield row("expected best, plain percentiles", name, n, np.array(plain).T, False)


def equal_kl(n: int, sims: int) -> Iterator[Row]:
    """Reward at equal KL of methods that differ in speed, not in reward for the distance."""
    rng, inside = generator("equal KL", n), []
    for _ in range(sims // 10):
        common = rng.normal(size=n) * 0.03
        sides = []
        for speed in (1.0, 1.5):
            kl = np.cumsum(rng.gamma(4, speed / 4, (n, 20)) * 0.01, 1)
            level = common + rng.normal(size=n) * 0.03
            reward = np.sqrt(kl) + level[:, None] + rng.normal(size=kl.shape) * 0.01
            sides.append(list(zip(kl, reward)))
        e = curves.reward_at_kl(*sides).mean
        inside.append((e.low or 0.0) <= 0.0 <= (e.high or 0.0))
    yield row("reward at equal KL", "normal seed effects", n, np.array(inside))


def alarm(kind: str, truth: str, n: int, wrong: np.ndarray, meant: bool, limit: float) -> Row:
    """A row about words: `rate` of wrong ones and the most that is promised."""
    share = float(wrong.mean())
    error = float(wrong.std() / np.sqrt(len(wrong)))
    facts = {"words": kind, "truth": truth, "n": n, "for": meant, "rate": round(share, 4)}
    return facts | {"at most": limit, "error": round(error, 4), "simulations": len(wrong)}


def words(n: int, sims: int) -> Iterator[Row]:
    """False "better" of one comparison and of eight under Holm; false "no difference"; power."""
    for name, (draw, meant) in truths.NULLS.items():
        rng = generator("words", name, n)
        d = draw(rng, (sims, 8, n))
        mean, low, high, p = intervals.t_interval(d, LEVEL)
        for smallest, label in ((1e-9, "any size"), (SMALLEST, f">= {SMALLEST}")):
            one = direction(mean, low, high, p, smallest, 0.05)[:, 0]
            yield alarm(f'false "better", {label}', name, n, one > 0, meant, 0.05)
            adjusted = intervals.holm_adjusted(p)
            many = direction(mean, low, high, adjusted, smallest, 0.05)
            kind = f'false "better" among 8 under Holm, {label}'
            yield alarm(kind, name, n, (many > 0).any(1), meant, 0.05)
            kind = f'false "better" or "worse" among 8 under Holm, {label}'
            yield alarm(kind, name, n, (many != 0).any(1), meant, 0.05)
        shown = equivalence.one_sided(d[:, 0] + SMALLEST, SMALLEST) < 0.05
        yield alarm('false "no difference" at the margin', name, n, shown, meant, 0.05)
    x = generator("power", n).normal(size=(sims, n)) * 0.03
    seen = intervals.t_interval(x + power.detectable(0.03, n), LEVEL)[3] < 0.05
    yield alarm("difference not seen at `detectable`", "normal", n, ~seen, True, 0.2)
    shown = equivalence.one_sided(x, power.detectable_margin(0.03, n)) < 0.05
    yield alarm("equality not shown at `detectable_margin`", "normal", n, ~shown, True, 0.2)


def main() -> None:
    """Run every part and say what lies outside of what is promised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulations", type=int, default=20_000)
    sims = parser.parse_args().simulations
    rows: list[Row] = []
    parts: list[tuple[Callable[..., Iterator[Row]], int]] = [
        (means, sims), (two_level, sims // 4), (several_tasks, sims // 8), (shifted, sims // 2),
        (steps, sims), (envelopes, sims // 2), (equal_kl, sims), (words, sims),
    ]  # fmt: skip
    for n in (10, 20):
        rows += rates(n)
        for part, count in parts:
            began = time.process_time()
            rows += part(n, count)
            print(f"{part.__name__}, n = {n}: {time.process_time() - began:.0f} s")
    for facts in rows:
        off = abs(facts["coverage"] - facts["nominal"]) if "coverage" in facts else 0.0
        if facts["for"] and off > 0.02:
            print("further than 2 points from its level:", facts)
        often = facts.get("rate", 0.0) - 3 * facts["error"]
        if facts["for"] and often > facts.get("at most", 1.0):
            print("more often than promised:", facts)
    command = f"python benchmarks/statistics_coverage.py --simulations {sims}"
    save("statistics_coverage", command, rows, show=False)


if __name__ == "__main__":
    main()
