"""What happened in a run, in its log and before its audience."""

import logging
from typing import Any

from hmpo.run.ending import failure_text
from hmpo.run.files import RunFiles
from hmpo.run.observer import Audience, Observer
from hmpo.telemetry.records import event_record
from hmpo.types import Event

logger = logging.getLogger(__name__)


class Teller:
    """Writes events down and tells them.

    Args:
        files: of the run.
        observer: who watches.
    """

    def __init__(self, files: RunFiles, observer: Observer) -> None:
        self.files = files
        self.audience = Audience(observer, self._lost)
        self.trainer: Any = None
        """Where it happens, once it is there."""

    def log_events(self) -> list[Event]:
        """Write what has happened since the last call; gives it."""
        events = self.trainer.drain_events()
        for event in events:
            record = event_record(self.files.run_id, event.step, event.name, event.data)
            self.files.publish(record)
        return events

    def tell_events(self, events: list[Event]) -> None:
        """Tell what was written."""
        for event in events:
            self.audience.tell("on_event", event)

    def report_events(self) -> None:
        """Write and tell."""
        self.tell_events(self.log_events())

    def log(self, name: str, data: dict[str, Any]) -> None:
        """An event of the run, which is told as well; none where there is nothing to say."""
        if data:
            self.files.publish(event_record(self.files.run_id, self.trainer.step, name, data))
            self.tell(name, data)

    def tell(self, name: str, data: dict[str, Any]) -> None:
        """An event of this process alone (it would not occur in an undisturbed run)."""
        logger.warning("%s: %s", name, data, extra={"event": name})
        self.files.note(self.trainer.step, name, data)
        self.audience.tell("on_event", Event(name=name, step=self.trainer.step, data=data))

    def _lost(self, observer: str, error: Exception) -> None:
        """An observer failed that the run goes on without."""
        data = {"observer": observer, "why": failure_text(error)}
        logger.warning("observer_detached: %s; the run goes on without it", data)
        self.files.note(self.files.steps, "observer_detached", data)
