"""One run folder, one writer: a lock file that survives `kill -9` without blocking the next start.

The file holds pid, host and start time. A lock whose process is gone is taken over with a
warning; a live one, or one of another host (which cannot be asked), is an error that says how
to clear it. Standard library only.
"""

import contextlib
import json
import logging
import os
import socket
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
            }
        ).encode("utf-8")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _guard(self.path.parent):
                self._clear_stale()
                _create(self.path, content)
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
        self._content = content

    def release(self) -> None:
        """Give the lock back; does nothing in a forked child or if another took it over."""
        content, self._content = self._content, None
        if content is None or json.loads(content)["pid"] != os.getpid():
            return
        try:
            with _guard(self.path.parent):
                if self.path.read_bytes() == content:
                    self.path.unlink()
        except OSError as error:
            logger.warning("%s: the lock could not be given back (%s)", self.path, error.strerror)

    def _clear_stale(self) -> None:
        """Remove a lock whose owner is gone; raise if it may live. Runs inside the guard."""
        try:
            text = self.path.read_bytes()[:4096]
        except FileNotFoundError:
            return
        owner = _parse(text)
        if owner is not None:
            who = f"process {owner['pid']} on {owner['host']} since {owner['started']}"
            if owner["host"] != socket.gethostname():
                raise RunFolderError(f"{self.path}: held by {who}, another host; {self._remedy()}")
            if process_alive(owner["pid"]) and _same_birth(owner):
                raise RunFolderError(
                    f"{self.path}: held by {who}, which is alive; {self._remedy()}"
                )
        else:
            who = "a process that was killed while taking it"
        logger.warning("%s: took over the lock of %s, which is gone", self.path, who)
        self.path.unlink()

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


def _create(path: Path, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.write(fd, content)
    finally:
        os.close(fd)


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
