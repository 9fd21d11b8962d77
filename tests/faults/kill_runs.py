"""Kill whole runs with SIGKILL at random instants, resume them, compare what they leave.

One chain is one run: started, killed, resumed, killed again, and at last left to finish. Every
start is a fork of this process, which has torch imported and warmed up. Half of the kills aim
at a checkpoint save; a marker in shared memory proves which ones hit inside.

    python -m tests.faults.kill_runs KILLS SEED     prints the tally as JSON
"""

import dataclasses
import json
import logging
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from hmpo.config import RunConfig
from hmpo.run import files
from hmpo.run import loop as run
from tests.faults.kills import fork
from tests.faults.micro import left_by, litter, micro_config, micro_policy
from tests.faults.storage import fast_folder

PER_CHAIN = 4
"""Kills of one run at most."""


class Marks:
    """Counters that a child sets and that survive it: saves begun, saves finished, set up."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 24)

    def add(self, place: int) -> None:
        struct.pack_into("q", self._memory, 8 * place, self[place] + 1)

    def __getitem__(self, place: int) -> int:
        return struct.unpack_from("q", self._memory, 8 * place)[0]


BEGUN, FINISHED, SET_UP = range(3)


@dataclass
class Tally:
    """What happened."""

    kills: int = 0
    inside_saves: int = 0
    before_first_checkpoint: int = 0
    after_last_checkpoint: int = 0
    resumed: int = 0
    """Kills after which a later start was set up from what the kill had left."""
    runs: int = 0
    identical: int = 0
    """Runs whose files are byte for byte those of the undisturbed one."""
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


def kill_and_resume(root: Path, *, kills: int, seed: int) -> Tally:
    """At least `kills` SIGKILLs of runs below `root`; stops at the first failure."""
    began = time.monotonic()
    rng, tally = random.Random(seed), Tally()
    config = micro_config(micro_policy(root / "policy"), root, "run", eval__every=3)
    folder = root / "run"
    run.train(config)  # warms up
    shutil.rmtree(folder)
    began_once = time.monotonic()
    run.train(config)
    lasts = time.monotonic() - began_once
    expected = left_by(folder)
    while tally.kills < kills and not tally.failures:
        shutil.rmtree(folder)
        tally.runs += 1
        _chain(config, folder, rng, lasts, tally)
        if tally.failures:
            break
        found = left_by(folder)
        wrong = {name for name in {*found, *expected} if found.get(name) != expected.get(name)}
        wrong |= set(litter(folder))
        if wrong:
            tally.failures.append(f"run {tally.runs}: {sorted(wrong)}")
        else:
            tally.identical += 1
    tally.seconds = time.monotonic() - began
    return tally


def _chain(config: RunConfig, folder: Path, rng: random.Random, lasts: float, tally: Tally) -> None:
    """One run: killed up to `PER_CHAIN` times, then left to finish."""
    unresumed = 0
    for attempt in range(PER_CHAIN + 1):
        marks = Marks()
        pid = fork(lambda shared=marks: _train(config, shared))
        if attempt < PER_CHAIN:
            _wait(rng, marks, lasts, folder / f"checkpoints/step-{config.updates:08d}")
            os.kill(pid, signal.SIGKILL)  # a zombie at worst: it is not reaped yet
        _, status = os.waitpid(pid, 0)
        if marks[SET_UP]:
            tally.resumed += unresumed
            unresumed = 0
        if not os.WIFSIGNALED(status):
            if os.waitstatus_to_exitcode(status) != 0:
                tally.failures.append(f"run {tally.runs}: start {attempt} failed")
            return
        unresumed += 1
        tally.kills += 1
        tally.inside_saves += marks[BEGUN] > marks[FINISHED]
        tally.before_first_checkpoint += not list(folder.glob("checkpoints/step-*"))
        last = folder / f"checkpoints/step-{config.updates:08d}"
        tally.after_last_checkpoint += last.exists()


def _wait(rng: random.Random, marks: Marks, lasts: float, last: Path) -> None:
    """Until any instant, one inside or near a save, or one between the last save and the end."""
    kind, count = rng.random(), rng.randint(1, 3)
    deadline = time.monotonic() + max(1.0, lasts)  # also on a busy machine
    if kind < 0.3:
        time.sleep(rng.uniform(0, lasts))
    elif kind < 0.9:
        while marks[BEGUN] < count and time.monotonic() < deadline:
            time.sleep(0.0002)
        time.sleep(rng.uniform(0, 0.003))
    else:
        while not last.exists() and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.05))


class _SetUp(run.Observer):
    def __init__(self, marks: Marks) -> None:
        self.marks = marks

    def on_start(self, config: RunConfig, folder: Path, step: int) -> None:
        self.marks.add(SET_UP)


def _train(config: RunConfig, marks: Marks) -> None:
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
        counted = kill_and_resume(place, kills=int(sys.argv[1]), seed=int(sys.argv[2]))
    print(json.dumps(dataclasses.asdict(counted)))  # noqa: T201
