"""Worker processes: each makes run after run, and one that dies is replaced.

The parent does nothing but hand out runs and listen, so that nothing depends on it: whatever is
killed, run folders are what counts.
"""

import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import hmpo
from hmpo.errors import HmpoError
from hmpo.lab.suite.folder import Deaths, Key, SuiteFolder
from hmpo.lab.suite.job import Job
from hmpo.lab.suite.watch import Watcher
from hmpo.lab.suite.worker import CLOSE

MOST_DEATHS = 3
"""Deaths of a run's process in a row, without an update more than before, that are its outcome."""
Maker = Callable[[SuiteFolder, list[Job], Watcher, Callable[[], int | None]], str]
"""Makes runs, until the last argument gives a signal; returns why it could not go on, or ""."""
BOOT = """if True:
    import sys
    sys.path.insert(0, sys.argv[1])
    import hmpo
    del sys.path[0]
    from hmpo.lab.suite.worker import main
    sys.exit(main())
"""
"""What a worker runs: the hmpo of its parent, wherever that is, and nothing else from there."""
LOG = "workers.log"
TICK_S = 0.25


class WorkerError(HmpoError, RuntimeError):
    """Workers cannot be started."""


class Worker:
    """One process, and the run it is at."""

    def __init__(self, heard: "queue.SimpleQueue[Any]", log: IO[bytes], device: int | None) -> None:
        environment = dict(os.environ)
        for name, value in (("OMP_WAIT_POLICY", "PASSIVE"), ("TOKENIZERS_PARALLELISM", "false")):
            environment.setdefault(name, value)
        if device is not None:
            own = environment.get("CUDA_VISIBLE_DEVICES")  # device counts those that we may see
            environment["CUDA_VISIBLE_DEVICES"] = own.split(",")[device] if own else str(device)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", BOOT, str(Path(hmpo.__file__).parents[1])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C goes to the parent, which passes it on
        )
        self.device = device
        self.job: Job | None = None
        self.step = -1
        """Updates of its run that are done; -1 before it is set up."""
        self.ready = False
        self.over = False
        """Whether it said that it would end."""
        threading.Thread(target=self._read, args=(heard,), daemon=True).start()

    def _read(self, heard: "queue.SimpleQueue[Any]") -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            heard.put((self, json.loads(line)))
        heard.put((self, None))

    def give(self, job: Job) -> None:
        """Let it make a run."""
        self.job, self.step = job, -1
        self._send(job.plain())

    def close(self) -> None:
        """Let it end when it has nothing to do."""
        self._send(CLOSE)

    def _send(self, message: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write((json.dumps(message) + "\n").encode())
            self.process.stdin.flush()
        except OSError:  # it is dead, which `heard` will tell
            return

    def bury(self) -> int:
        """Wait for its end; returns its exit code, negative for a signal."""
        code = self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:  # what could not be sent to it
                    continue
        return code


class Pool:
    """Makes runs in several processes.

    Args:
        place: the suite's folder, opened.
        jobs: processes at once.
        gpus: graphics cards to spread them over; 0 leaves that to each run.
        watcher: told of everything.
        stopped: gives the signal that asked for the end, or None.
    """

    def __init__(
        self,
        place: SuiteFolder,
        *,
        jobs: int,
        gpus: int,
        watcher: Watcher,
        stopped: Callable[[], int | None],
    ) -> None:
        self.place, self.jobs, self.gpus = place, jobs, gpus
        self.watcher, self.stopped = watcher, stopped
        self.heard: queue.SimpleQueue[tuple[Worker, dict[str, Any] | None]] = queue.SimpleQueue()
        self.workers: list[Worker] = []
        self.deaths = place.deaths()
        self.stillborn = 0
        self.problem = ""
        self._asked = False

    def go(self, runs: Sequence[Job]) -> str:
        """Make all runs, or as many as can be made before a signal comes.

        Returns:
            Why it could not go on; "" where it could.

        Raises:
            WorkerError: no worker can be started.
        """
        waiting = deque(runs)
        with (self.place.path / LOG).open("ab") as log:
            try:
                while self._goes_on(waiting):
                    self._hand_out(waiting, log)
                    self._listen(waiting)
                    if self.place.lock is not None:
                        self.place.lock.beat()
                    self.watcher.on_tick()
            finally:
                self._end()
        return self.problem

    def _goes_on(self, waiting: deque[Job]) -> bool:
        if self.stopped() is not None or self.problem:
            waiting.clear()
            if not self._asked:
                self._asked = True
                for worker in self.workers:
                    if worker.job is not None:
                        worker.process.terminate()
        return bool(waiting) or any(worker.job is not None for worker in self.workers)

    def _hand_out(self, waiting: deque[Job], log: IO[bytes]) -> None:
        """A run for each worker that has none, and a worker for each run as far as `jobs` go."""
        idle = [worker for worker in self.workers if worker.job is None and not worker.over]
        while waiting and (idle or len(self.workers) < self.jobs):
            worker = idle.pop(0) if idle else self._new_worker(log)
            job = waiting.popleft()
            died = self.deaths.get((job.cell, job.seed), Deaths())
            if died.count >= MOST_DEATHS and not job.failure:
                job = dataclasses.replace(job, failure=_died_of(died))
            worker.give(job)
            self.place.note(
                "started",
                job.cell,
                job.seed,
                pid=worker.process.pid,
                exploratory=self.place.is_exploratory(job.cell, job.seed),
            )

    def _new_worker(self, log: IO[bytes]) -> Worker:
        taken = [worker.device for worker in self.workers]
        devices = range(self.gpus)
        device = min(devices, key=taken.count) if self.gpus else None
        worker = Worker(self.heard, log, device)
        self.workers.append(worker)
        return worker

    def _listen(self, waiting: deque[Job]) -> None:
        """Take in what the workers have said, for at most a moment."""
        until = time.monotonic() + TICK_S
        while (left := until - time.monotonic()) > 0:
            try:
                worker, message = self.heard.get(timeout=left)
            except queue.Empty:
                return
            if message is None:
                self._gone(worker, waiting)
            else:
                job = worker.job
                self._said(worker, message)
                stopping = self.stopped() is not None or bool(self.problem)
                if message.get("status") == "interrupted" and job is not None and not stopping:
                    waiting.appendleft(job)  # somebody sent that process a signal, not the suite
            if worker.job is None:
                return

    def _said(self, worker: Worker, message: dict[str, Any]) -> None:
        job = worker.job
        if message["event"] == "ready":
            worker.ready, self.stillborn = True, 0
            return
        assert job is not None, "a worker speaks of the run it was given"
        worker.step = message.get("step", worker.step)
        if message["event"] == "ended":
            worker.job = None
            worker.over = message["raised"] or message["status"] == "interrupted"
            about = {name: message[name] for name in ("status", "reason") if message.get(name)}
            self.place.note("ended", job.cell, job.seed, **about)
            if message["status"] == "impossible":
                self.problem = f"cell {job.cell}, seed {job.seed}: {message['reason']}"
        self.watcher.on_run(job.cell, job.seed, message)

    def _gone(self, worker: Worker, waiting: deque[Job]) -> None:
        """A worker has ended: by itself, or it died in the midst of a run, which is taken up."""
        code = worker.bury()
        self.workers.remove(worker)
        job, worker.job = worker.job, None
        if not worker.ready and self.stopped() is None:
            self.stillborn += 1
            if self.stillborn >= MOST_DEATHS:
                raise WorkerError(
                    f"worker processes end before their first run ({_ending(code)}); see "
                    f"{self.place.path / LOG}"
                )
        if job is None:
            return
        if worker.ready and self.stopped() is None:
            key: Key = (job.cell, job.seed)
            self.deaths[key] = self.deaths.get(key, Deaths()).then(worker.step)
            how = _ending(code)
            self.place.note("died", job.cell, job.seed, step=worker.step, how=how)
            self.watcher.on_run(job.cell, job.seed, {"event": "died", "how": how})
        waiting.appendleft(job)

    def _end(self) -> None:
        """Let all workers end; those that are at a run have been asked already, or die."""
        for worker in self.workers:
            if worker.job is None:
                worker.close()
            else:
                worker.process.kill()
        for worker in self.workers:
            try:
                worker.process.wait(10)
            except subprocess.TimeoutExpired:
                worker.process.kill()
            worker.bury()
        self.workers.clear()


def _died_of(died: Deaths) -> str:
    """The reason of a run that is given up."""
    when = "before its first update" if died.step < 1 else f"after {died.step} updates"
    return f"its process died {died.count} times {when}"


def _ending(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
