"""Where a run's checkpoints are: `RUN` or `RUN@STEP`. No torch in here."""

import re
from pathlib import Path

from hmpo.errors import CheckpointError

_PLACE = re.compile(r"(?P<run>.+)@(?P<step>\d{1,18})", re.DOTALL)
_STEP = re.compile(r"step-(\d{8,18})")


def split_place(text: str) -> tuple[Path, int | None]:
    """A run's folder and a step from `RUN` or `RUN@STEP`, `~` expanded.

    Raises:
        CheckpointError: `~` of nobody, or a name too long.
    """
    match = _PLACE.fullmatch(text)
    try:
        whole = Path(text).expanduser()
        if whole.is_dir() or match is None:
            return whole, None
        return Path(match["run"]).expanduser(), int(match["step"])
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise CheckpointError(f"{text[:200]}: {reason}; give RUN or RUN@STEP") from None


def found_place(text: str) -> tuple[Path, int]:
    """The folder of a run, absolute, and the step of a checkpoint: the newest where none is given.

    Raises:
        CheckpointError: no such run, or no checkpoint (of this step) in it.
    """
    run, step = split_place(text)
    if not (run / "config.json").is_file():
        what = "holds no run (no config.json)" if run.is_dir() else "no such folder"
        raise CheckpointError(f"{run}: {what}, expected RUN or RUN@STEP")
    saved = saved_steps(run)
    if not saved:
        policy = run / "policy"
        remedy = "let it save one first (checkpoint.every)"
        if policy.is_dir():
            remedy = f"start from its policy instead: --set policy.path={policy}"
        raise CheckpointError(f"{run}: has no checkpoint; {remedy}")
    if step is not None and step not in saved:
        known = ", ".join(map(str, saved))
        raise CheckpointError(f"{run}: has no checkpoint of step {step}, only of {known}")
    return run.resolve(), saved[-1] if step is None else step


def saved_steps(run: Path) -> list[int]:
    """Steps of a run's checkpoints, oldest first, not verified."""
    folder = run / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := _STEP.fullmatch(name)))
