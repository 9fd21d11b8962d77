"""The reward `math`: equality of mathematical answers, by math-verify in a child process.

math-verify ends what takes too long by signals, which only a main thread can take, which cancel the
caller's own alarms, and which nothing hears inside of C code (a power of a power of a power). Here
a child compares, and is killed and replaced when it takes too long: in any thread, in the reward
worker, in a notebook.
"""

import json
import os
import subprocess
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from hmpo.errors import RewardError, require, require_installed
from hmpo.rewards.library.base import (
    LibraryReward,
    answers_of,
    is_missing,
    rebuilt,
    require_column,
)
from hmpo.rewards.library.children import same_imports, script

TAIL = 20_000
"""Characters of a completion's end that are read."""
START = 120.0
"""Seconds that the child may take to import sympy."""


def math(*, column: str = "answer", timeout: float = 5.0) -> "MathReward":
    r"""1 where the answer that the completion gives equals the expected one, else 0.

    r = [verify(parse(answer), parse(completion))] of math-verify (Kydlicek, 2025): the last boxed,
    announced or other expression, as LaTeX or plain, compared as sympy values: 1/2, 0.5 and
    \frac{1}{2} are equal, and so are intervals, sets and equations. An answer without `$` or
    `\boxed` is taken as mathematics whole. None where the answer cannot be read. What takes longer
    than `timeout` is 0 and counted as `math/timeouts`. The last 20 000 characters are read. Needs
    `pip install 'hmpo[rewards]'`.

    Args:
        column: holds the answer, or a list of accepted ones.
        timeout: seconds for one comparison.
    """
    require_installed("math_verify", "reward math", "rewards")
    require_column("math", column)
    require(0 < timeout <= 3600, "reward math.timeout", timeout, "seconds in (0, 3600]")
    return MathReward(column, timeout)


class MathReward(LibraryReward):
    """`math`: see there. One child serves all calls of this process."""

    def __init__(self, column: str, timeout: float) -> None:
        super().__init__("math", (column,), takes=("log_metric",))
        self.of_column = column
        self.timeout = timeout
        self.child = Child()

    def __reduce__(self) -> tuple[Any, ...]:
        given = {"column": self.of_column, "timeout": self.timeout}
        return rebuilt, (type(self), self.__name__, given)

    def prepare(self) -> None:
        """Start the child, so that a package that cannot be imported shows at once."""
        self.child.compare("1", "1", START)

    def __call__(
        self,
        /,
        completions: Sequence[Any],
        log_metric: Callable[..., Any] | None = None,
        prompts: Any = None,
        **columns: Any,
    ) -> list[float | None]:
        """A reward for each completion."""
        texts = self.texts(completions)
        values = self.column(self.of_column, columns, len(texts))
        late, known = 0, {}
        rewards: list[float | None] = []
        for text, value in zip(texts, values):
            found: list[bool | None] = []
            for answer in [] if is_missing(value) else answers_of(value):
                pair = (text[-TAIL:], answer)
                if pair not in known:
                    known[pair], in_time = self.child.compare(*pair, self.timeout)
                    late += not in_time
                found.append(known[pair])
            readable = [one for one in found if one is not None]
            rewards.append(float(any(readable)) if readable else None)
        if log_metric is not None:
            log_metric(f"{self.__name__}/timeouts", late)
        return rewards


class Child:
    """The process that compares; started when it is needed, in this process after a fork too."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = 0
        self._process: subprocess.Popen[str] | None = None

    def compare(self, text: str, answer: str, seconds: float) -> tuple[bool | None, bool]:
        """(equal, or None where the answer cannot be read; whether it was in time).

        Raises:
            RewardError: the child cannot be started.
        """
        if self._owner != os.getpid():  # a fork's lock may be held by a thread that is not there
            self._lock, self._owner, self._process = threading.Lock(), os.getpid(), None
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._started()
            request = {"text": _encodable(text), "answer": _encodable(answer), "seconds": seconds}
            reply = self._exchange(self._process, json.dumps(request), seconds)
            if not reply:  # killed, or out of memory
                self._drop()
                return False, False
            return json.loads(reply)["equal"], True

    def _started(self) -> "subprocess.Popen[str]":
        """A child that is ready."""
        process = subprocess.Popen(
            script("algebra_child"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=same_imports(),
            text=True,
            encoding="utf-8",
        )
        self._end = weakref.finalize(self, _end, process, os.getpid())
        if self._exchange(process, "", START) != "ready\n":
            self._drop()
            raise RewardError(
                "reward math: its process ended while it started; try `import math_verify`"
            )
        return process

    def _drop(self) -> None:
        """End the child; the next comparison starts another."""
        self._process = None
        self._end()

    def _exchange(self, process: "subprocess.Popen[str]", line: str, seconds: float) -> str:
        """The child's reply to a line; empty where it was killed for taking longer."""
        sent, received = _pipes(process)
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        watch = threading.Timer(seconds, stop)
        watch.daemon = True
        try:
            watch.start()
            try:
                if line:
                    sent.write(line + "\n")
                    sent.flush()
                reply = received.readline()
            except OSError:
                reply = ""
            watch.cancel()
            watch.join()  # it may be on its way to kill a child that has answered
        except BaseException:  # an interrupted exchange cannot be taken up again
            watch.cancel()
            self._drop()
            raise
        if late.is_set():
            self._drop()
        return reply if reply.endswith("\n") else ""


def _pipes(process: subprocess.Popen[str]) -> tuple[Any, Any]:
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout


def _end(process: subprocess.Popen[str], owner: int) -> None:
    """End a child, in the process that started it only."""
    if os.getpid() == owner:
        process.kill()
        for pipe in _pipes(process):
            try:
                pipe.close()
            except OSError:  # it has not read what was sent
                continue
        process.wait()


def _encodable(text: str) -> str:
    """The text without lone surrogates."""
    return text.encode("utf-8", "replace").decode("utf-8")
