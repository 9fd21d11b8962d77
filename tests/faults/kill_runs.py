"""Kill whole runs with SIGKILL at random instants, resume them, compare what they leave.

One chain is one run: started, killed, resumed, killed again, and at last left to finish. Every
start is a fork of this process, which has torch imported and warmed up. Half of the kills aim
at a checkpoint save; a marker in shared memory proves which ones hit inside. Two chains go on at
once beside a process that only keeps a core busy. What is done stands in a journal, from which a
campaign that was stopped goes on.

    python -m tests.faults.kill_runs KILLS SEED [CASE ...]     prints the tallies as JSON
"""

import ctypes
import dataclasses
import json
import logging
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from hmpo.config import RunConfig
from hmpo.run import files
from hmpo.run import loop as run
from tests.faults.kill_cases import CASES, case_config
from tests.faults.kills import Counters, fork
from tests.faults.micro import everything, micro_policy
from tests.faults.storage import fast_folder

PER_CHAIN = 4
"""Kills of one run at most."""
AT_ONCE = 2
"""Chains that go on side by side."""
ORPHANS_S = 10.0
"""Seconds within which all that a killed run had started must be gone."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
BEGUN, FINISHED, SET_UP = range(3)
"""What a child counts: saves begun, saves finished, runs set up."""


@dataclass
class Tally:
    """What happened to the runs of one configuration."""

    kills: int = 0
    inside_saves: int = 0
    before_first_checkpoint: int = 0
    after_last_checkpoint: int = 0
    resumed: int = 0
    """Kills after which a later start was set up from what the kill had left."""
    runs: int = 0
    identical: int = 0
    """Runs all of whose files, but timing.jsonl, are those of the undisturbed one to the byte."""
    orphans_s: float = 0.0
    """Longest time until all processes that a killed run had started were gone."""
    failures: list[str] = field(default_factory=list)

    def add(self, other: Mapping) -> None:
        """Count the chain of a journal in."""
        for name, value in other.items():
            if name == "orphans_s":
                self.orphans_s = max(self.orphans_s, value)
            elif name in vars(self):
                setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Undisturbed:
    """A case's run that nobody disturbed."""

    config: RunConfig
    left: dict[str, bytes]
    """All of its files but timing.jsonl."""
    lasts: float
    """Seconds from its start to its end, beside nothing else."""

    @property
    def folder(self) -> Path:
        return Path(self.config.out) / self.config.name


def campaign(
    root: Path, *, kills: int, seed: int, journal: Path, cases: Iterable[str] = CASES
) -> dict[str, Tally]:
    """At least `kills` SIGKILLs of the runs of each case.

    Args:
        root: an empty folder, better in memory.
        kills: for each case; a case ends at its first failure.
        seed: of the instants.
        journal: file of JSON lines, one for each chain; what stands there is not done again.
        cases: names of `CASES`.

    Returns:
        What happened, by case.
    """
    policy = micro_policy(root / "policy")
    tallies = read_journal(journal, cases)
    open_cases = [name for name, tally in tallies.items() if _is_open(tally, kills)]
    undisturbed = [_undisturbed(name, policy, root) for name in open_cases]
    reading, writing = os.pipe()
    os.write(writing, bytes(range(len(open_cases))))
    os.close(writing)

    def take() -> None:
        _die_with_parent()
        while number := os.read(reading, 1):  # the next case that nobody has taken
            name, tally = open_cases[number[0]], tallies[open_cases[number[0]]]
            place = undisturbed[number[0]]
            while _is_open(tally, kills):
                chain = _chain(place, random.Random(f"{seed}/{name}/{tally.runs}"))
                tally.add(vars(chain))
                with journal.open("a") as file:
                    file.write(json.dumps({"case": name, **vars(chain)}) + "\n")

    workers = [fork(take) for _ in range(AT_ONCE)]
    busy = fork(_busy)
    try:
        ended = [os.waitpid(pid, 0)[1] for pid in workers]
    finally:
        os.kill(busy, signal.SIGKILL)
        os.waitpid(busy, 0)
        os.close(reading)
    assert not any(ended), f"the campaign itself failed: {ended}"
    return read_journal(journal, cases)


def read_journal(journal: Path, cases: Iterable[str]) -> dict[str, Tally]:
    """What a campaign has done so far, by case."""
    tallies = {name: Tally() for name in cases}
    for line in journal.read_text().splitlines() if journal.exists() else ():
        with suppress(ValueError):  # the last line of a campaign that was itself killed
            entry = json.loads(line)
            if entry.get("case") in tallies:
                tallies[entry["case"]].add(entry)
    return tallies


def _is_open(tally: Tally, kills: int) -> bool:
    return tally.kills < kills and not tally.failures


