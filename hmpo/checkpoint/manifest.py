"""The manifest of a checkpoint: what is in the folder, on which machine it was made, and its hash.

Reading goes outside in: the manifest's own hash, its form, plain file names, the sizes on disk.
Only then are the listed files opened, and no others.
"""

import contextlib
import functools
import hashlib
import json
import logging
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hmpo.checkpoint.files import read_small, write_file
from hmpo.checkpoint.tree import MAX_JSON_BYTES, MAX_TENSOR_FILES, STATE_FILE, parse_json
from hmpo.errors import CheckpointError

logger = logging.getLogger(__name__)

SCHEMA = "hmpo.checkpoint/1"
MANIFEST = "MANIFEST.json"
MANIFEST_HASH = "MANIFEST.sha256"
MAX_MANIFEST_BYTES = 2**20
MAX_TENSOR_FILE_BYTES = 2**42
_FILE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KINDS = {"schema": str, "step": int, "config_hash": str, "environment": dict, "files": dict}


class OtherRunError(CheckpointError):
    """Intact, but not for this program or configuration: falling back would hide that."""


def write_manifest(
    path: Path, step: int, config_hash: str, files: Mapping[str, tuple[int, str]]
) -> None:
    """Write the manifest of the folder `path`, then its hash, each fsync'd.

    Args:
        path: the folder.
        step: optimizer steps done.
        config_hash: of the configuration of the run.
        files: (bytes, SHA-256 in hex) of each file by name.
    """
    manifest = {
        "schema": SCHEMA,
        "step": step,
        "config_hash": config_hash,
        "environment": _environment(),
        "files": {name: {"size": size, "sha256": sha} for name, (size, sha) in files.items()},
    }
    text = (json.dumps(manifest, indent=1) + "\n").encode("ascii")
    write_file(path / MANIFEST, [text])
    write_file(path / MANIFEST_HASH, [_hash_line(text)])


def _hash_line(manifest: bytes) -> bytes:
    """The one line that `MANIFEST.sha256` must be, in the format of `sha256sum`."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode("ascii")


def _environment() -> dict[str, str | int]:
    """What bit-exact resume depends on besides the state."""
    return {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
    }


@functools.cache
def processor_name() -> str:
    """The processor's model name, or its architecture where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def read_manifest(path: Path, step: int) -> dict[str, Any]:
    """The manifest once its own hash, its form, and the names and sizes on disk agree.

    Raises:
        CheckpointError: naming what is damaged, missing or not listed.
        OtherRunError: written under another schema version.
    """
    if path.is_symlink() or not path.is_dir():
        raise CheckpointError(f"{path.name}: not a folder")
    text = read_small(path / MANIFEST, MAX_MANIFEST_BYTES)
    if read_small(path / MANIFEST_HASH, 256) != _hash_line(text):
        raise CheckpointError(f"{MANIFEST}: does not match {MANIFEST_HASH}, one is damaged")
    manifest = parse_json(text, MANIFEST)
    _check_form(manifest)
    if manifest["step"] != step:
        raise CheckpointError(f"{MANIFEST}: is of step {manifest['step']}, expected {step}")
    for name, entry in manifest["files"].items():
        try:
            size = (path / name).lstat().st_size
        except OSError as error:
            raise CheckpointError(f"{name}: cannot be read ({error.strerror})") from error
        if size != entry["size"]:
            raise CheckpointError(f"{name}: {size} bytes, expected {entry['size']} by {MANIFEST}")
    listed = {*manifest["files"], MANIFEST, MANIFEST_HASH}
    for name in sorted(entry.name for entry in path.iterdir()):
        if name not in listed and not name.startswith("."):
            raise CheckpointError(f"{name}: not listed by {MANIFEST}; remove it")
    return manifest


def _check_form(manifest: Any) -> None:
    """Raise unless the manifest has exactly the keys, types and plain names of this schema."""
    if isinstance(manifest, dict) and manifest.get("schema") != SCHEMA:
        raise OtherRunError(
            f"{MANIFEST}: got schema {manifest.get('schema')!r}, expected {SCHEMA!r}; load it "
            "with the hmpo version that wrote it"
        )
    for problem in _form_problems(manifest):
        raise CheckpointError(f"{MANIFEST}: {problem}")


def _form_problems(manifest: Any) -> Iterator[str]:
    if not isinstance(manifest, dict) or set(manifest) != set(_KINDS):
        yield f"expected exactly the keys {sorted(_KINDS)}"
        return
    for key, kind in _KINDS.items():
        if type(manifest[key]) is not kind:
            yield f"{key}: got {type(manifest[key]).__name__}, expected {kind.__name__}"
            return
    files = manifest["files"]
    if STATE_FILE not in files or len(files) > MAX_TENSOR_FILES + 1:
        yield f"got {len(files)} files, expected {STATE_FILE} and at most {MAX_TENSOR_FILES} more"
    for name, entry in files.items():
        if name != STATE_FILE and not _FILE_NAME.fullmatch(name):
            yield f"got the file name {name[:100]!r}, expected a plain lower-case *.safetensors"
        if not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
            yield f"{name}: expected exactly the keys ['sha256', 'size']"
            return
        limit = MAX_JSON_BYTES if name == STATE_FILE else MAX_TENSOR_FILE_BYTES
        if type(entry["size"]) is not int or not 0 <= entry["size"] <= limit:
            yield f"{name}: got size {entry['size']!r}, expected 0 to {limit} bytes"
        if type(entry["sha256"]) is not str or not _SHA256.fullmatch(entry["sha256"]):
            yield f"{name}: expected a SHA-256 of 64 hex digits"


def compare_environment(path: Path, saved: dict[str, Any]) -> None:
    """Warn where the machine differs from the one that saved: resume may not be bit-exact."""
    here = _environment()
    differences = [
        f"{key} {saved.get(key)!r} then, {value!r} now"
        for key, value in here.items()
        if saved.get(key) != value
    ]
    if differences:
        logger.warning("%s: resume may differ in the last bits: %s", path, "; ".join(differences))
