"""Save, rotate, find and load checkpoints (the package's docstring describes the folder)."""

import contextlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hmpo.checkpoint.files import (
    check_free_space,
    fsync_folder,
    read_verified,
    storage_errors,
    write_file,
)
from hmpo.checkpoint.lock import process_alive
from hmpo.checkpoint.manifest import (
    OtherRunError,
    compare_environment,
    read_manifest,
    write_manifest,
)
from hmpo.checkpoint.tree import (
    STATE_FILE,
    EncodedState,
    decode_state,
    encode_state,
    read_tensors,
)
from hmpo.errors import CheckpointError

logger = logging.getLogger(__name__)

FINITE_PARTS = ("model", "optimizer")
"""Top-level parts in which a NaN or infinite tensor is refused."""
_STEP = re.compile(r"step-(\d{8,18})")
_ASIDE = re.compile(r"\.old-(\d{8,18})-\d+-[0-9a-f]+")
_TEMPORARY = re.compile(r"\.tmp-\d+-(\d+)-[0-9a-f]+")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint.

    Example: `Checkpoint(step=12, state={"model": {...}}, path=Path("run/step-00000012"),
    skipped=(("step-00000013", "model.safetensors: SHA-256 differs ..."),))`.
    """

    step: int
    """Optimizer steps done when it was saved."""
    state: dict[str, Any]
    """The tree that was saved; tensors are on the CPU, each with its own memory."""
    path: Path
    """Its folder."""
    skipped: tuple[tuple[str, str], ...]
    """(folder name, why) of each newer one that failed verification, newest first."""


# --- save ----------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    *,
    keep: int = 2,
    spare: int | None = None,
    config_hash: str = "",
    refuse_nonfinite: bool = True,
) -> Path:
    """Save `state` as `folder/step-XXXXXXXX`, atomically, and delete what is older than needed.

    Args:
        folder: where the checkpoints of one run lie; created if missing.
        step: optimizer steps done, >= 0; an existing checkpoint of this step is replaced.
        state: a tree of dict (str or int keys), list, tuple, str, int, float, bool, None, bytes
            and dense tensors. Mappings come back as dict, tensors detached and on the CPU.
        keep: complete checkpoints to keep, this one included, >= 1. Newer steps stay.
        spare: the step of one that stays however old it is.
        config_hash: recorded; `load_checkpoint` can insist on it.
        refuse_nonfinite: refuse NaN and infinity in the tensors of `state["model"]` and
            `state["optimizer"]`.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: a leaf that is not data, a bad `step` or `keep`.
        NonFiniteError: naming the tensor; nothing on disk has changed.
        StorageError: naming path, needed and free bytes; earlier checkpoints are intact and
            nothing partial is left.
    """
    if type(step) is not int or not 0 <= step < 10**18:
        raise CheckpointError(f"step: got {step!r}, expected an int >= 0")
    if type(keep) is not int or keep < 1:
        raise CheckpointError(f"keep: got {keep!r}, expected an int >= 1")
    encoded = encode_state(state)
    if refuse_nonfinite:
        encoded.refuse_nonfinite(FINITE_PARTS)
    needed = _needed_bytes(encoded)
    final = folder / f"step-{step:08d}"
    temporary = _unique(folder, ".tmp", step)
    with storage_errors(final, needed):
        _remove_stale(folder)
        check_free_space(folder, needed)
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            fsync_folder(folder.parent)
        try:
            _write_folder(temporary, step, encoded, config_hash)
            _put_in_place(temporary, final, step)
        finally:
            _remove(temporary)
        fsync_folder(folder)
        _rotate(folder, step, keep, spare)
    return final


def estimate_bytes(state: Mapping[str, Any]) -> int:
    """Bytes on disk of one checkpoint of `state` (times keep + 1 while one is being replaced)."""
    return _needed_bytes(encode_state(state))


def _needed_bytes(encoded: EncodedState) -> int:
    return encoded.nbytes + 1024 + 200 * len(encoded.files)


def _unique(folder: Path, kind: str, step: int) -> Path:
    return folder / f"{kind}-{step:08d}-{os.getpid()}-{secrets.token_hex(4)}"


def _write_folder(path: Path, step: int, encoded: EncodedState, config_hash: str) -> None:
    """Write a complete checkpoint folder, the manifest and its hash last, all of it fsync'd."""
    path.mkdir()
    files = {}
    for name, pieces in encoded.pieces():
        files[name] = write_file(path / name, pieces)
    write_manifest(path, step, config_hash, files)
    fsync_folder(path)


def _put_in_place(temporary: Path, final: Path, step: int) -> None:
    """Rename `temporary` to `final`; a former `final` waits aside, where loading finds it."""
    if not os.path.lexists(final):
        temporary.rename(final)
        return
    aside = _unique(final.parent, ".old", step)
    final.rename(aside)
    try:
        temporary.rename(final)
    finally:
        if not os.path.lexists(final):
            aside.rename(final)


