"""Whether runs made again come to the committed numbers, on this machine or as another one would.

Which of them are made again is drawn by the suite's hash, so that nobody chose them; the table of
what they came to lies beside the committed outcomes.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hmpo.checkpoint import write_atomic
from hmpo.errors import ConfigError, TelemetryError
from hmpo.lab.study.outcomes import Outcome
from hmpo.lab.study.plan import Plan, plan_of
from hmpo.lab.suite.cells import Cell
from hmpo.lab.suite.folder import Key, SuiteFolder, plan_value
from hmpo.lab.suite.job import final_success
from hmpo.lab.suite.reading import Suite
from hmpo.telemetry.reading import loads

Row = dict[str, Any]

SHOWN = 20
"""Runs that differ and are named."""


def comparison(committed: Mapping[Key, Outcome], found: Mapping[Key, Outcome]) -> list[str]:
    """Lines that say which runs came to the same final success, to the bit, and which did not."""
    both = [key for key in found if key in committed]
    if not both:
        return ["nothing to compare: no outcome of these runs is committed"]
    different = [key for key in both if _final(committed[key]) != _final(found[key])]
    lines = [
        f"final success equal to the committed one: {len(both) - len(different)} of {len(both)}"
    ]
    for key in different[:SHOWN]:
        was, now = committed[key], found[key]
        lines.append(f"{key[0]}, seed {key[1]}: {_shown(was)} is committed, now {_shown(now)}")
    if len(different) > SHOWN:
        lines.append(f"... and {len(different) - SHOWN} more")
    places = {str(committed[key].environment) for key in both}
    if different and places != {str(found[key].environment) for key in both}:
        lines.append(f"made elsewhere: {'; '.join(sorted(places))[:500]}")
    return lines


def _final(outcome: Outcome) -> tuple[str, float | None]:
    return outcome.status, final_success(outcome)


def _shown(outcome: Outcome) -> str:
    value = final_success(outcome)
    return outcome.status if outcome.status == "failed" or value is None else repr(value)


def drawn(
    suite: Suite, runs: Sequence[tuple[Cell, int]], committed: Mapping[Key, Outcome], count: int
) -> list[tuple[Cell, int]]:
    """So many of the runs whose outcome is committed, in an order that the suite's hash decides.

    A larger count has the runs of a smaller one in it. Where OMP_NUM_THREADS is set, they have that
    many threads, whatever the suite says.

    Raises:
        ConfigError: fewer are committed.
    """
    known = [(cell, seed) for cell, seed in runs if (cell.name, seed) in committed]
    if not 1 <= count <= len(known):
        raise ConfigError(
            f"--sample: got {count}, expected 1 to {len(known)}, the chosen runs that are committed"
        )

    def place(run: tuple[Cell, int]) -> bytes:
        cell, seed = run
        return hashlib.sha256(f"{suite.hash}\0{cell.name}\0{seed}".encode()).digest()

    return [(_threaded(cell), seed) for cell, seed in sorted(known, key=place)[:count]]


def _threaded(cell: Cell) -> Cell:
    """The cell with the threads that the environment asks for, where it does."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if not threads.isdecimal() or int(threads) < 1:
        return cell
    return dataclasses.replace(cell, config=dataclasses.replace(cell.config, threads=int(threads)))


def refuse_committed_runs(
    place: SuiteFolder, runs: Sequence[tuple[Cell, int]], committed: Mapping[Key, Outcome]
) -> None:
    """Refuse a folder that holds the very runs that are committed: nothing would be made again.

    Raises:
        ConfigError: one line.
    """
    for cell, seed in runs:
        found = place.outcome(cell, seed)
        if found is not None and found.cost == committed[cell.name, seed].cost:
            raise ConfigError(
                f"--sample: {place.shown} holds the committed run of cell {cell.name}, seed {seed} "
                "itself; give another --out"
            )


def table_of(
    suite: Suite, committed: Mapping[Key, Outcome], found: Mapping[Key, Outcome]
) -> list[Row]:
    """A row for each run made again, in the order of cells and seeds.

    `committed` and `again` are endpoints, `equal` says whether every evaluation is the same to the
    bit, `threads` and `capability` are those of the run made now.
    """
    plan = plan_of(plan_value(suite))
    return [_row(plan, committed[key], found[key]) for key in sorted(found) if key in committed]


def _row(plan: Plan, was: Outcome, now: Outcome) -> Row:
    from hmpo.lab.study.scores import score  # needs scipy, which making runs does not

    before, after = (score(outcome, plan).success for outcome in (was, now))
    known = before is not None and after is not None
    return {
        "cell": now.cell,
        "seed": now.seed,
        "committed": before,
        "again": after,
        "difference": after - before if known else None,
        "equal": (was.status, was.evals, was.passed) == (now.status, now.evals, now.passed),
        "threads": now.environment.get("threads"),
        "capability": now.environment.get("capability", ""),
        "machine": now.environment.get("machine", ""),
        "committed_threads": was.environment.get("threads"),
        "committed_machine": was.environment.get("machine", ""),
    }


def table_lines(rows: Sequence[Row]) -> list[str]:
    """The rows for a terminal."""
    lines = ["cell, seed: committed, again, difference, equal to the bit, threads, capability"]
    for row in rows:
        ends = [_short(row[name]) for name in ("committed", "again", "difference")]
        lines.append(
            f"{row['cell']}, {row['seed']}: {', '.join(ends)}, {'yes' if row['equal'] else 'no'}, "
            f"{row['threads']}, {row['capability'] or 'unknown'}"
        )
    return lines


def _short(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def again_file(suite: Suite) -> Path:
    """Where the table of a suite's runs made again lies, beside its outcomes."""
    assert suite.outcomes is not None, "a suite with committed outcomes names their file"
    return suite.outcomes.parent / f"{suite.name}-again.json"


def read_again(path: Path) -> list[Row]:
    """The rows of a file that `save_again` wrote; none where there is no file.

    Raises:
        TelemetryError: it is another kind of file.
    """
    return _read(path)[2]


def refuse_other_suite(path: Path, suite: Suite) -> None:
    """Refuse a file of runs of another suite, or of this one as it was: they are no part of it.

    Raises:
        TelemetryError: one line; or it is another kind of file.
    """
    name, digest, rows = _read(path)
    if rows and (name, digest) != (suite.name, suite.hash):
        raise TelemetryError(
            f"{path}: holds runs of suite {name} with hash {digest[:12]}, expected {suite.name} "
            f"with {suite.hash[:12]}; move it away"
        )


def _read(path: Path) -> tuple[str, str, list[Row]]:
    """(name of the suite, its hash, rows) of a file."""
    if not path.exists():
        return "", "", []
    try:
        found = loads(path.read_bytes())
        return str(found["suite"]), str(found["hash"]), list(found["runs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TelemetryError(f"{path}: no table of runs made again ({error!r})") from None


def save_again(path: Path, suite: Suite, rows: Sequence[Row]) -> None:
    """Add rows to the file; those of the same run, threads and capability take the old one's place.

    Raises:
        TelemetryError: the file there is another kind of file, or of another suite.
        StorageError: it cannot be written.
    """

    def key(row: Row) -> tuple[str, ...]:
        return tuple(str(row[n]) for n in ("threads", "capability", "machine", "cell", "seed"))

    refuse_other_suite(path, suite)
    kept = {key(row): row for row in [*read_again(path), *rows]}
    value = {"suite": suite.name, "hash": suite.hash, "runs": [kept[k] for k in sorted(kept)]}
    write_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")
