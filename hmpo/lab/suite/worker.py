"""A process that makes one run after another; `pool` starts it.

Jobs come as JSON lines on standard input, messages go out as JSON lines on what was standard
output; whatever a run itself prints goes to standard error. The heavy imports are paid once. The
process ends at once, in the midst of anything, when whoever started it is gone: runs survive that.
"""

import ctypes
import json
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Mapping
from types import FrameType
from typing import Any

PR_SET_PDEATHSIG = 1
CLOSE = "close"


def main() -> int:
    """Serve until told to close, asked to by a signal, or orphaned."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    out = os.dup(1)
    os.dup2(2, 1)
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: _ask(asked, number, frame))
    jobs: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")

    def tell(message: Mapping[str, Any]) -> None:
        os.write(out, (json.dumps(message) + "\n").encode())
        if asked:  # it came before the run listened: now it does
            signal.raise_signal(asked.pop())

    from hmpo.lab.suite.execute import execute
    from hmpo.lab.suite.job import Job

    tell({"event": "ready"})
    while not asked:
        try:
            job = jobs.get(timeout=0.2)
        except queue.Empty:
            continue
        if job is None:
            break
        ended = execute(Job(**job), tell)
        tell({"event": "ended", **ended})
        if ended["raised"] or ended["status"] == "interrupted":
            break  # who knows what an exception left behind in this process
    return 0


def _ask(asked: list[int], number: int, frame: FrameType | None) -> None:
    """Take note of a signal; a run has its own way while it lasts."""
    asked.append(number)


def _listen(jobs: "queue.SimpleQueue[dict[str, Any] | None]") -> None:
    """Hand on what comes in; end the process where nobody is left to send anything."""
    for line in sys.stdin:
        message = json.loads(line)
        jobs.put(None if message == CLOSE else message)
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
