"""What a comparison says beside its difference: pairs won, equal KL, times, collapses, fits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hmpo.errors import StatisticsError
from hmpo.lab.statistics.curves import EqualKL, Sigmoid, reward_at_kl, sigmoid_check
from hmpo.lab.statistics.intervals import Estimate, holm, paired_t, rate_difference
from hmpo.lab.statistics.resampling import probability_of_improvement
from hmpo.lab.statistics.survival import log_rank
from hmpo.lab.study.analysis import Contrast, Run, Study, endpoints
from hmpo.lab.study.main_table import time_table
from hmpo.lab.study.outcomes import Outcome
from hmpo.lab.study.plan import Cell
from hmpo.lab.study.scores import evaluated

ROUNDING = 1e-6
"""KL in nat/token below which a run went nowhere: with one update for each rollout the log holds
the rounding of ratios that are 1."""
FEWEST = 10
"""Points of a curve that a fit of its first half needs."""


def wins(study: Study, contrast: Contrast) -> Estimate | None:
    """Chance that a run of the cell ends above one of its baseline; None from one pair of runs."""
    one, other = (endpoints(study.runs[name]) for name in (contrast.cell, contrast.against))
    paired = bool(contrast.seeds)
    a = [one[seed] for seed in contrast.seeds or one]
    b = [other[seed] for seed in contrast.seeds or other]
    if min(len(a), len(b)) < 2:
        return None
    return probability_of_improvement([a], [b], paired, 1 - study.plan.alpha)


def wins_over_blocks(study: Study, contrasts: Sequence[Contrast]) -> Estimate | None:
    """The same, mean over blocks; None unless each has two shared seeds."""
    if not contrasts or min(len(c.seeds) for c in contrasts) < 2:
        return None
    ends = {name: endpoints(runs) for name, runs in study.runs.items()}
    a = [[ends[c.cell][seed] for seed in c.seeds] for c in contrasts]
    b = [[ends[c.against][seed] for seed in c.seeds] for c in contrasts]
    return probability_of_improvement(a, b, True, 1 - study.plan.alpha)


@dataclass(frozen=True)
class Collapses:
    """How many runs of both sides collapsed, of as many, and the difference of the shares."""

    count: int
    total: int
    base: int
    base_total: int
    difference: Estimate
    """Newcombe's, of independent runs."""


def collapses(study: Study, contrast: Contrast) -> Collapses:
    """Collapsed runs (`Score.collapsed`) of a cell and of the one that it is compared with."""
    (k, n), (j, m) = (_collapsed(study.runs[name]) for name in (contrast.cell, contrast.against))
    return Collapses(k, n, j, m, rate_difference(k, n, j, m, 1 - study.plan.alpha))


def _collapsed(runs: Mapping[int, Run]) -> tuple[int, int]:
    return sum(run.score.collapsed for run in runs.values()), len(runs)


def sentence(study: Study, contrast: Contrast) -> str:
    """The verdict in words, with the collapses of both sides where there are any."""
    told = contrast.verdict.sentence if contrast.verdict else ""
    found = collapses(study, contrast)
    if not told or not found.count + found.base:
        return told
    e = found.difference
    low, high = 100 * (e.low or 0.0), 100 * (e.high or 0.0)
    return (
        f"{told}; collapsed: {found.count} of {found.total} against {found.base} of "
        f"{found.base_total} ({100 * e.value:+.0f} points, {100 * e.level:.0f} % interval "
        f"{low:+.0f} to {high:+.0f})"
    )


def log_ranks(study: Study) -> dict[tuple[str, str], float]:
    """P of the times to the target by (cell, baseline); Holm's within a block.

    The test takes runs as independent; those of one seed are more alike than that, so it sees less.
    """
    raw = {(c.cell, c.against): _log_rank(study, c) for c in (*study.contrasts, *study.others)}
    found = {key: p for key, p in raw.items() if p is not None}
    for block in dict.fromkeys(c.block for c in study.contrasts):
        keys = [(c.cell, c.against) for c in study.contrasts if c.block == block]
        keys = [key for key in keys if key in found]
        if keys:
            raised = holm([found[key] for key in keys])
            found |= {key: float(p) for key, p in zip(keys, raised)}
    return found


def _log_rank(study: Study, contrast: Contrast) -> float | None:
    """None where there is no target, one run on a side, or none that reached it."""
    base = study.plan.cell(contrast.against)
    cell = study.plan.cell(contrast.cell)
    target = study.target(base) if base is not None else None
    if cell is None or base is None or target is None:
        return None
    groups = [time_table(study, side, target) for side in (cell, base)]
    if min(len(times) for times, _, _ in groups) < 2 or not any(any(hit) for *_, hit in groups):
        return None
    return log_rank([(times, hit) for times, _, hit in groups])[1]


