"""One finished run as a record of a few kilobytes, which the tables and figures are made from.

Everything but `cost` and `environment` is a function of the run's configuration, so the same run
gives the same record. Records can be committed and read again without their run folders.
"""

import contextlib
import gzip
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hmpo.checkpoint import write_atomic
from hmpo.errors import RunFolderError, TelemetryError
from hmpo.lab.folder import RunData, load_run
from hmpo.lab.study import measures
from hmpo.lab.study.plan import Cell, Plan, read_plan
from hmpo.lab.study.record_checks import SCHEMA, check
from hmpo.telemetry.reading import lines, loads

NAME = "outcome.json"
"""Name of the record's file in a run folder."""
LATE = "exploratory"
_LATER = ("decisions", "weights")
_ENDS = {"completed": "finished", "early_stop": "stopped", "failed": "failed"}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one run came to.

    Example: `Outcome(cell="grpo+dense", role="main", levels={"member": "grpo"}, seed=100, ...)`.
    """

    schema: int = SCHEMA
    suite: str = ""
    cell: str
    role: str = "main"
    levels: Mapping[str, str] = field(default_factory=dict)
    """Level of each factor, {} for cells outside of the product."""
    seed: int
    status: str
    """finished, failed, or stopped by a controller."""
    reason: str = ""
    config_hash: str = ""
    registered: str = ""
    """SHA-256 of the protocol that was fixed before the run began; `LATE` where the run was not
    decided on then, "" where nobody said."""
    updates: int = 0
    tokens: int = 0
    evals: Mapping[str, list[Any]] = field(default_factory=dict)
    """`step`, `tokens`, `sampled`, `greedy`, `reward` of every evaluation, in order."""
    before: Mapping[str, Any] = field(default_factory=dict)
    after: Mapping[str, Any] = field(default_factory=dict)
    """Successes: `sampled` and `greedy` of `n`, `pass_at` of `pass_n` by `k` samples."""
    passed: list[str] = field(default_factory=list)
    """Hex bits by held-out prompt for each evaluation; [] where they were not logged."""
    heldout: str | None = None
    """SHA-256 of the held-out prompts."""
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    reward: Mapping[str, list[Any]] = field(default_factory=dict)
    """`step` and `mean` at no more than 64 points."""
    curves: Mapping[str, list[Any]] = field(default_factory=dict)
    """`step` and the curves of `measures.CURVES` at no more than 64 points."""
    decisions: Mapping[str, Any] = field(default_factory=dict)
    """Of controllers, as `measures.decisions` tells; {} where there were none."""
    weights: str = ""
    """SHA-256 of the final weights' files; "" where they were not there."""
    cost: Mapping[str, float | None] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    def key(self) -> tuple[str, int]:
        """What makes it the only one of its suite."""
        return self.cell, self.seed

    def to_json(self) -> str:
        """One line of JSON, the same for equal records."""
        value = asdict(self)
        for name in _LATER:  # files that were written before these entries keep their bytes
            if not value[name]:
                del value[name]
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Outcome":
        """The record that `to_json` wrote; entries that this version does not know are left out.

        Raises:
            TelemetryError: no JSON object, another schema, or an entry of a wrong kind.
        """
        try:
            value = loads(text)
        except ValueError as error:
            raise TelemetryError(f"outcome: {error}") from None
        if not isinstance(value, dict):
            raise TelemetryError(f"outcome: got {type(value).__name__}, expected a JSON object")
        check(value)
        names = {item.name for item in fields(cls)}
        return cls(**{name: item for name, item in value.items() if name in names})


def outcome_of(
    folder: Path,
    cell: str,
    levels: Mapping[str, str],
    role: str,
    seed: int,
    *,
    suite: str = "",
    heldout: str | None = None,
    cpu_s: float | None = None,
    failure: str = "",
) -> Outcome:
    """What the run in `folder` came to.

    Args:
        folder: a run folder.
        cell: the cell's name.
        levels: level of each factor.
        role: one of `ROLES`.
        seed: of the run.
        suite: the suite's name.
        heldout: SHA-256 of the held-out prompts, where known.
        cpu_s: CPU seconds of all its processes, where they were measured.
        failure: why the run counts as failed although its log does not say so (it was killed, or
            never wrote one); "" means that the log tells how it ended.

    Raises:
        RunFolderError: no such run, or it has not ended: no end record, or one that says that it
            was interrupted.
        TelemetryError: its log cannot be read.
    """
    about = {"cell": cell, "levels": dict(levels), "role": role, "seed": seed, "suite": suite}
    try:
        run = load_run(folder)
    except (RunFolderError, TelemetryError):
        if not failure:
            raise
        return Outcome(status="failed", reason=failure, heldout=heldout, **about)
    status, reason = ("failed", failure) if failure else _ending(run)
    before, after = measures.ends(run)
    return Outcome(
        **about,
        status=status,
        reason=reason,
        config_hash=(run.log.run or {}).get("config_hash", ""),
        updates=run.last_step,
        tokens=measures.tokens_at(run.log.steps, run.last_step),
        evals=measures.evaluations(run),
        before=before,
        after=after,
        passed=measures.passed(run),
        heldout=heldout or measures.heldout(run),
        metrics=measures.metrics(run),
        reward=measures.reward_curve(run),
        curves=measures.curves(run),
        decisions=measures.decisions(run),
        weights=measures.weights(folder),
        cost=measures.cost(run, cpu_s),
        environment=measures.environment(run),
    )