def _remove(path: Path) -> None:
    """Delete a folder or file if it is there; a failure is logged, never raised."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s: could not be deleted (%s); delete it by hand", path, error.strerror)


def _remove_stale(folder: Path) -> None:
    """Delete what dead writers, and failed saves of this process, left half-written."""
    for path in _entries(folder):
        match = _TEMPORARY.fullmatch(path.name)
        if match and (int(match[1]) == os.getpid() or not process_alive(int(match[1]))):
            _remove(path)


def _rotate(folder: Path, step: int, keep: int, spare: int | None) -> None:
    """Delete older checkpoints beyond `keep` complete ones and `spare`; `step` was just saved."""
    for path in _entries(folder):
        if match := _ASIDE.fullmatch(path.name):
            final = folder / f"step-{match[1]}"
            if os.path.lexists(final):
                _remove(path)
            else:
                with contextlib.suppress(OSError):  # loading finds it aside as well
                    path.rename(final)
    complete = 1
    for number, path in reversed(_final_folders(folder)):
        if number >= step:
            continue
        try:  # sizes and the manifest only: hashing bulk data at every save would be slow
            read_manifest(path, number)
        except OtherRunError:
            continue  # not ours to delete
        except CheckpointError:
            pass
        else:
            complete += 1
            if complete <= keep or number == spare:
                continue
        doomed = _unique(folder, ".tmp", number)  # a kill while deleting must not leave a part
        try:
            path.rename(doomed)
        except OSError as error:
            logger.warning("%s: could not be deleted (%s)", path, error.strerror)
            continue
        _remove(doomed)


# --- find ----------------------------------------------------------------------------------


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def _final_folders(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every `step-*`, oldest first, verified or not."""
    checkpoints = []
    for path in _entries(folder):
        match = _STEP.fullmatch(path.name)
        if match and path.name == f"step-{int(match[1]):08d}":
            checkpoints.append((int(match[1]), path))
    return sorted(checkpoints)


def _candidates(folder: Path) -> list[tuple[int, Path]]:
    """Everything that may be a checkpoint, best first; one set aside comes after its step."""
    try:
        ranked = [(step, 1, path) for step, path in _final_folders(folder)]
        for path in _entries(folder):
            if match := _ASIDE.fullmatch(path.name):
                ranked.append((int(match[1]), 0, path))
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be listed ({error.strerror}), expected a folder of checkpoints"
        ) from error
    return [(step, path) for step, _, path in sorted(ranked, reverse=True)]


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders in `folder`, oldest first, one per step, not verified."""
    best: dict[int, Path] = {}
    for step, path in _candidates(folder):
        best.setdefault(step, path)
    return [best[step] for step in sorted(best)]


# --- load ----------------------------------------------------------------------------------


def load_checkpoint(
    folder: Path, *, step: int | None = None, config_hash: str | None = None
) -> Checkpoint | None:
    """The newest checkpoint that verifies, or the one of `step`.

    Args:
        folder: where the checkpoints of one run lie; it may be missing.
        step: load this one and no other.
        config_hash: refuse a checkpoint that was saved under another one.

    Returns:
        The checkpoint, with the newer ones that were skipped and why (also logged as
        warnings); None if there is no checkpoint at all and no `step` was asked for.

    Raises:
        CheckpointError: none verifies; `step` is missing or damaged; the newest intact one
            has another schema version or `config_hash`.
    """
    candidates = _candidates(folder)
    if step is not None:
        known = sorted({number for number, _ in candidates})
        candidates = [item for item in candidates if item[0] == step]
        if not candidates:
            raise CheckpointError(f"{folder}: got step {step}, expected one of the saved {known}")
    skipped: list[tuple[str, str]] = []
    for number, path in candidates:
        try:
            state = _read(path, number, config_hash)
        except OtherRunError:
            raise
        except CheckpointError as error:
            skipped.append((path.name, str(error)))
            told = {"event": "checkpoint_skipped"}  # for whoever shows events by other means
            logger.warning("%s: checkpoint skipped: %s", path, error, extra=told)
            continue
        return Checkpoint(step=number, state=state, path=path, skipped=tuple(skipped))
    if not skipped:
        return None
    reasons = "; ".join(f"{name}: {why}" for name, why in skipped)
    raise CheckpointError(
        f"{folder}: no valid checkpoint among {len(skipped)} ({reasons}); restore one from a "
        "copy, or move them away to start afresh"
    )


def _read(path: Path, step: int, config_hash: str | None) -> dict[str, Any]:
    """The verified state of one folder; nothing is used before its hash agreed."""
    manifest = read_manifest(path, step)
    if config_hash is not None and manifest["config_hash"] != config_hash:
        raise OtherRunError(
            f"{path}: saved under the configuration {manifest['config_hash']!r}, expected "
            f"{config_hash!r}; resume with the configuration of the run, or start a new run"
        )
    files = dict(manifest["files"])
    tree = files.pop(STATE_FILE)
    text = read_verified(path / STATE_FILE, tree["size"], tree["sha256"])
    sizes = {name: entry["size"] for name, entry in files.items()}
    state, tensors = decode_state(text, sizes)
    for name, entry in files.items():
        read_tensors(path / name, entry["size"], entry["sha256"], tensors[name])
    compare_environment(path, manifest["environment"])
    return state
