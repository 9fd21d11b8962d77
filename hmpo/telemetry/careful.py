"""Opening what lies in a run's folder: regular files with one name, links never followed.

A folder may come from a stranger. A symbolic link in it would have us write elsewhere, a named
pipe would hang the open, a device has no end, a hard link is somebody else's file as well.
"""

import errno
import os
import stat
from pathlib import Path

_FLAGS = (
    getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)


def open_own(path: Path, flags: int) -> int:
    """A file descriptor of a regular file that has no other name.

    Args:
        path: the file.
        flags: as for `os.open`.

    Raises:
        OSError: as by `os.open`; or it is a link, a pipe, a device or a folder.
    """
    try:
        fd = os.open(path, flags | _FLAGS, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, or a pipe that nobody reads
            raise _not_ours(path, "a link or a pipe") from None
        raise
    status = os.fstat(fd)
    problem = None
    if not stat.S_ISREG(status.st_mode):
        problem = "not a regular file"
    elif status.st_nlink > 1:
        problem = "a hard link to a file that has other names"
    if problem is None:
        return fd
    os.close(fd)
    raise _not_ours(path, problem)


def _not_ours(path: Path, problem: str) -> OSError:
    reason = f"it is {problem}, which is not followed; put a copy of the file in its place"
    return OSError(errno.ELOOP, reason, str(path))
