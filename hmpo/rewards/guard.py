"""A child process that leaves nothing behind: a guard between it and us ends all that it started.

A reward function may start processes of its own, also in sessions of theirs, which no signal to the
child's group reaches. The guard is their reaper (Linux): whatever the child starts stays below it.
It waits until it is told to end, until the child ends, or until we are gone, however we went, and
then kills everything below it. It runs no code but this file's.
"""

import ctypes
import gc
import os
import select
import signal
import socket
import struct
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
POLL = 0.25
"""Seconds between two looks at whether our process is still there."""
PATIENCE = 5.0
"""Seconds after which a process that cannot be killed is given up."""
NUMBER = struct.Struct("!q")


class Guarded:
    """One forked process behind its guard."""

    def __init__(self, work: Callable[[int], None], mine: socket.socket) -> None:
        """Fork.

        Args:
            work: what the child does, given the guard's pid; the child ends with it.
            mine: the child's end of a connection, which no one else may hold open.
        """
        self.control, inside = socket.socketpair()
        prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                with suppress(OSError, ValueError):  # nobody reads it any more
                    stream.flush()  # else the child would print the rest a second time
        self.owner = os.getpid()
        with warnings.catch_warnings():
            # Python >= 3.12 warns of forks beside threads; the worker's docstring says why it holds
            warnings.simplefilter("ignore", DeprecationWarning)
            self.guard = os.fork()
        if self.guard == 0:
            try:
                self.control.close()
                _watch(inside, work, mine, self.owner, prctl)
            finally:
                os._exit(1)
        inside.close()
        mine.close()
        (self.pid,) = NUMBER.unpack(self.control.recv(NUMBER.size))

    def end(self) -> int:
        """Kill the child and all below it; returns the child's wait status."""
        if os.getpid() != self.owner:
            self.control.close()
            return 0
        status = 0
        with suppress(OSError, struct.error):
            self.control.sendall(b"!")
            self.control.settimeout(2 * PATIENCE)
            (status,) = NUMBER.unpack(self.control.recv(NUMBER.size))
        self.control.close()
        with suppress(ProcessLookupError):
            os.kill(self.guard, signal.SIGKILL)  # done, or past all patience
        with suppress(ChildProcessError):  # reaped by someone else
            os.waitpid(self.guard, 0)
        return status


def _watch(
    control: socket.socket,
    work: Callable[[int], None],
    mine: socket.socket,
    owner: int,
    prctl: Callable[..., int] | None,
) -> None:
    """The guard's life."""
    with suppress(OSError):
        os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    gc.freeze()  # what our process left behind is not the guard's to finalize
    if prctl is not None:
        prctl(PR_SET_CHILD_SUBREAPER, 1)
    guard = os.getpid()
    worker = os.fork()
    if worker == 0:
        control.close()
        work(guard)
        os._exit(0)
    mine.close()
    control.sendall(NUMBER.pack(worker))
    status = None
    while status is None and os.getppid() == owner:
        if select.select([control], [], [], POLL)[0]:
            break
        pid, ended = os.waitpid(worker, os.WNOHANG)
        status = ended if pid else None
    found = _end_all(worker)
    with suppress(OSError):
        control.sendall(NUMBER.pack(found if status is None else status))


def _end_all(worker: int) -> int:
    """Kill all processes below this one, `worker`'s group first; returns its wait status."""
    status, deadline = 0, time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with suppress(ProcessLookupError, PermissionError):  # the group may be gone
            os.killpg(worker, signal.SIGKILL)
        for pid in [worker, *_below(os.getpid())]:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == worker:
                    status = ended[1]
        except ChildProcessError:  # none is left
            return status
        time.sleep(0.002)
    return status


def _below(root: int) -> list[int]:
    """Pids of all processes below `root`, where there is a /proc."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            parents[int(entry.parent.name)] = int(entry.read_text().rsplit(")", 1)[1].split()[1])
    found, rest = [], [root]
    while rest:
        above = rest.pop()
        children = [pid for pid, parent in parents.items() if parent == above]
        found += children
        rest += children
    return found
