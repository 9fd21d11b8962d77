"""What a run tells while it goes, and what it came to."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hmpo.config import RunConfig
from hmpo.run.evaluation import Evaluation
from hmpo.types import Event


class Observer:
    """Watches a run; every method does nothing until a child overrides it."""

    expendable = False
    """Whether a run goes on without it when it raises, as it does without a screen."""

    def on_loading(self, config: RunConfig, what: str) -> None:
        """Something that takes a while is being set up: `what` says what."""

    def on_start(self, config: RunConfig, folder: Path, step: int) -> None:
        """The run is set up and goes on from `step`."""

    def on_rollout(self, step: int, samples: list[dict[str, Any]]) -> None:
        """A rollout was scored: prompt, completion, reward, finished of each response."""

    def on_update(self, record: dict[str, Any], timing: dict[str, float]) -> None:
        """One optimizer update is done; metrics by telemetry name."""

    def on_measuring(self, step: int, name: str, done: int, total: int) -> None:
        """An evaluation is under way: `done` of `total` responses are sampled and scored."""

    def on_evaluation(self, step: int, name: str, evaluation: Evaluation) -> None:
        """Held-out prompts were measured; `name` is before, during or after."""

    def on_event(self, event: Event) -> None:
        """Something was counted: a skipped update, a reward fault, a fallback."""

    def on_stop(self, signal: int) -> None:
        """A signal asked for the end. Called in the midst of anything, so do next to nothing."""


class Audience:
    """An observer that is let go of where it fails and may.

    Args:
        observer: who watches.
        lost: told its kind and what it raised.
    """

    def __init__(self, observer: Observer, lost: Callable[[str, Exception], None]) -> None:
        self._observer, self._lost = observer, lost

    def tell(self, method: str, *told: Any) -> None:
        """Call a method of the observer.

        Raises:
            Exception: the observer's own, unless it is expendable.
        """
        try:
            getattr(self._observer, method)(*told)
        except Exception as error:
            if not self._observer.expendable:
                raise
            observer, self._observer = self._observer, Observer()
            self._lost(type(observer).__name__, error)


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
    before: Evaluation | None
    """None where a signal came before it was measured."""
    after: Evaluation | None
    signal: int | None = None
    """The signal that interrupted the run."""
    warning: str = ""
    """What the run lacked to learn from; empty where there was a signal."""