def _ending(run: RunData) -> tuple[str, str]:
    """Status and reason by the log's last word."""
    end = run.log.end or {}
    told = end.get("status")
    if told not in _ENDS:
        how = "was interrupted" if told == "interrupted" else "has no end record"
        raise RunFolderError(f"{run.path}: the run {how}; resume it, then summarise it")
    reason = end.get("reason") or ""
    return _ENDS[told], reason


def write_outcome(folder: Path, outcome: Outcome) -> Path:
    """Write `outcome.json` into a run folder and return its path.

    Raises:
        StorageError: the file cannot be written.
    """
    path = Path(folder) / NAME
    write_atomic(path, outcome.to_json() + "\n", make_folder=True)
    return path


def save_outcomes(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Write records to one .jsonl or .jsonl.gz, sorted by cell and seed: the same bytes each time.

    Raises:
        StorageError: the file cannot be written.
    """
    ordered = sorted(outcomes, key=Outcome.key)
    data = "".join(outcome.to_json() + "\n" for outcome in ordered).encode()
    write_atomic(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def read_outcomes(path: Path) -> list[Outcome]:
    """Records of a .json, .jsonl or .jsonl.gz file, in its order; one line holds one record.

    Raises:
        TelemetryError: not readable, a line that is no outcome, or two of one cell and seed.
    """
    found: dict[tuple[str, int], Outcome] = {}
    for number, line in lines(path):
        if not line.strip():
            continue
        try:
            outcome = Outcome.from_json(line)
        except TelemetryError as error:
            raise TelemetryError(f"{path}, line {number}: {error}") from None
        if outcome.key() in found:
            raise TelemetryError(
                f"{path}, line {number}: a second outcome of cell {outcome.cell!r}, seed "
                f"{outcome.seed}, expected one"
            )
        found[outcome.key()] = outcome
    return list(found.values())


def read_outcome(folder: Path) -> Outcome | None:
    """The record in a run folder, or None where there is none yet.

    Raises:
        TelemetryError: it cannot be read, or holds another number of records than one.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        return None
    found = read_outcomes(path)
    if len(found) != 1:
        raise TelemetryError(f"{path}: {len(found)} outcomes, expected one")
    return found[0]


def collect(
    folder: Path, committed: Path | None = None, *, summarise: bool = True
) -> list[Outcome]:
    """All outcomes of a suite's folder, in the order of its cells and seeds.

    A run's `outcome.json` counts; where a run has ended without one, its log is summarised. Runs
    that have not ended are left out. A committed outcome stands for a run that is not there.

    Args:
        folder: of the suite.
        committed: file of outcomes, as `save_outcomes` writes it.
        summarise: summarise runs without an outcome; False leaves them out.

    Raises:
        RunFolderError: no suite there.
        TelemetryError: the plan, an outcome or a run's log cannot be read.
    """
    plan = read_plan(folder)
    kept = {item.key(): item for item in read_outcomes(committed)} if committed else {}
    found = []
    for cell in plan.cells:
        for seed in cell.seeds:
            place = Path(folder) / "runs" / cell.name / str(seed)
            outcome = read_outcome(place)
            if outcome is None and summarise and (place / "telemetry.jsonl").is_file():
                with contextlib.suppress(RunFolderError):
                    outcome = outcome_of(
                        place, cell.name, cell.levels, cell.role, seed, suite=plan.name
                    )
            if outcome is not None:
                outcome = replace(outcome, registered=_registered(plan, cell, seed))
            outcome = outcome or kept.get((cell.name, seed))
            if outcome is None:
                continue
            if outcome.key() != (cell.name, seed):
                raise TelemetryError(
                    f"{place}: its outcome is of cell {outcome.cell!r}, seed {outcome.seed}"
                )
            # the plan says what a cell is for, whatever was said when it ran
            found.append(replace(outcome, role=cell.role, levels=cell.levels))
    return found


def _registered(plan: Plan, cell: Cell, seed: int) -> str:
    """What a run of the suite's folder is known to have been decided by."""
    if cell.role == "tuning" or not plan.first_protocol_hash:
        return ""
    return plan.first_protocol_hash if plan.confirmatory(cell.name, [seed]) else LATE
