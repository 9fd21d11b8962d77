"""Kill single ranks of whole runs with SIGKILL at random instants, resume, compare what they leave.

One chain is one run by several ranks: started by torch's launcher as `hmpo train --ranks` does, a
rank of it killed, resumed, another killed, and at last left to finish. The launcher is a fork of
this process; the ranks are programs of their own, as a user's are: a launcher has threads by then,
and a fork of a process with threads may find a lock taken for ever. Half of the kills aim at a
checkpoint save; markers in shared memory prove which ones hit inside.

    python -m tests.faults.rank_kills KILLS SEED [CASE ...]      prints the tallies as JSON
    python -m tests.faults.rank_kills rank RANKS FOLDER          what the launcher starts
"""

import ctypes
import dataclasses
import faulthandler
import json
import logging
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from hmpo.config import RunConfig, to_dict
from hmpo.config.reading import run_config
from hmpo.errors import HmpoError
from hmpo.ranks.start import launch
from hmpo.run import files
from hmpo.run import loop as run
from tests.faults.kills import Counters, fork
from tests.faults.micro import everything, micro_config, micro_policy
from tests.faults.storage import fast_folder

PER_CHAIN = 8
"""Kills of one run at most."""
AT_ONCE = 4
"""Cases that go on side by side."""
TIMEOUT_S = 20.0
"""`distributed.timeout` of the runs."""
AFTER_S = 5.0
"""Seconds after it within which all of a killed run's processes must be gone."""
PR_SET_CHILD_SUBREAPER = 36
BEGUN, FINISHED, PIDS = range(3)
"""Places of what is counted: saves begun, saves finished; from PIDS on a process id for each rank.
"""
SETTINGS: dict[str, dict[str, Any]] = {
    "AdamW": {"checkpoint__every": 1},
    "Muon and a learnable p": {
        "optimizer__name": "muon",
        "objective__exponent__kind": "learnable",
        "objective__p": -0.5,
        "eval__every": 3,
    },
}
CASES = {f"{name}, {ranks} ranks": (name, ranks) for name in SETTINGS for ranks in (2, 4)}


@dataclass
class Tally:
    """What happened to the runs of one case."""

    kills: int = 0
    inside_saves: int = 0
    of_the_first_rank: int = 0
    before_first_checkpoint: int = 0
    named: int = 0
    """Kills after which the launcher's line named the rank; after the others one that was left
    alone told so. None showed a traceback."""
    runs: int = 0
    identical: int = 0
    """Runs all of whose files are those of the undisturbed one to the byte, but timing.jsonl and,
    of an older checkpoint that is kept, what is not weights: the ranks that were left alone may
    have saved it anew at a later instant of the same step."""
    ended_s: float = 0.0
    """Longest time from a kill until the launcher and all ranks were gone."""
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Undisturbed:
    """A case's run that nobody disturbed."""

    config: RunConfig
    ranks: int
    left: dict[str, bytes]
    lasts: float
    """Seconds from the first to the last of its ranks' process ids."""

    @property
    def folder(self) -> Path:
        return Path(self.config.out) / self.config.name


def campaign(
    root: Path, *, kills: int, seed: int, cases: Iterable[str] = CASES, until: float = float("inf")
) -> dict[str, Tally]:
    """`kills` SIGKILLs of ranks of each case, until the clock says `until`.

    Args:
        root: an empty folder, better in memory.
        kills: for each case; a case ends at its first failure.
        seed: of the instants.
        cases: names of `CASES`.
        until: value of `time.monotonic` after which no run is begun.
    """
    policy = micro_policy(root / "policy")

    def one(name: str) -> None:
        if sys.platform == "linux":  # what a killed run leaves behind becomes a child of this one
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        case, tally = _undisturbed(name, policy, root), Tally()
        while tally.kills < kills and not tally.failures and time.monotonic() < until:
            rng = random.Random(f"{seed}/{name}/{tally.runs}")
            _chain(case, rng, tally, min(PER_CHAIN, kills - tally.kills))
        (root / f"{name}.json").write_text(json.dumps(dataclasses.asdict(tally)))

    names = list(cases)
    for k in range(0, len(names), AT_ONCE):
        running = [fork(lambda name=name: one(name)) for name in names[k : k + AT_ONCE]]
        ended = [os.waitpid(pid, 0)[1] for pid in running]
        assert not any(ended), f"the campaign itself failed: {ended}"
    return {name: Tally(**json.loads((root / f"{name}.json").read_text())) for name in names}


def _undisturbed(name: str, policy: Path, root: Path) -> Undisturbed:
    settings, ranks = CASES[name]
    changes = SETTINGS[settings] | {"updates": 8, "distributed__timeout": TIMEOUT_S}
    config = micro_config(policy, root / name, **changes)
    folder = Path(config.out) / config.name
    place = root / name
    place.mkdir()
    (place / "config.json").write_text(json.dumps(to_dict(config)))
    marks = Counters(PIDS + ranks, place / "marks")
    pid = fork(lambda: _launch(ranks, place))
    _until(lambda: all(marks[PIDS + rank] for rank in range(ranks)), pid)
    began = time.monotonic()
    status = os.waitpid(pid, 0)[1]
    assert status == 0, f"{name}: {(place / 'log').read_text()[-3000:]}"
    return Undisturbed(config, ranks, everything(folder), time.monotonic() - began)


