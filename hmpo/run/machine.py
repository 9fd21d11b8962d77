"""What the operating system says of this process's memory, and how much it may have."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def resident_bytes() -> int:
    """Memory that this process holds now."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        import resource

        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return size if os.uname().sysname == "Darwin" else size * 1024


def machine_bytes(root: Path = Path("/")) -> int | None:
    """Memory that this process may use: the machine's, or less where a cgroup says so.

    Args:
        root: of the file system, for tests.

    Returns:
        Bytes; None where the system does not tell.
    """
    limits = list(_cgroup_limits(root))
    with contextlib.suppress(OSError, ValueError, AttributeError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=None)


def _cgroup_limits(root: Path) -> Iterator[int]:
    """Limits of the process's cgroup and of those around it, versions 1 and 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = (*line.split(":", 2), "", "")[:3]
        if kinds not in ("", "memory") and "memory" not in kinds.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if kinds else "")
        name = "memory.limit_in_bytes" if kinds else "memory.max"
        inner = Path(path.lstrip("/"))
        for place in (inner, *inner.parents):
            try:
                text = (top / place / name).read_text(encoding="ascii").strip()
            except (OSError, UnicodeDecodeError):
                continue
            if text.isdigit():
                yield int(text)
