"""Tables of docs/results.md, from the committed outcomes in studies/outcomes."""

import math
from collections.abc import Callable

from study_hypotheses import hypotheses
from study_matrices import controls_of, matrix, sentences, success
from study_rates import STUDIES, Key, best_rates, grid, missing, planned_rates, read_study

from hmpo.lab.statistics.verdicts import verdict
from hmpo.lab.study.analysis import endpoints
from hmpo.lab.study.outcomes import Outcome, read_outcomes
from hmpo.lab.study.scores import score
from hmpo.lab.suite.again import read_again

SUITES = (
    "tuning",
    "headline",
    "sweep",
    "signs",
    "envelope",
    "holder",
    "controllers",
    "stability",
    "ladder",
    "smollm2",
    "trl",
)
MATRICES = ("headline", "sweep", "signs", "envelope", "holder", "controllers", "ladder", "smollm2")
"""Suites with a row for each level that is compared and a column for each block."""
BLOCKS = [(task, regime) for regime in ("fresh", "stale") for task in ("carry", "key", "spell")]


def suites() -> str:
    """What was planned and how much of it has run."""
    lines = ["| suite | cells | runs done | of | CPU hours | |", "|---|---|---|---|---|---|"]
    for name in SUITES:
        path = STUDIES / f"{name}.toml"
        if not path.exists():
            continue
        study = read_study(name)
        plan = study.plan.cells
        done = [run.outcome for runs in study.runs.values() for run in runs.values()]
        hours = math.fsum(float(o.cost.get("cpu_s") or 0) for o in done) / 3600
        failed = sum(o.status == "failed" for o in done)
        wanted = sum(len(cell.seeds) for cell in plan)
        note = f"{failed} failed" if failed else ""
        lines.append(f"| `{name}` | {len(plan)} | {len(done)} | {wanted} | {hours:.1f} | {note} |")
    return "\n".join(lines)


def rates() -> str:
    """The best rate of each method by block, its success, and the best of all methods."""
    study = read_study("tuning")
    tried = grid(study)
    if not tried:
        return "No run of the grid has ended yet."
    planned = planned_rates(study)
    best = best_rates(study)
    heads = [f"{task}, {regime}" for task, regime in BLOCKS]
    lines = [f"| method | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for member in dict.fromkeys(key[2] for key in tried):
        cells = [_best(tried, best, planned, (*block, member)) for block in BLOCKS]
        lines.append(f"| {member} | {' | '.join(cells)} |")
    seeds = sorted({seed for runs in study.runs.values() for seed in runs})
    counts = {len(runs) for runs in study.runs.values()}
    left = missing(study)
    told = f"seeds {', '.join(map(str, seeds))}; {min(counts)} to {max(counts)} runs a cell"
    if left:
        told += f"; preliminary, as {left} runs are missing, and used by nothing yet"
    return "\n".join([*lines, "", f"Rate and mean endpoint there ({told}); no intervals, as these "
                      "numbers choose and do not compare."])  # fmt: skip


def _best(
    tried: dict[Key, dict[float, list[float]]],
    best: dict[Key, float],
    planned: dict[Key, list[float]],
    key: Key,
) -> str:
    if key not in best:
        return ""
    values = tried[key][best[key]]
    edge = best[key] in (min(planned[key]), max(planned[key]))
    mark = " (edge)" if edge else ""
    return f"{best[key]:g}{mark}: {math.fsum(values) / len(values):.3f}"


def stability() -> str:
    """Optimizers with and without QK-clip on attention that starts hot."""
    study = read_study("stability")
    if missing(study):
        return f"{missing(study)} runs are missing."
    lines = [
        "| cell | seeds | success, percent | logit, first update | largest | updates with a clip "
        "| difference that can be seen, points |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in study.cells():
        runs = [run.outcome for run in study.runs[cell.name].values()]
        logits = [o.metrics.get("max_qk") for o in runs]
        contrasts = [c for c in study.contrasts if c.cell == cell.name]
        seen = [c.verdict.detectable for c in contrasts if c.verdict is not None]
        clipped = [o.metrics.get("qk_clip_share") for o in runs]
        lines.append(
            f"| {cell.name} | {len(runs)} | {success(study.successes(cell.name))} "
            f"| {_span([_first(o, 'max_qk') for o in runs])} | {_span(logits)} "
            f"| {_mean(clipped, '{:.0%}')} | {_mean([100 * d for d in seen if d], '{:.0f}')} |"
        )
    return "\n".join([*lines, "", *sentences(study), "", controls_of(study)])


def _first(outcome: Outcome, name: str) -> float | None:
    """The first point of a curve."""
    return next((value for value in outcome.curves.get(name, []) if value is not None), None)


def _span(values: list[float | None]) -> str:
    """Least and largest over the seeds."""
    known = [value for value in values if value is not None]
    return f"{min(known):.0f} to {max(known):.0f}" if known else ""


def _mean(values: list[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(math.fsum(known) / len(known)) if known else ""


def anchor() -> str:
    """Our trainer beside TRL's on the same seeds."""
    study = read_study("trl")
    path = STUDIES / "outcomes/trl.jsonl.gz"
    if missing(study) or not path.exists():
        return "The runs are not complete."
    theirs: dict[str, dict[int, float]] = {}
    for outcome in read_outcomes(path):
        value = score(outcome, study.plan).success
        if value is not None:
            theirs.setdefault(outcome.cell, {})[outcome.seed] = value
    lines = ["| cell | seeds | hmpo, percent | TRL, percent | |", "|---|---|---|---|---|"]
    for cell in study.cells():
        own = endpoints(study.runs[cell.name])
        other = theirs.get(f"trl-{cell.name}", {})
        seeds = sorted(own.keys() & other.keys())
        gaps = [own[seed] - other[seed] for seed in seeds]
        told = verdict(gaps, study.plan.smallest, method="hmpo", baseline="TRL").sentence
        sides = [success([side[seed] for seed in seeds]) for side in (own, other)]
        lines.append(f"| {cell.name} | {len(seeds)} | {sides[0]} | {sides[1]} | {told} |")
    return "\n".join([*lines, "", *sentences(study)])


def again() -> str:
    """Runs of all suites that were made again elsewhere or with other threads."""
    lines = [
        "| suite | cell, seed | committed | again | difference, points | equal to the bit "
        "| threads | capability |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted((STUDIES / "outcomes").glob("*-again.json")):
        for row in read_again(path):
            ends = [
                "none" if row[name] is None else f"{100 * row[name]:.1f}"
                for name in ("committed", "again", "difference")
            ]
            lines.append(
                f"| `{path.stem.removesuffix('-again')}` | {row['cell']}, {row['seed']} "
                f"| {' | '.join(ends)} | {'yes' if row['equal'] else 'no'} "
                f"| {row['committed_threads']}, then {row['threads']} | {row['capability']} |"
            )
    return "\n".join(lines) if len(lines) > 2 else "No run has been made again yet."


TABLES: dict[str, Callable[[], str]] = {
    "study_suites": suites,
    "study_rates": rates,
    "study_hypotheses": hypotheses,
    **{f"study_{name}": matrix(name) for name in MATRICES},
    "study_stability": stability,
    "study_trl": anchor,
    "study_again": again,
}
