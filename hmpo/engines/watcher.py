"""Runs a command in a session of its own, and ends all of it when this process's parent ends.

    python watcher.py LOG FOLDER COMMAND ...

Standard library only, run as a file. The parent holds the other end of standard input: when that
closes, however the parent ended, everything in the command's session is ended, and FOLDER is
deleted. Writes two lines: the command's process id, and at last its exit code.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

PATIENCE_S = 5.0
"""How long the command may take to end by itself."""
LOOK_S = 0.5


def main(log: str, folder: str, command: list[str]) -> int:
    """Run the command until it ends, or this process's parent does; gives an exit code."""
    parent = os.getppid()
    ended: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: ended.append(number))
    with Path(log).open("ab") as file:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _say(child.pid)
    while child.poll() is None and not ended and os.getppid() == parent:
        readable, _, _ = select.select([sys.stdin], [], [], LOOK_S)
        if readable and not os.read(sys.stdin.fileno(), 1):
            break
    _end(child)
    shutil.rmtree(folder, ignore_errors=True)
    _say(child.returncode)
    return 0


def _end(child: "subprocess.Popen[bytes]") -> None:
    """End all processes of the child's session, first by asking."""
    until = time.monotonic() + PATIENCE_S
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGTERM)
        while time.monotonic() < until:
            child.poll()
            os.killpg(child.pid, 0)
            time.sleep(0.05)
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(PATIENCE_S)


def _say(number: int | None) -> None:
    """A line for the parent, if it is still there."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.write(f"{number}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
