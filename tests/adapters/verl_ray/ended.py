"""No process outlives a run: whatever was started within is ended, orphans too."""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def descendants() -> set[int]:
    """Ids of all living processes below this one."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # ended meanwhile
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                parents[int(folder.name)] = (int(parent), state)
    found, wave = set(), {os.getpid()}
    while wave:
        wave = {child for child, (parent, _) in parents.items() if parent in wave}
        found |= wave
    return {child for child in found if parents[child][1] not in "ZX"}


@contextlib.contextmanager
def all_ended(patience: float = 60.0) -> Iterator[None]:
    """End every process that was started within, however the block is left.

    Orphans come to this process, so that those which left their session and group are found too.

    Args:
        patience: seconds until an error says which processes do not end.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = descendants()
    try:
        yield
    finally:
        deadline, killed = time.monotonic() + patience, set()
        while left := descendants() - before:
            killed |= left
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes that do not end: {sorted(left)}")
            time.sleep(0.2)
        for process in killed:
            with contextlib.suppress(ChildProcessError):  # orphans are children of this one
                os.waitpid(process, 0)
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
