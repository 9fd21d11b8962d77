"""A policy's present weights as a file that another process reads, in memory where there is room.

Each name of a tied weight is written: a server that is given the embedding alone may keep the old
output head. Buffers that a model keeps are written too.
"""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from hmpo.errors import ModelError, StorageError, byte_size
from hmpo.models.policy import is_adapted, is_hugging_face
from hmpo.models.saving import first_line

SHARED = Path("/dev/shm")
"""Files here are memory."""
FILE = "model.safetensors"


def refuse_unservable(policy: nn.Module) -> None:
    """Refuse a policy that an engine of another project cannot be given.

    Raises:
        ModelError: one line.
    """
    kind = type(policy).__name__
    if is_adapted(policy):
        raise ModelError(
            f"policy: got adapters ({kind}), expected whole weights with rollout.engine; fold them "
            "in first: hmpo export RUN --merge"
        )
    if not is_hugging_face(policy):
        raise ModelError(
            f"policy: got {kind}, expected a transformers model with rollout.engine, which has to "
            "know its architecture"
        )


def make_folder(policy: nn.Module) -> Path:
    """A new folder with room for two copies of the weights, in memory if it fits."""
    need = 2 * sum(p.numel() * p.element_size() for p in policy.state_dict().values())
    roomy = SHARED.is_dir() and os.access(SHARED, os.W_OK)
    roomy = roomy and shutil.disk_usage(SHARED).free > need + (64 << 20)
    try:
        return Path(tempfile.mkdtemp(prefix="hmpo-engine-", dir=SHARED if roomy else None))
    except OSError as error:
        raise StorageError(f"rollout.engine: no folder for weights ({first_line(error)})") from None


def remove_folder(folder: Path) -> None:
    """Delete a folder that was made here; nothing where it is gone."""
    shutil.rmtree(folder, ignore_errors=True)


def served_weights(policy: nn.Module) -> dict[str, Tensor]:
    """All weights by their names in a checkpoint of the model, each in memory of its own."""
    weights: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, value in as_stored(policy).items():
        copy = value.detach().cpu().contiguous()
        place = copy.untyped_storage().data_ptr()
        weights[name] = copy.clone() if place in places else copy
        places.add(place)
    return weights


def as_stored(policy: nn.Module) -> dict[str, Tensor]:
    """The state under the names, and in the pieces, that files of this architecture have."""
    state = policy.state_dict()
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # a transformers in which both are the same
        return state
    return revert_weight_conversion(cast(Any, policy), state)


def write_weights(policy: nn.Module, folder: Path) -> Path:
    """Put the present weights into `folder/model.safetensors`, whole or not at all.

    Args:
        policy: a transformers model.
        folder: that a server is told of.

    Raises:
        StorageError: the disk, or the memory that stands for one, is full.
    """
    weights = served_weights(policy)
    aside = folder / f".{FILE}"
    try:
        folder.mkdir(exist_ok=True)
        save_file(weights, aside, metadata={"format": "pt"})
        aside.replace(folder / FILE)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        size = byte_size(sum(w.numel() * w.element_size() for w in weights.values()))
        raise StorageError(
            f"{folder}: no room for {size} of weights ({first_line(error)}); free some"
        ) from None
    return folder / FILE