def _undisturbed(name: str, policy: Path, root: Path) -> Undisturbed:
    """Run a case twice, the first time to warm up."""
    config = case_config(name, policy, root)
    folder = Path(config.out) / config.name
    run.train(config)
    before = everything(folder)
    shutil.rmtree(folder)
    began = time.monotonic()
    run.train(config)
    lasts = time.monotonic() - began
    left = everything(folder)
    assert left == before, f"{name}: two undisturbed runs differ"
    return Undisturbed(config, left, lasts)


def _busy() -> None:
    _die_with_parent()
    while True:
        pass


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _chain(case: Undisturbed, rng: random.Random) -> Tally:
    """One run: killed up to `PER_CHAIN` times, then left to finish and compared."""
    if sys.platform == "linux":  # what a killed run leaves behind becomes a child of this process
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    shutil.rmtree(case.folder, ignore_errors=True)
    tally, unresumed = Tally(runs=1), 0
    last = case.folder / f"checkpoints/step-{case.config.updates:08d}"
    for attempt in range(PER_CHAIN + 1):
        marks = Counters(3)
        pid = fork(lambda shared=marks: _train(case.config, shared))
        if attempt < PER_CHAIN:
            _wait(rng, marks, case.lasts, last, pid)
            os.kill(pid, signal.SIGKILL)  # a zombie at worst: it is not reaped yet
        _, status = os.waitpid(pid, 0)
        if marks[SET_UP]:
            tally.resumed += unresumed
            unresumed = 0
        if not os.WIFSIGNALED(status):
            if os.waitstatus_to_exitcode(status) != 0:
                tally.failures.append(f"start {attempt} failed")
            break
        unresumed += 1
        tally.kills += 1
        tally.inside_saves += marks[BEGUN] > marks[FINISHED]
        tally.before_first_checkpoint += not list(case.folder.glob("checkpoints/step-*"))
        tally.after_last_checkpoint += last.exists()
        if rng.random() < 0.5:  # else it is resumed while the orphans still live
            _bury_orphans(tally)
    _bury_orphans(tally)
    found = everything(case.folder)
    names = sorted({*found, *case.left})
    wrong = [name for name in names if found.get(name) != case.left.get(name)]
    tally.failures += [f"other bytes or litter: {', '.join(wrong)}"] if wrong else []
    tally.identical += not wrong
    return tally


def _bury_orphans(tally: Tally) -> None:
    """Wait until every process that a run had started is gone."""
    began = time.monotonic()
    while time.monotonic() < began + ORPHANS_S:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            tally.orphans_s = max(tally.orphans_s, round(time.monotonic() - began, 3))
            return
        if not pid:
            time.sleep(0.002)
    tally.failures.append(f"processes of a killed run are still there after {ORPHANS_S:g} s")


def _wait(rng: random.Random, marks: Counters, lasts: float, last: Path, pid: int) -> None:
    """Until any instant, one inside or near a save, or one between the last save and the end."""
    kind, count = rng.random(), rng.randint(1, 3)
    longest = max(1.0, 3 * lasts)  # also on a busy machine
    if kind < 0.3:
        _until(lambda: False, rng.uniform(0, 2 * lasts), pid)
    elif kind < 0.9:
        _until(lambda: marks[BEGUN] >= count, longest, pid)
        time.sleep(rng.uniform(0, 0.003))
    else:
        _until(last.exists, longest, pid)
        time.sleep(rng.uniform(0, 0.05))


def _until(happened: Callable[[], bool], seconds: float, pid: int) -> None:
    """Wait until something has happened, but no longer than these seconds or than a child lives."""
    deadline = time.monotonic() + seconds
    while not happened() and time.monotonic() < deadline:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.0002)


class _SetUp(run.Observer):
    def __init__(self, marks: Counters) -> None:
        self.marks = marks

    def on_start(self, config: RunConfig, folder: Path, step: int) -> None:
        self.marks.add(SET_UP)


def _train(config: RunConfig, marks: Counters) -> None:
    """In the child: start or resume, marking every save's begin and end."""
    logging.disable(logging.WARNING)  # of stale locks, which are the point here
    save = files.save_checkpoint

    def marked(*args, **keywords):
        marks.add(BEGUN)
        path = save(*args, **keywords)
        marks.add(FINISHED)
        return path

    files.save_checkpoint = marked
    run.train(config, resume=True, exist_ok=True, observer=_SetUp(marks))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with fast_folder() as place:
        counted = campaign(
            place,
            kills=int(sys.argv[1]),
            seed=int(sys.argv[2]),
            journal=place / "journal.jsonl",
            cases=sys.argv[3:] or CASES,
        )
    print(json.dumps({name: dataclasses.asdict(tally) for name, tally in counted.items()}))  # noqa: T201
