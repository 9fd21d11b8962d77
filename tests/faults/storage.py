"""A file system that fails on demand, and a recorder of what is done to a real one."""

import contextlib
import errno
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

PRIMITIVES = ("open", "write", "fsync", "mkdir", "rename", "replace")


@contextlib.contextmanager
def fast_folder() -> Iterator[Path]:
    """A folder in memory where there is one (fsync on a disk is what tests wait for)."""
    shared = Path("/dev/shm")
    place = shared if shared.is_dir() and os.access(shared, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as name:
        yield Path(name)


@contextlib.contextmanager
def recorded(names: tuple[str, ...] = PRIMITIVES) -> Iterator[list[tuple[str, str]]]:
    """Record (call, path) of every storage primitive; a renaming is recorded by its target."""
    calls: list[tuple[str, str]] = []
    open_files: dict[int, str] = {}
    originals = {name: getattr(os, name) for name in names}

    def watch(name: str):
        def call(target, *args, **kwargs):
            result = originals[name](target, *args, **kwargs)
            if name == "open":
                open_files[result] = os.fspath(target)
                return result
            place = args[0] if name in ("rename", "replace") else target
            calls.append((name, open_files[place] if type(place) is int else os.fspath(place)))
            return result

        return call

    with _patched({name: watch(name) for name in names}):
        yield calls


@contextlib.contextmanager
def failing_at(k: int, code: int = errno.ENOSPC, names=PRIMITIVES) -> Iterator[list[str]]:
    """Make the k-th storage call (from 0) raise `OSError(code)`; yields the calls so far.

    A failing write first writes half of its bytes, as a full disk does. Opens for reading
    are not counted.
    """
    seen: list[str] = []
    originals = {name: getattr(os, name) for name in names}

    def failing(name: str):
        def call(*args, **kwargs):
            if name == "open" and not args[1] & os.O_CREAT:
                return originals[name](*args, **kwargs)
            seen.append(name)
            if len(seen) == k + 1:
                if name == "write":
                    originals[name](args[0], args[1][: len(args[1]) // 2])
                raise OSError(code, os.strerror(code))
            return originals[name](*args, **kwargs)

        return call

    with _patched({name: failing(name) for name in names}):
        yield seen


@contextlib.contextmanager
def dying_at(k: int, names=(*PRIMITIVES, "unlink", "rmdir")) -> Iterator[list[str]]:
    """SIGKILL this process just before its k-th storage call (from 0); for forked children."""
    seen: list[str] = []
    originals = {name: getattr(os, name) for name in names}

    def dying(name: str):
        def call(*args, **kwargs):
            seen.append(name)
            if len(seen) == k + 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return originals[name](*args, **kwargs)

        return call

    with _patched({name: dying(name) for name in names}):
        yield seen


@contextlib.contextmanager
def short_writes(limit: int) -> Iterator[None]:
    """Let every `os.write` take at most `limit` bytes."""
    write = os.write
    with _patched({"write": lambda fd, data: write(fd, data[:limit])}):
        yield


@contextlib.contextmanager
def _patched(replacements: dict) -> Iterator[None]:
    originals = {name: getattr(os, name) for name in replacements}
    for name, function in replacements.items():
        setattr(os, name, function)
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(os, name, function)
