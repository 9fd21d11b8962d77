"""One run folder, one writer: a lock file that survives `kill -9` without blocking the next start.

The file holds pid, host and start time. A lock whose process is gone is taken over with a
warning; a live one is an error that says how to clear it. A process of another host cannot be
asked: its lock is taken over once the kernel does not hold it and the file has not been touched
for `SILENCE_S`, which its owner promised to do (`RunLock.beat`). Standard library only.
"""

import contextlib
import errno
import json
import logging
import os
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from hmpo.errors import RunFolderError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
SILENCE_S = 600.0
"""Seconds without a sign of life after which the owner of a lock on another host is gone."""
BEAT_S = 30.0
"""Seconds between two signs of life."""


def process_alive(pid: int) -> bool:
    """True if a process of this number runs here (a zombie does not; unsure means True)."""
    if os.name == "nt":  # there is no signal 0 there: os.kill would end the process
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return _process_stat(pid)[:1] not in (["Z"], ["X"])


def _process_stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on; empty where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _process_birth(pid: int) -> str:
    """Boot and clock tick at which the process began, so that a reused pid is told apart."""
    fields = _process_stat(pid)
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
    return f"{boot}/{fields[19]}" if len(fields) > 19 else ""


class RunLock:
    """The right to write into a run folder, as a context manager.

    Example: `with RunLock(run_folder): train(...)`.

    Raises:
        RunFolderError: another live process, or a process of another host, holds the folder;
            the message names it and the command that clears the lock.
    """

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / LOCK_FILE
        self._content: bytes | None = None
        self._fd = -1
        self._beaten = 0.0

    def acquire(self) -> None:
        """Take the lock, creating the folder if needed; a stale lock is taken over."""
        if self._content is not None:
            raise RunFolderError(
                f"{self.path}: this lock is held already, expected to take it once"
            )
        content = json.dumps(
            {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
                "birth": _process_birth(os.getpid()),
                "silence_s": SILENCE_S,
            }
        ).encode("utf-8")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _guard(self.path.parent):
                self._clear_stale()
                self._fd = _create(self.path, content)
        except RunFolderError:
            raise
        except FileExistsError as error:
            raise RunFolderError(
                f"{self.path}: another process took the folder this moment; {self._remedy()}"
            ) from error
        except OSError as error:
            raise RunFolderError(
                f"{self.path}: cannot lock the run folder ({error.strerror}), expected a folder "
                "this user can write into"
            ) from error
        self._content, self._beaten = content, time.monotonic()

    def beat(self) -> None:
        """Show those on other hosts that the owner lives; cheap enough to be called often."""
        now = time.monotonic()
        if self._content is not None and now - self._beaten >= BEAT_S:
            self._beaten = now
            with contextlib.suppress(OSError):
                os.utime(self._fd)

    def check(self) -> None:
        """Insist that nobody has taken the lock over.

        Raises:
            RunFolderError: the lock file is another one by now.
        """
        if self._content is None:
            return
        try:
            there, here = self.path.lstat(), os.fstat(self._fd)
        except FileNotFoundError:
            return  # cleared by hand; whoever comes next writes one of their own
        except OSError as error:
            raise RunFolderError(f"{self.path}: cannot be looked at ({error.strerror})") from error
        if (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino):
            raise RunFolderError(
                f"{self.path}: another process has taken the folder over; this one stopped"
            )

    def release(self) -> None:
        """Give the lock back; does nothing in a forked child or if another took it over."""
        content, self._content = self._content, None
        if content is None or json.loads(content)["pid"] != os.getpid():
            return
        try:
            with _guard(self.path.parent):
                if _read(self.path) == content:
                    self.path.unlink()
        except FileNotFoundError:
            logger.warning("%s: the lock was gone before it was given back", self.path)
        except OSError as error:
            logger.warning("%s: the lock could not be given back (%s)", self.path, error.strerror)
        finally:
            os.close(self._fd)

    def _clear_stale(self) -> None:
        """Remove a lock whose owner is gone; raise if it may live. Runs inside the guard."""
        try:
            text = _read(self.path)
        except FileNotFoundError:
            return
        owner = _parse(text)
        if owner is not None:
            who = f"process {owner['pid']} on {owner['host']} since {owner['started']}"
            if owner["host"] != socket.gethostname():
                self._refuse_living(owner, who)
            elif process_alive(owner["pid"]) and _same_birth(owner):
                raise RunFolderError(
                    f"{self.path}: held by {who}, which is alive; {self._remedy()}"
                )
        else:
            who = "a process that was killed while taking it"
        logger.warning("%s: took over the lock of %s, which is gone", self.path, who)
        self.path.unlink()

    def _refuse_living(self, owner: dict[str, Any], who: str) -> None:
        """Raise unless an owner on another host has been silent for too long."""
        silence = owner.get("silence_s")
        if not isinstance(silence, int | float):  # of a version that promised nothing
            raise RunFolderError(f"{self.path}: held by {who}, another host; {self._remedy()}")
        silent = _age(self.path)
        if _held(self.path) or silent < silence:
            raise RunFolderError(
                f"{self.path}: held by {who}, another host, and heard of {silent:.0f} s ago; it is "
                f"taken over after {silence:.0f} s of silence; {self._remedy()}"
            )

    def _remedy(self) -> str:
        return f"choose another folder, or if that process is gone: rm '{self.path}'"

    def __enter__(self) -> "RunLock":
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def _same_birth(owner: dict[str, Any]) -> bool:
    """False only if the pid is now another process than the one that took the lock."""
    birth = _process_birth(owner["pid"])
    return not birth or not owner["birth"] or birth == owner["birth"]


def _parse(text: bytes) -> dict[str, Any] | None:
    """The owner written in a lock file, or None if it is not a whole record."""
    try:
        owner = json.loads(text)
    except ValueError:
        return None
    kinds = {"pid": int, "host": str, "started": str, "birth": str}
    if not isinstance(owner, dict) or any(type(owner.get(key)) is not kinds[key] for key in kinds):
        return None
    return owner if owner["pid"] > 0 else None


def _read(path: Path) -> bytes:
    """The begin of a lock file, which must be a regular file."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    fd = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def _create(path: Path, content: bytes) -> int:
    """Write the lock file; its descriptor holds the kernel's lock on it, where there is one."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        os.write(fd, content)
    except OSError:
        os.close(fd)
        raise
    if fcntl is not None:
        with contextlib.suppress(OSError):  # some network file systems lock no files
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def _held(path: Path) -> bool:
    """Whether the kernel, or the file server, knows of a process that holds the file."""
    if fcntl is None:
        return False
    try:
        fd = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return False
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    finally:
        os.close(fd)
    return False


def _age(path: Path) -> float:
    """Seconds since a file was last touched, by the clock of its file system."""
    probe = path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        now = os.fstat(fd).st_mtime
    finally:
        os.close(fd)
        probe.unlink()
    return now - path.lstat().st_mtime


@contextlib.contextmanager
def _guard(folder: Path) -> Iterator[None]:
    """Serialise two takers of one stale lock; the kernel lets go of it when a taker dies."""
    if fcntl is None:
        yield
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
