"""Learning rates of studies/headline.toml, from the outcomes of studies/tuning.toml.

    python scripts/study_rates.py     write them between the marks of headline.toml

The rule is the protocol's: for each method, task and regime the rate with the highest mean endpoint
over the tuning seeds; of two that are equal, the lower one.
"""

import sys
from collections import defaultdict
from pathlib import Path

from hmpo.lab.study.analysis import Study, endpoints
from hmpo.lab.study.outcomes import read_outcomes
from hmpo.lab.study.plan import plan_of
from hmpo.lab.suite.folder import plan_value
from hmpo.lab.suite.reading import read_suite

STUDIES = Path(__file__).parents[1] / "studies"
HEADLINE = STUDIES / "headline.toml"
BEGIN = "# rates: begin (python scripts/study_rates.py)\n"
END = "# rates: end\n"
Key = tuple[str, str, str]
"""Task, regime, method."""


def read_study(name: str) -> Study:
    """A suite of the folder with its committed outcomes; without any if there is no file yet."""
    suite = read_suite(str(STUDIES / f"{name}.toml"))
    there = suite.outcomes is not None and suite.outcomes.exists()
    return Study.of(
        plan_of(plan_value(suite)),
        read_outcomes(suite.outcomes) if there and suite.outcomes else [],
    )


def grid(study: Study) -> dict[Key, dict[float, list[float]]]:
    """The endpoints of every rate that was tried, by task, regime and method."""
    found: dict[Key, dict[float, list[float]]] = defaultdict(dict)
    for cell in study.cells("main"):
        levels = cell.levels
        key = (levels["task"], levels["regime"], levels["member"])
        rate = float(levels["rate"].removeprefix("r"))
        found[key][rate] = list(endpoints(study.runs[cell.name]).values())
    return dict(found)


def planned_rates(study: Study) -> dict[Key, list[float]]:
    """The rates of the grid, those that have not run too."""
    found: dict[Key, list[float]] = defaultdict(list)
    for cell in study.plan.cells:
        if cell.role == "main":
            key = (cell.levels["task"], cell.levels["regime"], cell.levels["member"])
            found[key].append(float(cell.levels["rate"].removeprefix("r")))
    return dict(found)


def missing(study: Study) -> int:
    """Runs of the grid that have no outcome yet."""
    wanted = sum(len(cell.seeds) for cell in study.plan.cells)
    return wanted - sum(len(runs) for runs in study.runs.values())


def best_rates(study: Study) -> dict[Key, float]:
    """The rate that the rule chooses for each task, regime and method."""
    return {
        key: max(sorted(rates), key=lambda rate: sum(rates[rate]) / len(rates[rate]))
        for key, rates in grid(study).items()
    }


def settings(rates: dict[Key, float]) -> str:
    """The tables of a suite that set these rates."""
    by_rate: dict[tuple[str, str, float], list[str]] = defaultdict(list)
    for (task, regime, member), rate in rates.items():
        by_rate[task, regime, rate].append(member)
    lines = []
    for (task, regime, rate), members in sorted(by_rate.items()):
        names = ", ".join(f'"{name}"' for name in members)
        lines += [
            "[[where]]",
            f'levels = {{ task = "{task}", regime = "{regime}", member = [{names}] }}',
            f"settings.optimizer.lr = {rate:g}",
        ]
    return "".join(f"{line}\n" for line in lines)


def main() -> int:
    """Write the rates; 1 where the grid has gaps."""
    study = read_study("tuning")
    if left := missing(study):
        print(f"studies/tuning.toml: {left} runs have no committed outcome yet; run it first")
        return 1
    before, _, rest = HEADLINE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    text = before + BEGIN + settings(best_rates(study)) + END + after
    HEADLINE.write_text(text, encoding="utf-8")
    print(f"{HEADLINE.name}: {len(best_rates(study))} learning rates")
    return 0


if __name__ == "__main__":
    sys.exit(main())
