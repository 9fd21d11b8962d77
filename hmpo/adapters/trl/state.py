"""What our trainer puts beside TRL's own state in a checkpoint, and what it takes from there."""

import logging
from pathlib import Path
from typing import Any

from hmpo.adapters.trl.log import TelemetryLog
from hmpo.checkpoint import load_checkpoint, save_checkpoint
from hmpo.config import to_dict
from hmpo.config.objective import ObjectiveConfig
from hmpo.errors import CheckpointError
from hmpo.objective.in_force import ObjectiveInForce

logger = logging.getLogger(__name__)

STATE_FOLDER = "hmpo"
"""In a checkpoint folder: what the exponent has learned, and the length of the log."""


def save_state(
    folder: Path,
    step: int,
    objective: ObjectiveConfig,
    in_force: ObjectiveInForce,
    log: TelemetryLog,
    rollouts: int,
) -> None:
    """Write our state of `step` updates into the checkpoint `folder`."""
    state = {
        **in_force.state_dict(),
        "objective": to_dict(objective),
        "rollouts": rollouts,
        "telemetry": log.offset(),
        "run_id": log.run_id,
    }
    save_checkpoint(folder / STATE_FOLDER, step, state, keep=1)


def load_state(
    folder: Path, objective: ObjectiveConfig, in_force: ObjectiveInForce, log: TelemetryLog
) -> int:
    """Go on where `save_state` was called; returns the rollouts done.

    Raises:
        CheckpointError: the checkpoint lacks a state that the objective needs, or has one of
            another objective that would be dropped.
    """
    path = folder / STATE_FOLDER
    saved = load_checkpoint(path)
    if saved is None:
        if in_force.state_dict()["exponent"] or objective.clip_share is not None:
            raise CheckpointError(
                f"{path}: missing, expected the state of the exponent or of the calibrated clip; "
                "resume from a checkpoint of PowerMeanGRPOTrainer"
            )
        return 0
    state = saved.state
    _refuse_other_state(path, state, objective, in_force)
    _tell_changes(path, state.get("objective"), objective)
    in_force.load_state_dict(state)
    log.resume_at, log.resumed_id = state["telemetry"], state.get("run_id")
    return state["rollouts"]


def _refuse_other_state(
    path: Path, state: dict[str, Any], objective: ObjectiveConfig, in_force: ObjectiveInForce
) -> None:
    """Refuse what would be dropped, or begin anew, without a word."""
    own = in_force.state_dict()["exponent"]
    then = state.get("objective") or {}
    if set(state["exponent"]) != set(own):
        kind = then.get("exponent", {}).get("kind", f"one with {sorted(state['exponent'])}")
        raise CheckpointError(
            f"{path}: the state of exponent.kind {kind!r}, expected that of "
            f"{objective.exponent.kind!r}; resume with the exponent of the checkpoint, or start a "
            "new run from its weights (the folder as the model)"
        )
    seen = state["calibration"]["scale"] is not None or bool(state["calibration"]["scales"])
    calibrated = then["clip_share"] is not None if then else seen
    if calibrated != (objective.clip_share is not None) and (calibrated or then):
        raise CheckpointError(
            f"{path}: saved {'with' if calibrated else 'without'} a calibrated clip, expected "
            f"clip_share = {objective.clip_share}; resume with the clip of the checkpoint, or "
            "start a new run from its weights (the folder as the model)"
        )


def _tell_changes(path: Path, then: dict[str, Any] | None, objective: ObjectiveConfig) -> None:
    """Warn of every setting of the objective that is not the checkpoint's."""
    if then is None:
        return
    now = to_dict(objective)
    for name in now:
        if name in then and now[name] != then[name]:
            logger.warning(
                "%s: resumed with objective.%s = %r, saved with %r",
                path,
                name,
                now[name],
                then[name],
            )
