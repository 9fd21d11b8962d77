"""Kill the processes of a suite with SIGKILL at random instants, start it again, compare.

A chain is one suite: its parent or one of its workers is killed, again and again, and at last it is
left to finish. Half of the kills come at any instant, half while a run is under way. Everything
goes through the command line, each time with a cold start.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.micro import everything
from tests.lab.suite.small import outcomes, write

PER_CHAIN = 6
"""Kills of one suite at most."""
LONGEST_S = 8.0
"""Until a kill that comes at any instant; most starts are done importing by half of it."""
ORPHANS_S = 5.0
"""Seconds within which the workers of a parent that was killed must be gone."""


@dataclass
class Tally:
    """What happened to the suites."""

    kills: int = 0
    of_parents: int = 0
    of_workers: int = 0
    in_a_run: int = 0
    """Kills while some run had begun and not ended."""
    suites: int = 0
    runs: int = 0
    starts: int = 0
    taken_up: int = 0
    """Runs that a later process went on with from a checkpoint."""
    identical: int = 0
    """Suites whose every outcome, less its cost, and every other file but timing.jsonl is that of
    the undisturbed suite."""
    orphans_s: float = 0.0
    failures: list[str] = field(default_factory=list)


def left_by(folder: Path) -> dict[str, Any]:
    """All that a suite's runs leave which must not depend on how it went."""
    left: dict[str, Any] = {}
    for run in sorted((folder / "runs").glob("*/*")):
        files = everything(run)
        for name in ("outcome.json", "run.lock"):
            files.pop(name, None)
        left |= {f"{run.relative_to(folder)}/{name}": data for name, data in files.items()}
    return left | outcomes(folder)


def start(source: Path, out: Path) -> subprocess.Popen[bytes]:
    """The command, in a group of its own."""
    words = ["experiment", "run", str(source), "--jobs", "2", "--out", str(out), "--quiet"]
    return subprocess.Popen(
        [sys.executable, "-m", "hmpo", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def workers(parent: int) -> list[int]:
    """The processes that a process has started."""
    try:
        text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def campaign(root: Path, *, kills: int, seed: int, per_chain: int = PER_CHAIN) -> Tally:
    """At least `kills` kills, over as many suites as that takes.

    Args:
        root: an empty folder, better in memory.
        kills: of parents and workers together.
        seed: of the instants.
        per_chain: kills of one suite at most.
    """
    source, out = write(root / "plan"), root / "out"
    begun = start(source, out)
    _, said = begun.communicate()
    assert begun.returncode == 0, said
    undisturbed = left_by(out / "small")
    tally = Tally()
    while tally.kills < kills and not tally.failures:
        shutil.rmtree(out)
        rng = random.Random(f"{seed}/{tally.suites}")
        _chain(source, out, rng, min(per_chain, kills - tally.kills), tally)
        found = left_by(out / "small")
        names = sorted({*found, *undisturbed})
        wrong = [name for name in names if found.get(name) != undisturbed.get(name)]
        tally.failures += [f"suite {tally.suites}: differs in {', '.join(wrong)}"] if wrong else []
        tally.suites += 1
        tally.runs += len(outcomes(out / "small"))
        tally.identical += not wrong
        tally.taken_up += _taken_up(out / "small")
    return tally


def _chain(source: Path, out: Path, rng: random.Random, kills: int, tally: Tally) -> None:
    """One suite: killed up to `kills` times, then left to finish."""
    parent = start(source, out)
    tally.starts += 1
    done = 0
    while True:
        if done < kills and not _wait(parent, out / "small", rng):
            done += 1
            found = workers(parent.pid)
            victim = rng.choice(found) if found and rng.random() < 0.5 else parent.pid
            tally.in_a_run += bool(_open_runs(out / "small"))
            tally.kills += 1
            os.kill(victim, signal.SIGKILL)
            tally.of_parents += victim == parent.pid
            tally.of_workers += victim != parent.pid
            if victim != parent.pid:
                continue
            _bury(parent, found, tally)
        elif (code := parent.wait()) == 0:
            assert parent.stderr is not None
            parent.stderr.close()
            return
        else:  # three workers in a row were killed before they could begin
            assert parent.stderr is not None
            said = parent.stderr.read().decode()
            if "worker processes end before their first run" not in said:
                tally.failures.append(f"exit code {code}: {said[-500:]}")
                return
        parent = start(source, out)
        tally.starts += 1


def _wait(parent: subprocess.Popen[bytes], folder: Path, rng: random.Random) -> bool:
    """Until any instant, or one while a run is under way; True if the suite ended before it."""
    end = time.monotonic() + 60
    if rng.random() < 0.5:
        end = time.monotonic() + rng.uniform(0, LONGEST_S)
    else:
        while not _open_runs(folder) and time.monotonic() < end and parent.poll() is None:
            time.sleep(0.01)
        end = time.monotonic() + rng.uniform(0, 0.5)
    while time.monotonic() < end and parent.poll() is None:
        time.sleep(0.005)
    return parent.poll() is not None


def _open_runs(folder: Path) -> list[Path]:
    """Runs that have begun to write and have no outcome."""
    logs = folder.glob("runs/*/*/telemetry.jsonl")
    return [log.parent for log in logs if not (log.parent / "outcome.json").exists()]


def _bury(parent: subprocess.Popen[bytes], orphans: list[int], tally: Tally) -> None:
    """Wait until nothing of a killed parent is left."""
    parent.wait()
    assert parent.stderr is not None
    parent.stderr.close()
    began = time.monotonic()
    while any(_alive(pid) for pid in orphans):
        if time.monotonic() > began + ORPHANS_S:
            tally.failures.append(f"workers outlive their parent by {ORPHANS_S:g} s")
            return
        time.sleep(0.002)
    tally.orphans_s = max(tally.orphans_s, round(time.monotonic() - began, 3))


def _alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def _taken_up(folder: Path) -> int:
    """Runs with a process that went on behind a checkpoint."""
    found = 0
    for log in folder.glob("runs/*/*/timing.jsonl"):
        segments = [json.loads(line) for line in log.read_text().splitlines()]
        found += any(record.get("resumed_from_step") for record in segments)
    return found
