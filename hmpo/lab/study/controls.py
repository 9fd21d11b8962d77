"""Whether the suite can be believed: what must agree agrees, what must differ is seen."""

from collections.abc import Mapping
from dataclasses import dataclass

from hmpo.lab.statistics.equivalence import two_one_sided
from hmpo.lab.statistics.intervals import paired_t
from hmpo.lab.statistics.verdicts import verdict
from hmpo.lab.study.analysis import Run, Study
from hmpo.lab.study.plan import Cell
from hmpo.lab.study.scores import evaluated

KINDS = {
    "again": "the same method again: the interval of the difference must contain 0",
    "negative": "what cannot matter here must change nothing but the rounding",
    "positive": "a difference that the suite must be able to see",
    "placebo": "rewards that tell nothing must teach nothing",
}
"""Controls by role: what each demands."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """One control and what became of it.

    Example: `Control(kind="again", cell="grpo-again", passed=True, detail="...")`.
    """

    kind: str
    cell: str
    """"" where the suite has no such control."""
    passed: bool | None
    """None: not in the suite, or not run yet."""
    detail: str


def controls(study: Study) -> list[Control]:
    """Every control of the suite, and one row for each kind that it lacks."""
    checks = {
        "again": _again,
        "negative": _negative,
        "positive": _positive,
        "placebo": _placebo,
    }
    found = []
    for kind, check in checks.items():
        cells = [cell for cell in study.plan.cells if cell.role == kind]
        for cell in cells:
            if cell.name not in study.runs:
                detail = "no run of it has ended"
                found.append(Control(kind=kind, cell=cell.name, passed=None, detail=detail))
                continue
            passed, detail = check(study, cell)
            found.append(Control(kind=kind, cell=cell.name, passed=passed, detail=detail))
        if not cells:
            detail = "not in this suite"
            found.append(Control(kind=kind, cell="", passed=None, detail=detail))
    return found


def _again(study: Study, cell: Cell) -> tuple[bool | None, str]:
    contrast = study.contrast(cell.name, cell.against)
    if crashed := _crashed(study, cell):
        return None, f"{crashed}, which say nothing"
    if contrast is None or contrast.estimate is None or contrast.estimate.low is None:
        return None, "too few runs for an interval"
    e = contrast.estimate
    inside = not e.excludes_zero
    how = f"paired, {seeds(len(contrast.seeds))}" if contrast.seeds else "on other seeds"
    told = "contains 0" if inside else "does not contain 0"
    return inside, f"difference {points(e.value)} {interval(e.low, e.high)} {told} ({how})"


def _negative(study: Study, cell: Cell) -> tuple[bool | None, str]:
    """Equal to a held-out prompt at every evaluation, or equivalent over the seeds."""
    base = study.runs.get(cell.against, {})
    shared = [seed for seed in study.runs[cell.name] if seed in base]
    if not shared:
        return None, "no run of the cell it is compared with on the same seeds"
    if crashed := _crashed(study, cell):
        return None, f"{crashed}, which say nothing"
    apart = [_apart(study.runs[cell.name][seed], base[seed]) for seed in shared]
    if None in apart:
        return False, "the runs were not evaluated, or at other updates"
    largest = max(value for value in apart if value is not None)
    prompts = min(_prompts(study.runs[cell.name]), _prompts(base))
    one = 1 / prompts if prompts else 0.0
    if largest <= one * (1 + 1e-9):
        how = "equal at every evaluation" if largest == 0 else "at most one prompt apart"
        return True, f"{how} ({seeds(len(shared))})"
    differences = _differences(study, cell, shared)
    told = f"largest difference of an evaluation {points(largest)}"
    if (
        len(differences) > 1
        and two_one_sided(differences, study.plan.smallest, study.plan.alpha).equivalent
    ):
        return True, f"{told}, yet no difference in the end ({seeds(len(differences))})"
    return False, f"{told}, expected none"


def _apart(one: Run, other: Run) -> float | None:
    """Largest difference of success at one evaluation; None where there is none, or no match."""
    (steps, values), (at, others) = evaluated(one.outcome), evaluated(other.outcome)
    if steps != at or not steps:
        return None
    return max(abs(a - b) for a, b in zip(values, others))


def _prompts(runs: Mapping[int, Run]) -> int:
    """Fewest held-out prompts of the last evaluations; 0 where a run does not say."""
    known = [run.outcome.after.get("n") for run in runs.values()]
    return min((n if isinstance(n, int) else 0 for n in known), default=0)


def _crashed(study: Study, cell: Cell) -> str:
    """How many runs of a control, or of what it is compared with, failed; "" for none."""
    runs = [*study.runs[cell.name].values(), *study.runs.get(cell.against, {}).values()]
    count = sum(run.score.failed for run in runs)
    return f"{count} run{'s' * (count != 1)} failed" if count else ""


def _differences(study: Study, cell: Cell, seeds: list[int]) -> list[float]:
    pairs = [(study.runs[cell.name][s].score, study.runs[cell.against][s].score) for s in seeds]
    return [
        a.success - b.success for a, b in pairs if a.success is not None and b.success is not None
    ]


def _positive(study: Study, cell: Cell) -> tuple[bool | None, str]:
    contrast = study.contrast(cell.name, cell.against)
    if contrast is None or contrast.verdict is None:
        return None, "no paired runs of the cell it is compared with"
    found = contrast.verdict
    if found.estimate.low is None:
        return None, "one seed gives no interval"
    seen = found.word in ("better", "worse")
    told = "seen" if seen else "not seen"
    e = found.estimate
    ends, many = interval(e.low, e.high), seeds(len(contrast.seeds))
    return seen, f"difference {points(e.value)} {ends} {told} ({many})"


def _placebo(study: Study, cell: Cell) -> tuple[bool | None, str]:
    """Success must not have risen since the start by what matters."""
    gains = [
        run.score.success - run.score.start
        for run in study.runs[cell.name].values()
        if run.score.success is not None and run.score.start is not None
    ]
    if len(gains) < 2:
        return None, "too few runs for an interval"
    e = paired_t(gains, 1 - study.plan.alpha)
    learned = verdict(gains, study.plan.smallest, alpha=study.plan.alpha).word == "better"
    told = "it learned" if learned else "it did not learn"
    where = f"{points(e.value)} {interval(e.low, e.high)} since the start"
    return not learned, f"{told}: {where} ({seeds(len(gains))})"


def seeds(count: int) -> str:
    """`1 seed`, `4 seeds`."""
    return f"{count} seed{'s' * (count != 1)}"


def points(value: float) -> str:
    """A difference of success in points, with its sign."""
    return f"{100 * value:+.1f}"


def interval(low: float | None, high: float | None) -> str:
    """Its ends in points; a dash where there is none."""
    if low is None or high is None:
        return "[-]"
    return f"[{100 * low:+.1f}, {100 * high:+.1f}]"
