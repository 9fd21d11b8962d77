"""Starting a run anew where one was: what counts as nothing lost, and what is deleted."""

import os
import shutil
from pathlib import Path

from hmpo.run.place import saved_steps

FILES = (
    "checkpoints",
    "start",
    "policy",
    "export",
    "plots",
    "telemetry.jsonl",
    "telemetry.jsonl.gz",
    "completions.jsonl",
    "prompts.jsonl",
    "timing.jsonl",
    "environment.json",
    "report.html",
    "config.json",
)
"""What a run leaves in its folder. config.json goes last, so that a kill leaves nothing that no
start can do anything with."""
STEP = b'"type":"step"'


def without_update(folder: Path) -> bool:
    """Whether the run in a folder has made no update: starting it anew loses nothing."""
    if any(step > 0 for step in saved_steps(folder)) or (folder / "policy").exists():
        return False
    log = folder / "telemetry.jsonl"
    if log.is_symlink() or not log.exists():
        return not log.is_symlink()
    if not log.is_file():
        return False
    with log.open("rb") as lines:
        return not any(STEP in line for line in lines)


def leftovers(folder: Path) -> list[Path]:
    """What a run left in its folder, in the order in which it may be deleted."""
    events = sorted((folder / "tensorboard").glob("*"))  # one by one: new ones come beside them
    return [*events, *(folder / name for name in FILES if os.path.lexists(folder / name))]


def delete(paths: list[Path]) -> None:
    """Delete files and folders; links are removed, never followed."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
