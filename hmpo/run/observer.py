"""What a run tells while it goes, and what it came to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hmpo.config import RunConfig
from hmpo.run.evaluation import Evaluation
from hmpo.types import Event


class Observer:
    """Watches a run; every method does nothing until a child overrides it."""

    def on_start(self, config: RunConfig, folder: Path, step: int) -> None:
        """The run is set up and goes on from `step`."""

    def on_rollout(self, step: int, samples: list[dict[str, Any]]) -> None:
        """A rollout was scored: prompt, completion, reward, finished of each response."""

    def on_update(self, record: dict[str, Any], timing: dict[str, float]) -> None:
        """One optimizer update is done; metrics by telemetry name."""

    def on_evaluation(self, step: int, name: str, evaluation: Evaluation) -> None:
        """Held-out prompts were measured; `name` is before, during or after."""

    def on_event(self, event: Event) -> None:
        """Something was counted: a skipped update, a reward fault, a fallback."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run came to.

    Example: `RunResult(folder=Path("runs/demo"), status="completed", step=60, ...)`.
    """

    folder: Path
    status: str
    """completed, early_stop (by its controllers), or interrupted (by a signal; resume goes on)."""
    step: int
    """Updates done."""
    before: Evaluation
    after: Evaluation | None
    signal: int | None = None
    """The signal that interrupted the run."""
