"""Tables of docs/results.md, from the committed outcomes in studies/outcomes."""

import math
from collections.abc import Callable

from study_rates import STUDIES, Key, best_rates, grid, read_study

from hmpo.lab.study.analysis import Study
from hmpo.lab.study.controls import controls

SUITES = ("tuning", "headline", "sweep", "envelope", "holder", "controllers", "stability")
MORE = ("ladder", "smollm2", "trl")
BLOCKS = [(task, regime) for regime in ("fresh", "stale") for task in ("carry", "key", "spell")]


def suites() -> str:
    """What was planned and how much of it has run."""
    lines = ["| suite | cells | runs done | of | CPU hours | |", "|---|---|---|---|---|---|"]
    for name in (*SUITES, *MORE):
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
    best = best_rates(study)
    heads = [f"{task}, {regime}" for task, regime in BLOCKS]
    lines = [f"| method | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for member in dict.fromkeys(key[2] for key in tried):
        cells = [_best(tried, best, (*block, member)) for block in BLOCKS]
        lines.append(f"| {member} | {' | '.join(cells)} |")
    seeds = sorted({seed for runs in study.runs.values() for seed in runs})
    counts = {len(runs) for runs in study.runs.values()}
    told = f"seeds {', '.join(map(str, seeds))}; {min(counts)} to {max(counts)} runs a cell"
    return "\n".join([*lines, "", f"Rate and mean endpoint there ({told}); no intervals, as these "
                      "numbers choose and do not compare."])  # fmt: skip


def _best(tried: dict[Key, dict[float, list[float]]], best: dict[Key, float], key: Key) -> str:
    if key not in best:
        return ""
    values = tried[key][best[key]]
    edge = best[key] in (min(tried[key]), max(tried[key]))
    mark = " (edge)" if edge else ""
    return f"{best[key]:g}{mark}: {math.fsum(values) / len(values):.3f}"


def failed_controls(name: str) -> Callable[[], str]:
    """The controls of a suite and what became of them."""

    def table() -> str:
        study: Study = read_study(name)
        lines = ["| control | cell | state | found |", "|---|---|---|---|"]
        for control in controls(study):
            state = {True: "passed", False: "**failed**", None: "not run"}[control.passed]
            lines.append(f"| {control.kind} | {control.cell} | {state} | {control.detail} |")
        return "\n".join(lines)

    return table


TABLES: dict[str, Callable[[], str]] = {
    "study_suites": suites,
    "study_rates": rates,
    "study_controls": failed_controls("headline"),
}
