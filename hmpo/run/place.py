"""Where a run's checkpoints are: `RUN`, `RUN@STEP` or `RUN@best`. No torch in here."""

import re
from pathlib import Path
from typing import Literal

from hmpo.errors import CheckpointError
from hmpo.run.best import AFTER, best_evaluation, logged_evaluations

Step = int | Literal["best"] | None
"""Updates done, the ones that did best on held-out prompts, or the newest."""
_PLACE = re.compile(r"(?P<run>.+)@(?P<step>\d{1,18}|best)", re.DOTALL)
_STEP = re.compile(r"step-(\d{8,18})")


def split_place(text: str) -> tuple[Path, Step]:
    """A run's folder and a step from `RUN`, `RUN@STEP` or `RUN@best`, `~` expanded.

    Raises:
        CheckpointError: `~` of nobody, or a name too long.
    """
    match = _PLACE.fullmatch(text)
    try:
        whole = Path(text).expanduser()
        if whole.is_dir() or match is None:
            return whole, None
        step = match["step"]
        return Path(match["run"]).expanduser(), "best" if step == "best" else int(step)
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
    step = chosen_step(run, step)
    if step is not None and step not in saved:
        known = ", ".join(map(str, saved))
        raise CheckpointError(f"{run}: has no checkpoint of step {step}, only of {known}")
    return run.resolve(), saved[-1] if step is None else step


def chosen_step(run: Path, step: Step) -> int | None:
    """The step that is meant, or None for what the run has come to.

    Raises:
        CheckpointError: the best one is meant, and none was measured or it was not kept.
    """
    if step != "best":
        return step
    best = best_evaluation(logged_evaluations(run))
    if best is None:
        raise CheckpointError(
            f"{run}: nothing was measured after an update, so none is best; give a step, and set "
            "eval.every next time"
        )
    saved, found = saved_steps(run), int(best["step"])
    if found in saved:
        return found
    if not saved and best["eval/name"] == AFTER:
        return None  # `policy/` is just that
    known = ", ".join(map(str, saved)) or "none"
    raise CheckpointError(
        f"{run}: update {found} did best, and has no checkpoint (checkpoint.keep_best keeps it), "
        f"only {known}"
    )


def saved_steps(run: Path) -> list[int]:
    """Steps of a run's checkpoints, oldest first, not verified."""
    folder = run / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := _STEP.fullmatch(name)))
