"""Running a suite: what is done already, what is left, and what it came to."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from hmpo.errors import ConfigError
from hmpo.lab.study.outcomes import Outcome, read_outcomes
from hmpo.lab.suite.again import comparison
from hmpo.lab.suite.cells import Cell
from hmpo.lab.suite.folder import OUT, Key, SuiteFolder
from hmpo.lab.suite.job import Job, job_of
from hmpo.lab.suite.pool import Maker, Pool
from hmpo.lab.suite.reading import Suite
from hmpo.lab.suite.watch import SuiteResult, Watcher

Runs = Sequence[tuple[Cell, int]]


def usable_cores() -> int:
    """Processor cores that this process may use: its affinity, and its share in a container."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        share, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if share != "max":
            cores = min(cores, max(1, round(int(share) / int(period))))
    return cores


def default_jobs(cells: Sequence[Cell]) -> int:
    """Runs at once: as many as the cores hold with the threads of the run that has most."""
    most = max((cell.config.threads or usable_cores() for cell in cells), default=1)
    return max(1, usable_cores() // most)


def local(jobs: int, gpus: int = 0) -> Maker:
    """Makes runs in worker processes of this machine."""

    def make(
        place: SuiteFolder, runs: list[Job], watcher: Watcher, stopped: Callable[[], int | None]
    ) -> str:
        return Pool(place, jobs=jobs, gpus=gpus, watcher=watcher, stopped=stopped).go(runs)

    return make


def run_suite(
    suite: Suite,
    *,
    runs: Runs,
    out: Path = Path(OUT),
    jobs: int = 1,
    maker: Maker | None = None,
    again: bool = False,
    keeps: bool = True,
    watcher: Watcher | None = None,
) -> SuiteResult:
    """Make the runs of a suite that have no outcome yet.

    Every run is a run folder below `out/NAME/runs` and goes on where it was, as does the suite. The
    outcomes depend on nothing but cells and seeds.

    Args:
        suite: from `read_suite`.
        runs: cell and seed of each run that is wanted, such as `chosen_runs(suite.cells, None)`.
        out: folder that holds the suite's folder.
        jobs: runs at once.
        maker: what makes the runs; None takes `local(jobs)`.
        keeps: whether `maker` leaves stopped runs in the folder.
        again: make also those whose outcome is committed, and compare.
        watcher: told of everything.

    Raises:
        HmpoError: one line; nothing that is done is lost.
    """
    watcher, place = watcher or Watcher(), SuiteFolder(suite, out)
    committed = committed_outcomes(suite, place)
    skipped = {(c.name, s) for c, s in runs if (c.name, s) in committed and not again}
    wanted = [(cell, seed) for cell, seed in runs if (cell.name, seed) not in skipped]
    if not wanted:
        return SuiteResult(folder=place.shown, committed=len(skipped))
    with place.opened(wanted):
        done = _done(place, wanted)
        todo = [(cell, seed) for cell, seed in wanted if (cell.name, seed) not in done]
        ready = {key: outcome.status for key, outcome in done.items()}
        watcher.on_begin(wanted, ready, jobs)
        with _listening(watcher) as stopped:
            work = [
                job_of(suite.name, cell, seed, place.cell_folder(cell.name), suite.keep)
                for cell, seed in todo
            ]
            problem = (maker or local(jobs))(place, work, watcher, stopped) if work else ""
        found = done | _done(place, todo)
        return SuiteResult(
            folder=place.shown,
            finished=sum(outcome.status != "failed" for outcome in found.values()),
            failed=[(*key, o.reason) for key, o in found.items() if o.status == "failed"],
            committed=len(skipped),
            left=len(wanted) - len(found),
            exploratory=sum(place.is_exploratory(*key) for key in found),
            signal=stopped(),
            keeps=keeps,
            problem=problem,
            compared=comparison(committed, found) if again else [],
            outcomes=found,
        )


def runs_left(suite: Suite, runs: Runs, out: Path, *, again: bool = False) -> Runs:
    """Those of the runs that `run_suite` would make."""
    place = SuiteFolder(suite, out)
    committed = {} if again else committed_outcomes(suite, place)
    return [
        (cell, seed)
        for cell, seed in runs
        if (cell.name, seed) not in committed and place.outcome(cell, seed) is None
    ]


def committed_outcomes(suite: Suite, place: SuiteFolder) -> dict[Key, Outcome]:
    """The committed outcomes of a suite that are of its cells as they are now.

    Raises:
        ConfigError: the file is not there.
        TelemetryError: it cannot be read.
    """
    if suite.outcomes is None:
        return {}
    if not suite.outcomes.exists():
        return {}
    cells = {cell.name: cell for cell in suite.cells}
    found: dict[Key, Outcome] = {}
    for outcome in read_outcomes(suite.outcomes):
        cell = cells.get(outcome.cell)
        if cell is None or outcome.seed not in cell.seeds:
            continue
        if not place.fits(outcome, cell, outcome.seed):
            raise ConfigError(
                f"{suite.outcomes}: cell {outcome.cell}, seed {outcome.seed} was made under other "
                "settings than the suite has now; set them back, or name another file in `outcomes`"
            )
        found[outcome.key()] = outcome
    return found


def _done(place: SuiteFolder, runs: Runs) -> dict[Key, Outcome]:
    """The outcomes that are there."""
    found: dict[Key, Outcome] = {}
    for cell, seed in runs:
        outcome = place.outcome(cell, seed)
        if outcome is not None:
            place.tidy(cell.name, seed)  # a kill may have come between the two
            found[cell.name, seed] = outcome
    return found


@contextlib.contextmanager
def _listening(watcher: Watcher) -> Iterator[Callable[[], int | None]]:
    """Take note of the first signal that asks for the end; a second one ends at once."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt(number)
        asked.append(number)
        watcher.on_stop(number)

    numbers = [signal.SIGTERM, signal.SIGINT]
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        numbers.append(hangup)
    previous = {}
    with contextlib.suppress(ValueError):  # outside of the main thread Python handles none
        previous = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield lambda: asked[0] if asked else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
