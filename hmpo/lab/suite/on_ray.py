"""The runs of a suite as tasks of Ray, where one machine is not enough.

Ray places them, retries them and finds the machines. A task makes one run in a folder of its own
and gives back the files, which are written here into the suite's one folder.
"""

import contextlib
import dataclasses
import importlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from hmpo.errors import ConfigError, MissingDependencyError, RunFolderError
from hmpo.lab.suite.execute import execute
from hmpo.lab.suite.folder import SuiteFolder
from hmpo.lab.suite.job import Job, conclude
from hmpo.lab.suite.pool import MOST_DEATHS, TICK_S, Maker
from hmpo.lab.suite.watch import Watcher

Files = dict[str, bytes]
"""A run folder: bytes by path in it."""
INCOMING = ".incoming-"


def on_ray(address: str) -> Maker:
    """Makes runs on a cluster of Ray.

    Args:
        address: `ray` starts one on this machine, or takes that of RAY_ADDRESS; `ray://HOST:PORT`
            is a cluster's client server.

    Raises:
        ConfigError: another address.
        MissingDependencyError: Ray is not installed.
    """
    if address != "ray" and not address.startswith("ray://"):
        raise ConfigError(f"--on: got {address!r}, expected ray or ray://HOST:PORT")
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise MissingDependencyError(
            f"--on {address}: needs Ray: pip install 'hmpo[ray]'"
        ) from None

    def make(
        place: SuiteFolder, runs: list[Job], watcher: Watcher, stopped: Callable[[], int | None]
    ) -> str:
        with _connected(ray, address):
            return _Tasks(ray, place, watcher, stopped).go(runs)

    return make


@contextlib.contextmanager
def _connected(ray: Any, address: str) -> Any:
    """A connection to the cluster, which ends with the suite."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
    own = {} if address == "ray" else {"address": address}
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", **own)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        said = " ".join(str(error).split())[:300]
        raise ConfigError(f"--on {address}: no connection ({said}); is the cluster up?") from None
    try:
        yield
    finally:
        ray.shutdown()


class _Tasks:
    """The runs as tasks, and what comes back."""

    def __init__(
        self, ray: Any, place: SuiteFolder, watcher: Watcher, stopped: Callable[[], int | None]
    ) -> None:
        self.ray, self.place, self.watcher, self.stopped = ray, place, watcher, stopped
        self.problem = ""

    def go(self, runs: list[Job]) -> str:
        """Make all runs; returns why that could not be, or ""."""
        for left in self.place.path.glob(f"runs/*/{INCOMING}*"):
            shutil.rmtree(left)
        task = self.ray.remote(packed_run)
        pending: dict[Any, Job] = {}
        for job in runs:
            self.place.note("started", job.cell, job.seed, on="ray")
            placed = task.options(
                num_cpus=max(1, job.config["threads"]),
                num_gpus=int(job.config["device"].startswith("cuda")),
                max_retries=MOST_DEATHS - 1,
            )
            pending[placed.remote(job.plain())] = job
        while pending and self.stopped() is None and not self.problem:
            ready, _ = self.ray.wait(list(pending), num_returns=1, timeout=TICK_S)
            for reference in ready:
                self._take(reference, pending.pop(reference))
            if self.place.lock is not None:
                self.place.lock.beat()
            self.watcher.on_tick()
        for reference in pending:
            self.ray.cancel(reference, force=True)
        return self.problem

    def _take(self, reference: Any, job: Job) -> None:
        """Write what a task gave back into the suite's folder."""
        errors = self.ray.exceptions
        died = errors.WorkerCrashedError  # a lost machine or one without memory says nothing
        try:
            ended, files = self.ray.get(reference)
        except died as error:
            ended = self._given_up(job, type(error).__name__)
        except errors.RayError as error:
            said = " ".join(str(error).split())[-300:]
            self.problem = f"cell {job.cell}, seed {job.seed}: {said}"
            return
        else:
            if ended["status"] in ("impossible", "interrupted"):
                why = ended["reason"] or "a signal"
                self.problem = f"cell {job.cell}, seed {job.seed}: on a machine of Ray: {why}"
                return
            unpack(files, Path(job.folder))
        about = {name: ended[name] for name in ("status", "reason") if ended.get(name)}
        self.place.note("ended", job.cell, job.seed, on="ray", **about)
        self.watcher.on_run(job.cell, job.seed, {"event": "ended", **ended})

    def _given_up(self, job: Job, how: str) -> dict[str, Any]:
        """A run whose process died each time that Ray tried it."""
        from hmpo.config.reading import run_config

        reason = f"its process died {MOST_DEATHS} times on Ray ({how})"
        Path(job.folder).mkdir(parents=True, exist_ok=True)
        conclude(job, run_config(job.config), reason, None)
        return {"status": "failed", "reason": reason}


def packed_run(plain: Mapping[str, Any]) -> tuple[dict[str, Any], Files]:
    """One run in a folder that is thrown away: how it ended, and its files.

    Args:
        plain: a `Job` as plain values.
    """
    with TemporaryDirectory(prefix="hmpo-run-") as name:
        folder = Path(name) / str(plain["seed"])
        job = dataclasses.replace(
            Job(**plain), folder=str(folder), config=plain["config"] | {"out": name}
        )
        began = time.perf_counter()
        ended = execute(job, lambda message: None)
        return ended | {"seconds": time.perf_counter() - began}, pack(folder)


def pack(folder: Path) -> Files:
    """All regular files below a folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def unpack(files: Files, folder: Path) -> None:
    """Write a packed folder, whole or not at all, in place of what was there.

    Raises:
        RunFolderError: a path in it leads elsewhere.
    """
    aside = folder.with_name(f"{INCOMING}{folder.name}-{os.getpid()}")
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise RunFolderError(f"{folder}: got a file {name[:100]!r}, expected one inside of it")
    if aside.exists():
        shutil.rmtree(aside)
    for name, data in files.items():
        path = aside / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)
