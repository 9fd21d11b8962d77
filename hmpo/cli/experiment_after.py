"""What follows the runs of a suite: its report, and how many seeds a question needs."""

import contextlib
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hmpo.errors import ConfigError, RunFolderError
from hmpo.lab.study.plan import NAME
from hmpo.lab.suite.folder import SuiteFolder
from hmpo.lab.suite.reading import read_suite
from hmpo.telemetry.visible import writable

EQUIVALENCE = Path("benchmarks/results")
"""Where a checkout keeps what it measured against its peers."""


def suite_place(source: str, out: Path) -> tuple[Path, Path | None]:
    """The folder of a suite that was run or whose outcomes are committed, and those outcomes.

    Args:
        source: as `hmpo experiment run` takes it, or the suite's folder itself.
        out: folder that holds the suite's folder.

    Raises:
        ConfigError: no such suite.
    """
    folder = Path(source).expanduser()
    if (folder / NAME).is_file():
        return folder, None
    if folder.is_dir():
        raise ConfigError(f"{source}: no {NAME} in it; give the suite's file, or run it first")
    suite = read_suite(source)
    place = SuiteFolder(suite, out)
    committed = suite.outcomes if suite.outcomes and suite.outcomes.exists() else None
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(place.opened())  # writes the plan as it is now
        except RunFolderError:  # it is being run: what it began with is what it is told by
            if not (place.path / NAME).is_file():
                raise
    return place.shown, committed


def report(source: str, out: Path, into: Path | None, save: Path | None) -> int:
    """Write the report of a suite and say what it found; the exit code."""
    from hmpo.lab.study.report import report_suite

    folder, committed = suite_place(source, out)
    peers = EQUIVALENCE if any(EQUIVALENCE.glob("equivalence-*.json")) else None
    written = report_suite(folder, into, committed=committed, save=save, equivalence=peers)
    lines = [
        f"CONTROL FAILED, {control.kind}, {control.cell}: {control.detail}"
        for control in written.controls
        if control.passed is False
    ]
    lines += written.sentences
    lines += [f"outcomes: {written.outcomes}", f"summary: {written.summary}"]
    lines += [f"report: {written.page}", f"markdown: {written.markdown}"]
    if save is not None:
        lines.append(f"outcomes saved: {save}")
    for line in lines:
        print(writable(line))
    return 0


def power(source: str, out: Path, difference: float | None, seeds: int | None) -> int:
    """Say how many seeds each comparison needs; the exit code."""
    if difference is not None and not 0 < difference < 1:
        raise ConfigError(f"--difference: got {difference}, expected a success between 0 and 1")
    if seeds is not None and seeds < 2:
        raise ConfigError(f"--seeds: got {seeds}, expected an integer >= 2")
    from hmpo.lab.statistics.power import MOST
    from hmpo.lab.study.analysis import Study
    from hmpo.lab.study.outcomes import collect
    from hmpo.lab.study.plan import read_plan
    from hmpo.lab.study.planning import POWER, needs

    folder, committed = suite_place(source, out)
    plan = read_plan(folder)
    rows = needs(Study.of(plan, collect(folder, committed)), difference, seeds)
    if not rows:
        raise ConfigError(f"{source}: no comparison with two shared seeds yet; run a pilot first")
    wanted = 100 * (plan.smallest if difference is None else difference)
    table = Table(title=Text(writable(f"{plan.name}: seeds for {wanted:.3g} points of success")))
    columns = ("sd (upper)", "can see", "can equate", "seeds to see", "to equate")
    table.add_column("comparison", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right")

    def count(n: int | None) -> str:
        return f"> {MOST}" if n is None else str(n)

    for row in rows:
        table.add_row(
            Text(writable(f"{row.cell} against {row.against}")),
            f"{100 * row.found.sd:.1f} ({100 * row.found.sd_upper:.1f})",
            f"{100 * row.detectable:.1f} ({row.at})",
            f"{100 * row.margin:.1f} ({row.at})",
            f"{count(row.seeds)} (to {count(row.seeds_upper)})",
            count(row.equivalence),
        )
    table.caption = (
        f"Points of success, each with chance {POWER:g}. Can see: the smallest difference that "
        "the seeds in brackets show. Can equate: the margin within which they show methods that "
        "do not differ as equal. Seeds: what the wanted difference needs, at the sd and at its "
        f"upper limit ({100 * rows[0].found.confidence:.0f} %)."
    )
    Console().print(table)
    return 0
