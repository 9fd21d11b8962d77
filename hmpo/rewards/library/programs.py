"""The reward `unit_tests`: a program in the completion, run with the tests of a column."""

import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from hmpo.errors import ConfigError, RewardError, require
from hmpo.rewards.library.base import LibraryReward, answers_of, fenced, require_column
from hmpo.rewards.library.children import script
from hmpo.rewards.values import one_line

logger = logging.getLogger(__name__)

LANGUAGES = ("", "python", "py", "python3")
"""Names behind the fence of a block of Python."""
GRACE = 10.0
"""Seconds beyond the time limit in which all processes of a program have to be gone."""
STARTED = b"started"
"""The first line of the child's output, once there is a process for the program."""
CODE = 1_000_000
"""Characters of a program; a longer one fails."""


def unit_tests(
    *,
    column: str = "tests",
    timeout: float = 5.0,
    memory_mb: int = 1024,
    file_mb: int = 16,
    processes: int = 0,
) -> "UnitTests":
    r"""1 where the program in the completion passes the tests, else 0.

    The functional correctness of APPS and HumanEval (Hendrycks et al., 2021; Chen et al., 2021):
    the last fenced block of Python (```` ```python ````, or without a name) is run, then the tests
    in the same namespace; an exception, an exit before the tests are through, or a limit is 0, as
    is a completion without a block; without tests it is None. `__name__` is not `__main__`, so a
    script's own main part does not run.

    Each program runs in a process of its own, in an empty folder that is removed, with few
    environment variables (no keys), without the network where the kernel allows a namespace
    (Linux; else one line is logged), under limits of wall and CPU time, memory and size of a file;
    all that it started is killed. A program that this machine could not start is None and counted
    as `unit_tests/failed`, and an error where none could be started. This is a fence against
    accidents, not against attackers: it can read what you can read. Not on Windows.

    Args:
        column: holds the tests: Python code, or a list of pieces of it.
        timeout: seconds for one program, of the clock and of the processor.
        memory_mb: most megabytes of address space.
        file_mb: most megabytes of a file that it writes.
        processes: programs at a time; 0 takes as many as there are cores, at most 8.
    """
    if sys.platform == "win32":
        raise ConfigError("reward unit_tests: needs a system with fork, which Windows is not")
    require_column("unit_tests", column)
    require(0 < timeout <= 3600, "reward unit_tests.timeout", timeout, "seconds in (0, 3600]")
    require(memory_mb >= 64, "reward unit_tests.memory_mb", memory_mb, "an integer >= 64")
    require(file_mb >= 0, "reward unit_tests.file_mb", file_mb, "an integer >= 0")
    require(processes >= 0, "reward unit_tests.processes", processes, "an integer >= 0")
    return UnitTests(column, timeout, memory_mb, file_mb, processes)


class UnitTests(LibraryReward):
    """`unit_tests`: see there."""

    def __init__(
        self, column: str, timeout: float, memory_mb: int, file_mb: int, processes: int
    ) -> None:
        super().__init__("unit_tests", (column,), takes=("log_metric",))
        self.of_column = column
        self.timeout = timeout
        self.limits = {"memory": memory_mb * 10**6, "file": file_mb * 10**6, "seconds": timeout}
        self.processes = processes or min(8, os.cpu_count() or 1)
        self.told = False

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
        pairs: list[tuple[str, str] | None] = []
        for text, value in zip(texts, values):
            tests = tests_of(value)
            pairs.append((program_in(text), tests) if tests.strip() else None)
        jobs = [pair for pair in dict.fromkeys(pairs) if pair and 0 < len(pair[0]) <= CODE]
        with ThreadPoolExecutor(self.processes) as pool:
            results = dict(zip(jobs, pool.map(self.run, jobs)))
        failed = [result for result in results.values() if result.failed]
        if failed and len(failed) == len(results):
            raise RewardError(
                f"reward {self.__name__!r}: no program could be started ({failed[0].failed}); is "
                "this machine out of memory or processes?"
            )
        if log_metric is not None:
            late = sum(result.late for result in results.values())
            log_metric(f"{self.__name__}/timeouts", late)
            log_metric(f"{self.__name__}/failed", len(failed))
        if not self.told and any(not result.no_network for result in results.values()):
            self.told = True
            logger.warning(
                "reward %s: this system gives no network namespace, so programs can use the "
                "network",
                self.__name__,
            )
        no_program = Result()
        return [None if pair is None else results.get(pair, no_program).reward() for pair in pairs]

    def run(self, pair: tuple[str, str]) -> "Result":
        """What came of one program and its tests."""
        code, tests = pair
        request = {"code": code, "tests": tests, "token": secrets.token_hex(16), **self.limits}
        with tempfile.TemporaryDirectory(
            prefix="hmpo-tests-", ignore_cleanup_errors=True
        ) as folder:
            try:
                process = subprocess.Popen(
                    script("programs_child", isolated=True),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    cwd=folder,
                    env=_environment(folder),
                    start_new_session=True,
                )
            except OSError as error:
                return Result(failed=one_line(error))
            late = False
            try:
                out, _ = process.communicate(json.dumps(request).encode(), self.timeout + GRACE)
            except subprocess.TimeoutExpired as error:
                late, out = True, error.output or b""
            finally:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        return _result(out, late)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one program and its tests.

    Example: `Result(passed=True)`.
    """

    passed: bool = False
    late: bool = False
    no_network: bool = True
    """Whether the network was taken away."""
    failed: str = ""
    """Why the program did not even start, which is no fault of it."""

    def reward(self) -> float | None:
        """1 or 0; None where the program did not start."""
        return None if self.failed else float(self.passed)


def _result(out: bytes, late: bool) -> Result:
    """The result that the child's output tells.

    What has started and left no word has ended the child above it, which is its own doing.
    """
    first, _, said = out.partition(b"\n")
    if first != STARTED:
        return Result(failed="the process that runs it ended or did nothing")
    try:
        told = json.loads(said)
        return Result(**{name: told[name] for name in ("passed", "late", "no_network")})
    except (ValueError, TypeError, KeyError):
        return Result(late=late)


def _environment(folder: str) -> dict[str, str]:
    """What a program finds in its environment: no keys, no settings of ours."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
    return kept | {"HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"}


def program_in(text: str) -> str:
    """The last fenced block of Python; empty without one."""
    blocks = [body for info, body in fenced(text) if _language(info) in LANGUAGES]
    return blocks[-1] if blocks else ""


def _language(info: str) -> str:
    """The language that a fence names."""
    words = info.lower().strip("{}. ").split()
    return words[0] if words else ""


def tests_of(value: Any) -> str:
    """The tests of a column's value as one piece of code; empty without any."""
    return "\n".join(answers_of(value))
