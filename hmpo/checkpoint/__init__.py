"""Checkpoints that are whole or absent, verified before use, without pickle; the run lock.

A checkpoint is a folder `step-00000012/`: `state.json` (the tree), one safetensors file per
top-level part that holds tensors (`model.safetensors` carries the plain names of
`state["model"]`), `MANIFEST.json` (size and SHA-256 of each file, the machine) and
`MANIFEST.sha256` (the hash of the manifest; `sha256sum -c MANIFEST.sha256` checks it).

It is written aside, fsync'd and renamed, so a kill at any instant leaves the former ones as
they were. There is no pointer to the latest: the latest is the newest that verifies. Hashes in
the same folder protect against rot and cut-off writes, not against someone who rewrites them.
One process writes into a folder at a time (`RunLock`).
"""

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "Checkpoint": "store",
    "RecordedBatch": "batch_file",
    "RunLock": "lock",
    "check_free_space": "files",
    "estimate_bytes": "store",
    "list_checkpoints": "store",
    "load_checkpoint": "store",
    "read_batch": "batch_file",
    "save_checkpoint": "store",
    "write_atomic": "files",
    "write_batch": "batch_file",
}

__all__ = list(_HOME)

if TYPE_CHECKING:
    from hmpo.checkpoint.batch_file import RecordedBatch, read_batch, write_batch
    from hmpo.checkpoint.files import check_free_space, write_atomic
    from hmpo.checkpoint.lock import RunLock
    from hmpo.checkpoint.store import (
        Checkpoint,
        estimate_bytes,
        list_checkpoints,
        load_checkpoint,
        save_checkpoint,
    )


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"hmpo.checkpoint.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hmpo.checkpoint' has no attribute {name!r}")
