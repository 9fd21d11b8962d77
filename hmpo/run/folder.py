"""The folder of a run as a place: what lies in it is ours, and it stays where it was.

A folder may come from a stranger, and may be moved, deleted or replaced while a run writes into it.
"""

import contextlib
import dataclasses
import os
import stat
from collections.abc import Callable
from pathlib import Path

from hmpo.config import RunConfig
from hmpo.errors import ConfigError, RunFolderError

FILES = (
    "config.json",
    "environment.json",
    "inputs.json",
    "telemetry.jsonl",
    "telemetry.jsonl.gz",
    "telemetry.csv",
    "completions.jsonl",
    "prompts.jsonl",
    "timing.jsonl",
    "run.lock",
    "report.html",
)
"""Files that a run, an evaluation or a report reads or writes."""
FOLDERS = ("checkpoints", "start", "policy", "export", "plots", "tensorboard")
"""Folders of the same kind."""


def refuse_foreign(folder: Path) -> None:
    """Refuse a run folder in which one of our names is a link, a pipe, a device or the like.

    Raises:
        RunFolderError: one line that names it.
    """
    for name in FILES:
        _refuse(folder / name, stat.S_ISREG, "a regular file")
    for name in FOLDERS:
        _refuse(folder / name, stat.S_ISDIR, "a folder")
    inside: list[Path] = []
    with contextlib.suppress(OSError):  # it is not there
        inside = sorted((folder / "policy").iterdir())
    for path in inside:
        if path.is_symlink() or not path.is_dir():
            _refuse(path, stat.S_ISREG, "a regular file")


def _refuse(path: Path, fits: Callable[[int], bool], expected: str) -> None:
    """Refuse a path that is there and is not what it must be."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return  # it is not there, or whoever opens it says why it cannot be
    if not fits(mode):
        raise RunFolderError(
            f"{path}: is {_kind(mode)}, expected {expected}; links, pipes and devices in a run "
            "folder are not followed, put a copy in its place"
        )


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFDIR: "a folder",
        stat.S_IFREG: "a file",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")


def renamed(config: RunConfig, folder: Path) -> RunConfig:
    """The configuration under the name and place of the folder that it was found in.

    A folder whose name is no run's (it has a space, say) keeps the run's own name within.
    """
    place = dataclasses.replace(config, out=str(folder.parent))
    try:
        return dataclasses.replace(place, name=folder.name)
    except ConfigError:
        return place


class Place:
    """A run's folder under its absolute path, which a change of the current folder leaves alone.

    Args:
        folder: as it was given.
    """

    def __init__(self, folder: Path) -> None:
        self.given = folder
        self.path = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would follow links
        self._identity: tuple[int, int] | None = None

    def settle(self) -> None:
        """Note which folder it is, now that it exists."""
        self._identity = self._look()

    def check(self) -> None:
        """Insist that the path still leads to the folder that `settle` found.

        Raises:
            RunFolderError: it was moved, deleted or replaced.
        """
        try:
            same = self._look() == self._identity
            problem = "another folder is in its place"
        except OSError as error:
            same, problem = False, error.strerror or "it cannot be reached"
        if not same:
            raise RunFolderError(
                f"{self.path}: was moved, deleted or replaced while the run went on ({problem}); "
                "the run stopped, put the folder back and resume it"
            )

    def shown(self) -> Path:
        """The path as it was given, if it still means this folder; else the absolute one."""
        here = Path(os.path.abspath(self.given))  # noqa: PTH100
        return self.given if here == self.path else self.path

    def _look(self) -> tuple[int, int]:
        status = self.path.stat()
        return status.st_dev, status.st_ino
