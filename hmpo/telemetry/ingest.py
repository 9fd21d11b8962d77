"""Reading a run's log back, with every fault named by its line."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hmpo.errors import TelemetryError
from hmpo.telemetry.csvlog import is_csv, read_csv
from hmpo.telemetry.reading import lines
from hmpo.telemetry.records import RECORD_TYPES, check_schema, decode, validate

MALFORMED_SHARE = 0.01
"""Share of malformed lines above which a log is refused even when read leniently."""

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A fault of one line.

    Example: `Problem(line=7, kind="non_monotone", message="step 3 after step 5")`.
    """

    line: int
    """Line of the file, from 1."""
    kind: Literal["malformed", "torn", "duplicate", "non_monotone", "no_run", "other_run"]
    """`torn` is a last line without its end, as a crash leaves it."""
    message: str


@dataclass(frozen=True, kw_only=True)
class RunLog:
    """What one log holds, in step order; duplicates are removed, the last of them kept."""

    run: Record | None
    """The first `run` record."""
    steps: tuple[Record, ...] = ()
    evals: tuple[Record, ...] = ()
    events: tuple[Record, ...] = ()
    decisions: tuple[Record, ...] = ()
    end: Record | None = None
    """The last `end` record; None for a run that crashed or is still going."""
    problems: tuple[Problem, ...] = ()
    adapter: str = "hmpo"
    """The kind of log it was read from (`hmpo.telemetry.foreign`)."""
    notes: tuple[str, ...] = ()
    """What a log of others lacks, and what stands for it."""

    def count(self, kind: str) -> int:
        """Problems of one kind."""
        return sum(problem.kind == kind for problem in self.problems)


def read_run(path: Path | str, strict: bool = False) -> RunLog:
    """Read telemetry of our own schema: JSON lines or CSV, gzipped or not.

    Unknown keys and unknown record types are ignored.

    Args:
        path: the file.
        strict: raise at the first problem instead of listing it.

    Raises:
        TelemetryError: not readable; another major version; more than 1 % malformed lines; or,
            if `strict`, any problem. The message names file and line.
    """
    path = Path(path)
    records, problems = _read(path)
    known = [(line, record) for line, record in records if record["type"] != "other"]
    problems += _order(known)
    first = known[0][1] if known else None
    if first is None or first["type"] != "run":
        problems.append(Problem(line=1, kind="no_run", message="the first record is no run record"))
    problems.sort(key=lambda problem: problem.line)
    if strict and problems:
        raise TelemetryError(f"{path}, line {problems[0].line}: {problems[0].message}")
    by_type: dict[str, list[Record]] = {kind: [] for kind in RECORD_TYPES}
    for record in _last_wins(known):
        by_type[record["type"]].append(record)
    for kind in ("step", "eval", "event", "decision"):
        by_type[kind].sort(key=lambda record: record["step"])
    return RunLog(
        run=next(iter(by_type["run"]), None),
        steps=tuple(by_type["step"]),
        evals=tuple(by_type["eval"]),
        events=tuple(by_type["event"]),
        decisions=tuple(by_type["decision"]),
        end=by_type["end"][-1] if by_type["end"] else None,
        problems=tuple(problems),
    )


def read_timing(path: Path | str) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """The `segment` records and the `time` records of timing.jsonl, malformed lines left out.

    A step's `time` records are merged into one; of a step that was done again the last counts.

    Raises:
        TelemetryError: not readable, or more than 1 % malformed lines.
    """
    records, _ = _read(Path(path))
    times: dict[int, Record] = {}
    for _, record in records:
        if record["type"] == "time":
            times[record["step"]] = {**times.get(record["step"], {}), **record}
    segments = tuple(record for _, record in records if record["type"] == "segment")
    return segments, tuple(times[step] for step in sorted(times))


def read_process_events(path: Path | str) -> tuple[Record, ...]:
    """The `event` records of timing.jsonl: what happened to one process and not to the run.

    Raises:
        TelemetryError: not readable, or more than 1 % malformed lines.
    """
    records, _ = _read(Path(path))
    return tuple(record for _, record in records if record["type"] == "event")


