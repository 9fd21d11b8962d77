"""The newest checkpoint whose part of the logs is still what it was when it was saved."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hmpo.checkpoint import Checkpoint, list_checkpoints, load_checkpoint
from hmpo.checkpoint.manifest import OtherRunError
from hmpo.errors import CheckpointError, TelemetryError
from hmpo.telemetry.careful import open_own

STEP = re.compile(r"\d{8,18}")
"""The updates done, in the name of a checkpoint's folder."""


def load_fitting(folder: Path, config_hash: str, newest: Checkpoint) -> Checkpoint:
    """The newest valid checkpoint of a run folder that fits its logs.

    A checkpoint holds how long each log was and the SHA-256 of that part. Where the log was
    damaged since, an older checkpoint may still fit.

    Args:
        folder: of the run.
        config_hash: refuse an older checkpoint that was saved under another one.
        newest: the newest that verifies.

    Raises:
        CheckpointError: an older one is of another configuration.
        TelemetryError: there are valid checkpoints, and none fits.
    """
    checkpoints = folder / "checkpoints"
    found: Checkpoint | None = newest
    skipped = list(newest.skipped)
    steps = [int(STEP.findall(path.name)[0]) for path in list_checkpoints(checkpoints)]
    older = [step for step in reversed(steps) if step < newest.step]
    while found is not None:
        why = damage(folder, found.state["run"])
        if why is None:
            return dataclasses.replace(found, skipped=tuple(skipped))
        skipped.append((found.path.name, why))
        found = _next(checkpoints, older, config_hash, skipped)
    reasons = "; ".join(f"{name}: {why}" for name, why in skipped)
    raise TelemetryError(
        f"{folder}: no checkpoint fits the logs beside it ({reasons}); put back a copy of the log, "
        "or start a new run"
    )


def _next(
    checkpoints: Path, older: list[int], config_hash: str, skipped: list[tuple[str, str]]
) -> Checkpoint | None:
    """The next older checkpoint that verifies; takes it and what it passes over from `older`."""
    while older:
        step = older.pop(0)
        try:
            return load_checkpoint(checkpoints, step=step, config_hash=config_hash)
        except OtherRunError:
            raise
        except CheckpointError as error:
            skipped.append((f"step-{step:08d}", str(error)))
    return None


def damage(folder: Path, saved: Mapping[str, Any]) -> str | None:
    """What is wrong with the part of the logs that a checkpoint vouches for; None if nothing.

    Args:
        folder: of the run.
        saved: the run's own part of the checkpoint.

    Raises:
        TelemetryError: a log is a link, a pipe or a device, or cannot be read.
    """
    hashes = saved.get("sha256", {})  # older checkpoints have none
    for name, end in saved["offsets"].items():
        path = folder / f"{name}.jsonl"
        size, digest = _hashed(path, end)
        if size < end:
            return f"{path.name}: cannot resume at byte {end}, the file holds {size} bytes"
        if hashes.get(name, digest) != digest:
            return f"{path.name}: its first {end} bytes are not those that were written (SHA-256)"
    return None


def _hashed(path: Path, end: int) -> tuple[int, str]:
    """Bytes found, at most `end`, and their SHA-256 (hex)."""
    digest, size = hashlib.sha256(), 0
    try:
        with open(open_own(path, os.O_RDONLY), "rb") as file:  # noqa: PTH123
            while size < end and (chunk := file.read(min(end - size, 1 << 20))):
                digest.update(chunk)
                size += len(chunk)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise TelemetryError(f"{path}: cannot be read ({error.strerror})") from None
    return size, digest.hexdigest()