def _chain(case: Undisturbed, rng: random.Random, tally: Tally, kills: int) -> None:
    """One run: ranks of it killed up to `kills` times, then left to finish and compared."""
    shutil.rmtree(case.folder, ignore_errors=True)
    place = case.folder.parent
    log = place / "log"
    tally.runs += 1
    for attempt in range(kills + 1):
        (place / "marks").unlink()  # what a killed rank still has open is not this start's
        marks, rank = Counters(PIDS + case.ranks, place / "marks"), rng.randrange(case.ranks)
        pid = fork(lambda: _launch(case.ranks, place))
        began = None
        if attempt < kills:
            _wait(rng, marks, case, pid)
            with suppress(ProcessLookupError):
                if marks[PIDS + rank]:
                    os.kill(marks[PIDS + rank], signal.SIGKILL)
                    began = time.monotonic()
        inside = marks[BEGUN] > marks[FINISHED]
        code = _gone(pid, marks, case.ranks)
        if code is None:
            stacks = log.with_name("stacks").read_text(errors="replace")
            tally.failures.append(f"start {attempt}, rank {rank}: not gone in time: {stacks}")
            return
        if code == 0:
            break
        text = log.read_text(errors="replace")
        if began is None:
            tally.failures.append(f"start {attempt} failed by itself: {text[-500:]}")
            return
        tally.kills += 1
        tally.ended_s = max(tally.ended_s, round(time.monotonic() - began, 3))
        tally.inside_saves += inside
        tally.of_the_first_rank += rank == 0
        tally.before_first_checkpoint += not list(case.folder.glob("checkpoints/step-*"))
        named = f"hmpo: rank {rank} was ended by signal 9" in text and code == 128 + signal.SIGKILL
        tally.named += named
        left_alone = code == 2 and "another one has ended" in text
        if not (named or left_alone) or "Traceback" in text or text.count("was ended by") > 1:
            tally.failures.append(f"exit code {code}, rank {rank} killed: {text[-500:]}")
    found, last = everything(case.folder), f"checkpoints/step-{case.config.updates:08d}/"
    kept = ("model.safetensors", "optimizer.safetensors")
    wrong = [
        name
        for name in sorted({*found, *case.left})
        if found.get(name) != case.left.get(name)
        and (not name.startswith("checkpoints/") or name.startswith(last) or name.endswith(kept))
    ]
    tally.failures += [f"other bytes or litter: {', '.join(wrong)}"] if wrong else []
    tally.identical += not wrong


def _wait(rng: random.Random, marks: Counters, case: Undisturbed, pid: int) -> None:
    """Until any instant after all ranks have begun, or one inside or near a save."""
    _until(lambda: all(marks[PIDS + rank] for rank in range(case.ranks)), pid)
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0, case.lasts))
        return
    count = rng.randint(1, 6)
    _until(lambda: marks[BEGUN] >= count, pid)
    time.sleep(rng.uniform(0, 0.003))


def _until(happened: Callable[[], bool], pid: int) -> None:
    """Wait until something has happened, but no longer than a child lives."""
    while not happened():
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.0005)


def _gone(pid: int, marks: Counters, ranks: int) -> int | None:
    """The launcher's exit code once it and all ranks are gone; None where they stay too long."""
    deadline = time.monotonic() + TIMEOUT_S + AFTER_S
    kept = marks[PIDS] == 0  # a start that is not to be killed may take as long as it does
    code = None
    while time.monotonic() < deadline or (kept and code is None):
        with suppress(ChildProcessError):
            done, status = os.waitpid(-1, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if done == pid else code
        if code is not None and not any(_lives(marks[PIDS + rank]) for rank in range(ranks)):
            return code
        time.sleep(0.001)
    for rank in range(ranks):  # where they are, for the record
        with suppress(ProcessLookupError):
            if marks[PIDS + rank]:
                os.kill(marks[PIDS + rank], signal.SIGUSR1)
    time.sleep(2)
    for victim in filter(None, (pid, *(marks[PIDS + rank] for rank in range(ranks)))):
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    return None


def _lives(pid: int) -> bool:
    if not pid:  # it has not begun
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _launch(ranks: int, place: Path) -> None:
    """In a child: torch's launcher, whose output goes to a file."""
    out = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for fd in (1, 2):
        os.dup2(out, fd)
    (place / "stacks").write_text("")
    program = ("-W", "ignore", "-m", __spec__.name, "rank", str(ranks), str(place))
    code = launch(sys.executable, program, ranks)
    sys.stderr.flush()
    os._exit(code)


def _rank(ranks: int, place: Path) -> None:
    """A program that the launcher started: start or resume, marking every save's begin and end."""
    faulthandler.register(signal.SIGUSR1, file=(place / "stacks").open("a"), all_threads=True)
    marks = Counters(PIDS + ranks, place / "marks")
    marks[PIDS + int(os.environ["RANK"])] = os.getpid()
    logging.disable(logging.WARNING)  # of stale locks, which are the point here
    save = files.save_checkpoint

    def marked(*args: Any, **keywords: Any) -> Path:
        marks.add(BEGUN)
        path = save(*args, **keywords)
        marks.add(FINISHED)
        return path

    files.save_checkpoint = marked
    try:
        run.train(
            run_config(json.loads((place / "config.json").read_text())), resume=True, exist_ok=True
        )
    except HmpoError as error:  # as the command line tells it
        sys.stderr.write(f"hmpo: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "rank":
        sys.exit(_rank(int(sys.argv[2]), Path(sys.argv[3])))
    with fast_folder() as place:
        counted = campaign(
            place, kills=int(sys.argv[1]), seed=int(sys.argv[2]), cases=sys.argv[3:] or CASES
        )
    print(json.dumps({name: dataclasses.asdict(tally) for name, tally in counted.items()}))  # noqa: T201
