"""Files that are whole or absent: exclusive creation, fsync, rename, hash before use.

Standard library only. Every write that fails raises `StorageError` with path, needed and free
bytes; every read refuses links and special files and checks size and SHA-256 of the very bytes
it hands on (no file is opened twice).
"""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from hmpo.checkpoint.lock import process_alive
from hmpo.errors import CheckpointError, HmpoError, StorageError, byte_size

CHUNK_BYTES = 4 * 2**20
"""Bytes hashed and written, or read and hashed, at a time."""
# A planted link must not be followed, and a planted named pipe must not hang the open.
_CAREFUL_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Create `path`, write all pieces, fsync it; returns its bytes and SHA-256 (hex)."""
    digest = hashlib.sha256()
    size = 0
    fd = os.open(path, _CREATE_FLAGS, 0o666)
    try:
        for piece in pieces:
            view = memoryview(piece)
            for start in range(0, len(view), CHUNK_BYTES):
                chunk = view[start : start + CHUNK_BYTES]
                digest.update(chunk)
                size += len(chunk)
                while len(chunk):
                    chunk = chunk[os.write(fd, chunk) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    return size, digest.hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable (no-op on Windows, which has no such call)."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _open_no_follow(name: str, flags: int) -> int:
    return os.open(name, flags | _CAREFUL_FLAGS)


@contextlib.contextmanager
def open_regular(path: Path, size: int | None) -> Iterator[FileIO]:
    """An unbuffered regular file of `size` bytes, symbolic links refused."""
    try:
        with FileIO(str(path), "rb", opener=_open_no_follow) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path.name}: not a regular file")
            if size is not None and status.st_size != size:
                raise CheckpointError(
                    f"{path.name}: {status.st_size} bytes, expected {size} by the manifest"
                )
            yield file
    except OSError as error:
        reason = "a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise CheckpointError(f"{path.name}: cannot be read ({reason})") from error


def fill(file: FileIO, view: memoryview, digest: Any, name: str) -> None:
    """Read exactly `len(view)` bytes into `view`, hashing them; `CheckpointError` if fewer."""
    start = 0
    while start < len(view):
        count = file.readinto(view[start : start + CHUNK_BYTES])
        if not count:
            raise CheckpointError(f"{name}: ends after fewer bytes than the manifest says")
        digest.update(view[start : start + count])
        start += count


def check_digest(digest: Any, expected: str, name: str) -> None:
    """Raise `CheckpointError` naming the file unless the hex digest is the expected one."""
    if digest.hexdigest() != expected:
        raise CheckpointError(f"{name}: SHA-256 differs from the manifest, the file is damaged")


def read_small(path: Path, limit: int) -> bytes:
    """All bytes of a regular file of at most `limit` bytes.

    Raises:
        CheckpointError: missing, a link, not a regular file, or larger.
    """
    with open_regular(path, None) as file:
        data = bytearray()
        while chunk := file.read(limit + 1 - len(data)):
            data += chunk
        if len(data) > limit:
            raise CheckpointError(f"{path.name}: larger than {limit} bytes")
        return bytes(data)


def read_verified(path: Path, size: int, sha256: str) -> bytes:
    """All bytes of a file, once its size and hash agree.

    Raises:
        CheckpointError: missing, a link, or not the bytes that the manifest describes.
    """
    digest = hashlib.sha256()
    with open_regular(path, size) as file:
        data = bytearray(size)
        fill(file, memoryview(data), digest, path.name)
    check_digest(digest, sha256, path.name)
    return bytes(data)


def free_bytes(path: Path) -> int:
    """Bytes free to this user on the file system that holds `path` or will hold it."""
    path = path.absolute()
    for place in (path, *path.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(place).free
    return 0


@contextlib.contextmanager
def storage_errors(path: Path, needed: int) -> Iterator[None]:
    """Turn an `OSError` into a one-line `StorageError` naming path, needed and free bytes."""
    try:
        yield
    except OSError as error:
        if isinstance(error, HmpoError):
            raise
        refused = StorageError(
            f"{path}: cannot write ({error.strerror or error}): needed {byte_size(needed)}, "
            f"{byte_size(free_bytes(path))} free; make room, check permissions and quota, or "
            "choose another folder"
        )
        refused.errno = error.errno
        raise refused from error


def check_free_space(folder: Path, needed_bytes: int) -> None:
    """Raise `StorageError` unless `needed_bytes` are free where `folder` is or will be."""
    free = free_bytes(folder)
    if free < needed_bytes:
        refused = StorageError(
            f"{folder}: not enough room: needed {byte_size(needed_bytes)}, "
            f"{byte_size(free)} free; make room or choose another folder"
        )
        refused.errno = errno.ENOSPC
        raise refused


def write_atomic(path: Path, data: bytes | str, *, make_folder: bool = False) -> None:
    """Replace `path` by `data` (text as UTF-8): readers see all of it or the former file.

    Written beside it, fsync'd, renamed over it; then the folder is fsync'd.

    Args:
        path: the file.
        data: its whole content.
        make_folder: make the file's folder first where it is missing.

    Raises:
        StorageError: naming the path, the needed and the free bytes; the former file stays.
    """
    content = data.encode("utf-8") if isinstance(data, str) else data
    if path.name in ("", ".."):
        raise StorageError(f"cannot write {str(path)!r}: it names no file, give a file's path")
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    with storage_errors(path, len(content)):
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        try:
            write_file(temporary, [content])
            temporary.replace(path)
            fsync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    """Delete what killed processes left of this file half-written."""
    name = re.compile(re.escape(f".{path.name}.tmp-") + r"(\d+)-[0-9a-f]+")
    with contextlib.suppress(OSError):  # it does no harm there
        for other in path.parent.iterdir():
            match = name.fullmatch(other.name)
            if match and not process_alive(int(match[1])):
                other.unlink(missing_ok=True)
