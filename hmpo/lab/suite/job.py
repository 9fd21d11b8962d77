"""What one run of a suite is told, and the outcome that it leaves. No torch in here."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hmpo.config import RunConfig, to_dict
from hmpo.config.identity import config_hash
from hmpo.errors import TelemetryError
from hmpo.lab.study.outcomes import Outcome, outcome_of, read_outcome, write_outcome
from hmpo.lab.suite.cells import Cell
from hmpo.lab.suite.folder import fits, tidy


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that one run needs to know, as plain values.

    Example: `Job(suite="headline", cell="grpo", seed=100, config=to_dict(config), folder="...")`.
    """

    suite: str
    cell: str
    role: str
    levels: Mapping[str, str]
    seed: int
    config: Mapping[str, Any]
    folder: str
    """Absolute."""
    keep: Sequence[str] = ()
    failure: str = ""
    """Why the run is given up; then nothing is run and that is its outcome."""

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


def conclude(job: Job, config: RunConfig, failure: str, cpu_s: float | None) -> Outcome:
    """Write the outcome of a run that has ended, then delete what is not kept of it."""
    folder = Path(job.folder)
    outcome = outcome_of(
        folder,
        job.cell,
        job.levels,
        job.role,
        job.seed,
        suite=job.suite,
        cpu_s=cpu_s,
        failure=failure,
    )
    # the hash that later versions keep when they add settings
    outcome = dataclasses.replace(outcome, config_hash=config_hash(config))
    write_outcome(folder, outcome)
    tidy(folder, job.keep)
    return outcome


def concluded(job: Job, config: RunConfig) -> Outcome | None:
    """The outcome that is in the run's folder, if it is one of this run."""
    try:
        found = read_outcome(Path(job.folder))
    except TelemetryError:  # it is written anew
        return None
    if found is None or not fits(found, (job.cell, job.seed), config):
        return None
    tidy(Path(job.folder), job.keep)
    return found


def final_success(outcome: Outcome) -> float | None:
    """Success of the last evaluation; None where nothing was measured."""
    measured = outcome.evals.get("sampled") or [None]
    return measured[-1]


def job_of(
    suite: str, cell: Cell, seed: int, out: Path, keep: Sequence[str], failure: str = ""
) -> Job:
    """The job of one run.

    Args:
        suite: the suite's name.
        cell: one of its cells.
        seed: one of the cell's.
        out: folder of the cell's runs.
        keep: what of a finished run is kept.
        failure: why it is given up instead.
    """
    config = cell.run_config(seed, str(out))
    return Job(
        suite=suite,
        cell=cell.name,
        role=cell.role,
        levels=dict(cell.levels),
        seed=seed,
        config=to_dict(config),
        folder=str(out / str(seed)),
        keep=list(keep),
        failure=failure,
    )
