"""A run that begins with the weights of another run's checkpoint, and keeps a copy of them.

The copy lies in the run's own folder (`start/`, in the form of a checkpoint): the other run may go
on, lose its checkpoints or be deleted, and a resume still finds the weights that the reference
policy is, or that a run without a checkpoint of its own begins with again.
"""

from pathlib import Path
from typing import Any

from torch import nn

from hmpo.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from hmpo.config import RunConfig
from hmpo.errors import CheckpointError
from hmpo.models.policy import load_trained_state, trained_state
from hmpo.run.place import chosen_step, split_place

FOLDER = "start"


def load_start(model: nn.Module, config: RunConfig, own: Path | None) -> None:
    """Put the weights that a run begins with into its policy; nothing without `policy.start`.

    Args:
        model: the policy as `policy.path` gives it.
        config: the run.
        own: folder of the run where it is resumed; its copy comes first.

    Raises:
        CheckpointError: the checkpoint is gone, damaged, or of another policy.
    """
    place = config.policy.start
    if not place:
        return
    saved = None if own is None else load_checkpoint(own / FOLDER)
    if saved is None:
        run, step = split_place(place)
        saved = load_checkpoint(run / "checkpoints", step=chosen_step(run, step))
    if saved is None:
        raise CheckpointError(f"policy.start: {place} has no checkpoint; give RUN or RUN@STEP")
    state: Any = saved.state.get("model")
    if not isinstance(state, dict):
        raise CheckpointError(f"policy.start: {saved.path} holds no weights of a policy")
    try:
        load_trained_state(model, state)
    except CheckpointError as error:
        text = str(error).rpartition("; ")[0] or str(error)
        raise CheckpointError(
            f"policy.start: {text}; take the policy that {place} was trained with"
        ) from None


def keep_start(model: nn.Module, config: RunConfig, folder: Path) -> None:
    """Save the weights that the run begins with in its folder, once.

    Raises:
        StorageError: they cannot be written.
    """
    if config.policy.start and not list_checkpoints(folder / FOLDER):
        save_checkpoint(folder / FOLDER, 0, {"model": trained_state(model)}, keep=1)
