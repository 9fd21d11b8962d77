"""A child process for reward functions, so that a time limit can be enforced.

Alarms and threads cannot stop a function that hangs in C code or ignores signals; SIGKILL can.
The child is a fork (any callable works, closures too), lives for many calls and is replaced
after a kill. Requests and replies are JSON, each behind its length in 8 bytes: no pickle.
All that it starts ends with it, and it ends with the parent, however that went
(`hmpo.rewards.guard`). Its random numbers are seeded anew before each call, so that what a function
draws does not depend on how many calls the child has served. Locks and thread pools of the parent
do not survive a fork, so the child runs torch, if it is loaded at all, on one thread.
"""

import ctypes
import gc
import json
import os
import random
import signal
import socket
import struct
import sys
import time
import weakref
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

from hmpo.rewards.guard import Guarded
from hmpo.rewards.host import RewardTrainerState
from hmpo.rewards.values import (
    EventLoop,
    Fault,
    Outcome,
    RewardFn,
    UsageError,
    call_reward,
    failed,
    one_line,
)

HEADER = struct.Struct("!Q")
PR_SET_PDEATHSIG = 1
GONE = (EOFError, ConnectionError)


class Worker:
    """Runs reward functions by name in a child process that can be killed."""

    def __init__(self, functions: Mapping[str, RewardFn]) -> None:
        if sys.platform == "win32":
            raise UsageError(
                "reward timeout: needs os.fork, which Windows lacks; set it to None there"
            )
        self._functions = dict(functions)
        self._child: _Child | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the child, None while there is none."""
        return self._child.pid if self._child else None

    def call(
        self,
        name: str,
        arguments: Mapping[str, Any],
        count: int,
        seconds: float,
        seed: int = 0,
        *,
        asked: Collection[str] = (),
        state: RewardTrainerState | None = None,
    ) -> Outcome:
        """Outcome of function `name`; a time-out or a crash is a fault like any other.

        Args:
            name: key of the function.
            arguments: its keyword arguments, JSON-able.
            count: number of samples.
            seconds: limit on the wall time, from the moment the child runs.
            seed: of the random numbers that the function may draw.
            asked: names of `host.SUPPLIED` that the function takes.
            state: how far the training is.

        Raises:
            UsageError: an argument is not JSON-able.
        """
        request = {"name": name, "count": count, "seed": seed, "arguments": dict(arguments)}
        request |= {"asked": list(asked), "state": None if state is None else vars(state)}
        message = _encode(request)
        if self._child is None or not self._child.is_idle():
            self.close()
            self._child = _Child(self._functions)
        deadline = time.monotonic() + seconds
        try:
            self._child.send(message, deadline)
            reply = json.loads(self._child.receive(deadline))
        except TimeoutError:
            self.close()
            detail = f"no answer in {seconds:g} s, killed; raise reward_timeout or fix the function"
            return failed("reward_timeout", detail, count)
        except GONE:
            status = self.close()
            detail = f"its process ended ({_ending(status)}), expected a list of {count} numbers"
            return failed("reward_crash", f"{detail}; fix the function", count)
        except BaseException:
            self.close()  # an interrupted exchange cannot be taken up again
            raise
        if "usage" in reply:
            raise UsageError(reply["usage"])
        faults = [Fault(**item) for item in reply.pop("faults")]
        return Outcome(faults=faults, **reply)

    def close(self) -> int:
        """Kill the child and all that it started; returns its wait status (0: none)."""
        child, self._child = self._child, None
        return child.kill() if child else 0


class _Child:
    """One forked process and the socket to it."""

    def __init__(self, functions: Mapping[str, RewardFn]) -> None:
        self.socket, other = socket.socketpair()
        prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

        def work(guard: int) -> None:
            self.socket.close()
            _serve(other, functions, guard, prctl)

        guarded = Guarded(work, other)
        self.pid = guarded.pid
        self._kill = weakref.finalize(self, _end, guarded, self.socket)

    def is_idle(self) -> bool:
        """True if the child is alive and has nothing unread to say."""
        self.socket.setblocking(False)
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        return False

    def send(self, data: bytes, deadline: float) -> None:
        """Send all of `data` before the deadline (a time.monotonic() value)."""
        self.socket.settimeout(_left(deadline))
        self.socket.sendall(data)

    def receive(self, deadline: float) -> bytes:
        """The next message; TimeoutError past the deadline."""
        return _read_message(self.socket, deadline)

    def kill(self) -> int:
        """Kill the child and all that it started; returns its wait status."""
        return self._kill() or 0


def _end(guarded: Guarded, connection: socket.socket) -> int:
    """End a child, in the process that started it only."""
    connection.close()
    return guarded.end()


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _read_message(connection: socket.socket, deadline: float | None = None) -> bytes:
    """One message: its length in 8 bytes, then so many bytes; EOFError at the end."""
    (length,) = HEADER.unpack(_read_exactly(connection, HEADER.size, deadline))
    return _read_exactly(connection, length, deadline)


def _read_exactly(connection: socket.socket, length: int, deadline: float | None) -> bytes:
    data = bytearray()
    while len(data) < length:
        if deadline is not None:
            connection.settimeout(_left(deadline))
        chunk = connection.recv(min(length - len(data), 1 << 20))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


def _ending(status: int) -> str:
    """How a process ended, from its wait status."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        names = {item.value: item.name for item in signal.Signals}
        return names.get(number, f"signal {number}")
    return f"exit status {os.WEXITSTATUS(status)}"


def _serve(connection: socket.socket, functions: Mapping[str, RewardFn], guard: int, prctl) -> None:
    """The child's life: answer requests until the parent closes the connection."""
    with suppress(OSError):
        os.setpgid(0, 0)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:  # it died before the call above
            return
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    gc.freeze()  # what the parent left behind is not the child's to finalize
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
    loop = EventLoop()
    connection.settimeout(None)
    while True:
        try:
            request = json.loads(_read_message(connection))
        except GONE:
            os._exit(0)
        _seed(request["seed"])
        function = functions[request["name"]]
        reply = _answer(function, request, loop)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                with suppress(OSError, ValueError):  # nobody reads it any more
                    stream.flush()
        connection.sendall(_encode(reply, default=repr))


def _seed(seed: int) -> None:
    """Seed the global random numbers of Python and of the libraries that are loaded."""
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed % 2**32)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)


def _answer(function: RewardFn, request: dict[str, Any], loop: EventLoop) -> dict[str, Any]:
    """The outcome of one call, as JSON-ready values."""
    state = None if request["state"] is None else RewardTrainerState(**request["state"])
    try:
        outcome = call_reward(
            function,
            request["arguments"],
            request["count"],
            loop,
            asked=request["asked"],
            state=state,
        )
    except UsageError as error:
        return {"usage": str(error)}
    return {
        "values": outcome.values,
        "faults": [vars(fault) for fault in outcome.faults],
        "metrics": outcome.metrics,
        "extras": outcome.extras,
    }


def _encode(message: dict[str, Any], default: Callable[[Any], str] | None = None) -> bytes:
    """A message as JSON behind its length; `default` stands for what JSON has no form for."""
    try:
        data = json.dumps(message, default=default).encode()
    except (TypeError, ValueError) as error:
        for name, values in message["arguments"].items():
            try:
                json.dumps(values)
            except (TypeError, ValueError):
                raise UsageError(
                    f"{name!r} cannot be passed to the process of a time-limited reward "
                    f"({one_line(error)}), expected JSON-able values; convert it, or unset timeout"
                ) from None
        raise
    return HEADER.pack(len(data)) + data