def equal_kl(study: Study, contrast: Contrast) -> EqualKL | None:
    """Success of both sides where they have spent as much KL, paired by seed.

    Spent is the sum over updates of the log's k3 between the policy that sampled and the one that
    is updated, as outcomes keep it (means of stretches): a length of path, not the distance from
    the start. A run that failed is left out with its partner.

    Returns:
        None where no pair kept the curve of KL, where they share no range of it, or where one
        went no further than `ROUNDING`.
    """
    pairs = [
        tuple(_spent(study.runs[name][seed]) for name in (contrast.cell, contrast.against))
        for seed in contrast.seeds
    ]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not both:
        return None
    if min(kl[-1] for pair in both for kl, _ in pair) < ROUNDING:
        return None
    try:
        return reward_at_kl([a for a, _ in both], [b for _, b in both], None, 1 - study.plan.alpha)
    except StatisticsError:  # one's first evaluation lies beyond the other's last
        return None


def _spent(run: Run) -> tuple[list[float], list[float]] | None:
    """KL spent and success at each evaluation of a run."""
    steps, values = evaluated(run.outcome)
    path = _path(run.outcome)
    if run.score.failed or path is None or len(steps) < 2:
        return None
    return np.interp(steps, *path).tolist(), values


def _path(outcome: Outcome) -> tuple[np.ndarray, np.ndarray] | None:
    """Updates and the KL spent until then, from 0 on; None where a stretch has none."""
    steps, means = outcome.curves.get("step", []), outcome.curves.get("kl3", [])
    if not means or None in means:
        return None
    ends = np.array([0, *steps], float)
    return ends, np.concatenate([[0.0], np.cumsum(np.diff(ends) * np.array(means, float))])


@dataclass(frozen=True)
class Foretold:
    """A sigmoid fitted on the first half of a cell's mean curve, against the second half."""

    curve: str
    """success, or reward in training where evaluations are too few."""
    seeds: int
    points: int
    end: Estimate
    """Mean of the second half."""
    missed: Estimate
    """The same less what the fit foretold; what seeds do to the fit is in the interval."""
    error: float
    """Root mean square of the second half less the fit, at single points of the mean curve."""
    noise: float
    """Standard error of such a point."""

    def word(self, smallest: float) -> str:
        """Where the second half went, by what matters; "" without an interval."""
        e = self.missed
        if e.low is None or e.high is None:
            return ""
        if max(-e.low, e.high) < smallest:
            return "as foretold"
        if e.excludes_zero and abs(e.value) >= smallest:
            return "went further" if e.value > 0 else "fell short"
        return "unclear"


def foretold(study: Study, cell: Cell) -> Foretold | None:
    """Whether a sigmoid of the first half foretells the second; None without ten points."""
    whole = [run for run in study.runs[cell.name].values() if not run.score.failed]
    for name, curves in (
        ("success", [_after_start(run.outcome) for run in whole]),
        ("reward", [_reward(run.outcome) for run in whole]),
    ):
        steps, table = _common(curves)
        if len(steps) < FEWEST:
            continue
        n, half = len(table), (len(steps) + 1) // 2
        noise = None
        if n > 1:
            noise = float(np.sqrt(table.var(0, ddof=1).mean() / n))
        found = sigmoid_check(steps, table.mean(0), None, noise)
        level = 1 - study.plan.alpha
        last = table[:, half:].mean(1)
        promised = _promised(found.fit, steps, table)
        return Foretold(
            name,
            n,
            len(steps),
            paired_t(last, level),
            paired_t(last - promised, level),
            found.error,
            found.noise,
        )
    return None


def _promised(fit: Sigmoid, steps: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Mean of the second half that the fit foretells, with each seed's pull on it, shape [seeds].

    To first order the fit moves with the mean curve's first half as a linear regression on its
    slopes does (delta method), so that the spread of these numbers is that of the forecast.
    """
    half = (len(steps) + 1) // 2
    rise = _rise(fit, steps)
    slopes = np.stack(
        [
            1 - rise,
            rise,
            -(fit.top - fit.start) * rise * (1 - rise) * fit.slope,
            (fit.top - fit.start) * rise * (1 - rise) * np.log(steps / fit.middle),
        ],
        -1,
    )
    weights = slopes[half:].mean(0) @ np.linalg.pinv(slopes[:half], rcond=1e-6)
    pull = (table[:, :half] - table[:, :half].mean(0)) @ weights
    return float(fit.at(steps[half:]).mean()) + pull


def _rise(fit: Sigmoid, steps: np.ndarray) -> np.ndarray:
    """Share of its gain that a curve has made, by updates."""
    return 1 / (1 + (fit.middle / steps) ** fit.slope)


def _after_start(outcome: Outcome) -> tuple[tuple[int, ...], list[float]]:
    steps, values = evaluated(outcome)
    kept = [(step, value) for step, value in zip(steps, values) if step > 0]
    return tuple(step for step, _ in kept), [value for _, value in kept]


def _reward(outcome: Outcome) -> tuple[tuple[int, ...], list[float]]:
    steps, means = outcome.reward.get("step", []), outcome.reward.get("mean", [])
    kept = [(step, mean) for step, mean in zip(steps, means) if mean is not None]
    return tuple(step for step, _ in kept), [mean for _, mean in kept]


def _common(curves: Sequence[tuple[tuple[int, ...], list[float]]]) -> tuple[np.ndarray, np.ndarray]:
    """The longest grid of updates, and the curves that have it, shape [seeds, points]."""
    grid = max((steps for steps, _ in curves), key=len, default=())
    rows = [values for steps, values in curves if steps == grid]
    return np.array(grid, float), np.array(rows, float)
