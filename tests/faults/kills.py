"""Run a function in a forked child, kill -9 it at a random instant, see what it had done.

Fork after the heavy imports: a child starts in a millisecond. The child reports through shared
memory, which survives it.
"""

import mmap
import os
import random
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class Counters:
    """Counters that a child counts up and that survive it; in a file, any process that opens it."""

    def __init__(self, count: int, file: Path | None = None) -> None:
        if file is None:
            self._memory = mmap.mmap(-1, 8 * count)
            return
        with file.open("r+b" if file.exists() else "w+b") as opened:
            opened.truncate(8 * count)
            self._memory = mmap.mmap(opened.fileno(), 8 * count)

    def add(self, place: int) -> None:
        self[place] = self[place] + 1

    def __getitem__(self, place: int) -> int:
        return struct.unpack_from("q", self._memory, 8 * place)[0]

    def __setitem__(self, place: int, value: int) -> None:
        struct.pack_into("q", self._memory, 8 * place, value)


class Progress:
    """Two counters shared with the child: saves begun and saves finished."""

    def __init__(self) -> None:
        self._counters = Counters(2)

    @property
    def begun(self) -> int:
        return self._counters[0]

    @begun.setter
    def begun(self, value: int) -> None:
        self._counters[0] = value

    @property
    def finished(self) -> int:
        return self._counters[1]

    @finished.setter
    def finished(self, value: int) -> None:
        self._counters[1] = value


@dataclass(frozen=True)
class Kill:
    begun: int
    finished: int

    @property
    def inside(self) -> bool:
        """True if the kill hit between the begin and the end of a save."""
        return self.begun > self.finished


def fork(body: Callable[[], None]) -> int:
    """Run `body` in a child that ends with status 0, or 1 if it raised; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        body()
        status = 0
    finally:
        os._exit(status)


def kill_at_random(
    body: Callable[[Progress], None], rng: random.Random, *, longest_s: float, progress: Progress
) -> Kill:
    """Fork `body`, SIGKILL it once it has begun a save and up to `longest_s` more have passed."""
    progress.begun = progress.finished = 0
    pid = fork(lambda: body(progress))
    deadline = time.monotonic() + 10
    while progress.begun == 0 and time.monotonic() < deadline:
        time.sleep(0.0002)
    time.sleep(rng.uniform(0, longest_s))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), f"the child ended by itself with status {status}"
    return Kill(progress.begun, progress.finished)