def read_records(
    path: Path | str, non_finite: bool = True
) -> tuple[list[tuple[int, Record]], list[Problem], int]:
    """Records of any .jsonl or .csv file, also .gz: numbered records, problems, lines read.

    Args:
        path: the file.
        non_finite: as in `decode`; False for files whose texts matter, such as completions.
    """
    records: list[tuple[int, Record]] = []
    problems: list[Problem] = []
    number = 0
    if is_csv(Path(path)):
        for number, row in read_csv(Path(path)):
            if isinstance(row, TelemetryError):
                problems.append(Problem(line=number, kind="malformed", message=str(row)))
            else:
                records.append((number, row))
        return records, problems, number
    for number, line in lines(Path(path)):
        if not line.strip():
            continue
        try:
            records.append((number, decode(line, non_finite)))
        except TelemetryError as error:
            torn = not line.endswith(b"\n")
            kind: Literal["torn", "malformed"] = "torn" if torn else "malformed"
            message = "the last line is cut off, as by a crash" if torn else str(error)
            problems.append(Problem(line=number, kind=kind, message=message))
    return records, problems, number


def _read(path: Path) -> tuple[list[tuple[int, Record]], list[Problem]]:
    """Decoded and validated records of our schema; records of unknown type become `other`."""
    decoded, problems, count = read_records(path)
    records: list[tuple[int, Record]] = []
    for number, record in decoded:
        if record.get("type") == "run" and record.get("schema") is not None:
            try:
                check_schema(record["schema"])
            except TelemetryError as error:
                raise TelemetryError(f"{path}, line {number}: {error}") from None
        kind = record.get("type")
        if isinstance(kind, str) and kind not in RECORD_TYPES:
            records.append((number, {"type": "other"}))
            continue
        try:
            validate(record, strict=False)
        except TelemetryError as error:
            problems.append(Problem(line=number, kind="malformed", message=str(error)))
            continue
        records.append((number, record))
    refuse_malformed(path, problems, count)
    return records, problems


def refuse_malformed(path: Path, problems: Sequence[Problem], lines: int) -> None:
    """Raise a TelemetryError if more than 1 % of a log's lines are malformed."""
    malformed = [problem for problem in problems if problem.kind == "malformed"]
    if len(malformed) > MALFORMED_SHARE * lines:
        first = malformed[0]
        raise TelemetryError(
            f"{path}: {len(malformed)} of {lines} lines are malformed, expected at most 1 %; "
            f"the first is line {first.line}: {first.message}"
        )


def _key(record: Record) -> tuple[Any, ...] | None:
    """What makes a record the same as an earlier one; None where repeats are normal."""
    if record["type"] not in ("step", "eval"):
        return None
    return (record["run_id"], record["step"], record["type"], record.get("eval/name"))


def _last_wins(records: list[tuple[int, Record]]) -> list[Record]:
    latest = {_key(record): i for i, (_, record) in enumerate(records) if _key(record)}
    return [
        record
        for i, (_, record) in enumerate(records)
        if _key(record) is None or latest[_key(record)] == i
    ]


def _order(records: list[tuple[int, Record]]) -> list[Problem]:
    """Duplicates, steps that go back, and records of another run."""
    problems = []
    known: set[tuple[Any, ...]] = set()
    highest = -1
    run_id = records[0][1]["run_id"] if records else None
    for line, record in records:
        if record["run_id"] != run_id:
            message = f"run_id {record['run_id']!r} after {run_id!r}"
            problems.append(Problem(line=line, kind="other_run", message=message))
        key = _key(record)
        if key is None:
            continue
        if key in known:
            message = f"a second {record['type']} record of step {record['step']}; the last counts"
            problems.append(Problem(line=line, kind="duplicate", message=message))
        elif record["type"] == "step" and record["step"] < highest:
            message = f"step {record['step']} after step {highest}"
            problems.append(Problem(line=line, kind="non_monotone", message=message))
        known.add(key)
        if record["type"] == "step":
            highest = max(highest, record["step"])
    return problems
