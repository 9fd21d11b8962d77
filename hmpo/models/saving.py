"""Writing a policy's folder so that a crash leaves the old one or the new one, never half."""

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hmpo.checkpoint.files import fsync_folder
from hmpo.errors import ModelError, StorageError
from hmpo.models.hub import no_hub
from hmpo.models.paths import is_adapter
from hmpo.models.precision import as_in_source, name_precision
from hmpo.models.quiet import quiet_transformers
from hmpo.models.source import keep_source, lasting_name

logger = logging.getLogger(__name__)

FOLDERS = ("additional_chat_templates",)
"""Folders inside a policy's own."""
OTHERS = ("checkpoints", "telemetry.jsonl", "telemetry.jsonl.gz", "trainer_state.json")
"""What a run's folder holds and a policy's does not."""


@no_hub()
def save_policy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    source: Path | None = None,
    card: str = "",
) -> Path:
    """Write the policy as a Hugging Face folder with safetensors weights.

    The folder is written aside and renamed into place; a policy that was there is replaced,
    anything else is left alone. A model with LoRA adapters is saved as adapters only, by
    peft's `save_pretrained`, with the name of the policy below them; `load_policy` reads both. Of
    several adapters (a reference beside the policy) the active one is saved.
    Whole weights have the precision that the policy was loaded from, whatever it was trained in.

    Args:
        model: a transformers model, or one wrapped by peft.
        tokenizer: saved beside it.
        folder: where; parents are made.
        source: folder of the whole policy that model and tokenizer were loaded from, where only
            weights have changed since: all but their values is then as it is there (see
            `hmpo.models.source`). None writes what model and tokenizer say now.
        card: a model card, for README.md; empty leaves it out.

    Returns:
        `folder`.

    Raises:
        ModelError: the model has no `save_pretrained`, or several active adapters, or `folder`
            holds something else.
        StorageError: the disk is full or the path cannot be written.
    """
    save = getattr(model, "save_pretrained", None)
    if save is None:
        raise ModelError(
            f"policy of type {type(model).__name__}: has no save_pretrained; expected a "
            "transformers or peft model"
        )
    adapter = not isinstance(model, PreTrainedModel)
    options = _adapter_options(model) if adapter else _whole_options(model)

    def write(aside: Path) -> None:
        with quiet_transformers():
            save(aside, **options)
        for name in options.get("selected_adapters", []):
            _lift(aside / name, aside)  # where peft puts adapters of another name than "default"
        if "state_dict" in options:
            name_precision(aside, model)
        (aside / "README.md").unlink(missing_ok=True)  # peft's blank model card
        with _own_padding_side(tokenizer):
            tokenizer.save_pretrained(aside)
        if source is not None:
            keep_source(model, source, aside, adapter=adapter)
        if card:
            (aside / "README.md").write_text(card, encoding="utf-8", newline="\n")

    return replace_folder(Path(folder), write)


def _whole_options(model: nn.Module) -> dict[str, Any]:
    """What `save_pretrained` is told of whole weights."""
    state = as_in_source(model)
    return {} if state is None else {"state_dict": state}


def _adapter_options(model: nn.Module) -> dict[str, Any]:
    """What `save_pretrained` is told of adapters, whose base's embeddings stay where they are."""
    _name_bases(model)
    logger.info("saving the LoRA adapters only; they need their base policy to load")
    return {"save_embedding_layers": False, "selected_adapters": [_active_adapter(model)]}


def _active_adapter(model: nn.Module) -> str:
    """The name of the adapters that are the policy."""
    names = list(getattr(model, "active_adapters", ["default"]))
    if len(names) != 1:
        raise ModelError(
            f"policy with the active adapters {', '.join(names) or 'none'}: expected one; choose "
            "it by model.set_adapter(name)"
        )
    return names[0]


def _lift(inner: Path, outer: Path) -> None:
    """Move the files of a folder, where there is one, into the one above it."""
    if inner.is_dir():
        for path in inner.iterdir():
            path.replace(outer / path.name)
        inner.rmdir()


def _name_bases(model: nn.Module) -> None:
    """Let adapters name the policy below them so that it is found from anywhere."""
    for settings in getattr(model, "peft_config", {}).values():
        name = settings.base_model_name_or_path
        if name and not settings.revision:  # else it is a hub's, whatever folder is here
            settings.base_model_name_or_path = lasting_name(name)


@contextlib.contextmanager
def _own_padding_side(tokenizer: Any) -> Iterator[None]:
    """The padding side of the tokenizer's source, where it names one; ours again afterwards."""
    side = tokenizer.padding_side
    tokenizer.padding_side = tokenizer.init_kwargs.get("padding_side", side)
    try:
        yield
    finally:
        tokenizer.padding_side = side


def replace_folder(folder: Path, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a new folder beside `folder`, then rename it into place.

    Raises:
        ModelError: `folder` exists and is not a policy, nor empty.
        StorageError: nothing could be written; what was there is still there.
    """
    refuse_irreplaceable(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
            aside, old = Path(work) / "new", Path(work) / "old"
            aside.mkdir()
            write(aside)
            _flush(aside)
            try:
                if folder.exists():
                    folder.replace(old)
                aside.replace(folder)
            except BaseException:  # an interrupt too must not take the older policy away
                if old.exists() and not folder.exists():
                    old.replace(folder)
                raise
            fsync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{folder}: cannot be written ({first_line(error)})") from error
    return folder


def refuse_irreplaceable(folder: Path) -> None:
    """Refuse a place that holds anything but an older policy: replacing deletes what was there.

    Raises:
        ModelError: one line.
    """
    try:
        there, why = os.path.lexists(folder), _foreign(folder)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be looked at ({first_line(error)})") from None
    if there and why:
        raise ModelError(
            f"{folder}: exists and is not a policy's folder ({why}); choose another one"
        )


def _foreign(folder: Path) -> str:
    """What tells a folder from a policy that was saved; empty for one, and for an empty folder."""
    if not folder.is_dir():
        return "no folder"
    entries = sorted(folder.iterdir())
    for path in entries:
        if path.name in OTHERS or (path.is_dir() and path.name not in FOLDERS):
            return f"it holds {path.name}"
    if not entries or is_adapter(folder):
        return ""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return "it has no config.json of a model"
    if not isinstance(settings, dict) or "model_type" not in settings:
        return "its config.json names no model_type"
    weights = any((folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json"))
    return "" if weights else "it has no model.safetensors"


def _flush(folder: Path) -> None:
    """Force the files to the disk, as readable as their folder, before it is renamed."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)  # weights come as 0600, from a temporary file
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        else:
            fsync_folder(path)
    fsync_folder(folder)


def first_line(error: BaseException) -> str:
    """An exception's first line, for one-line messages."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
