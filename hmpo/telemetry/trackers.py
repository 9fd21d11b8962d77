"""Trackers that a run does without once they fail: what is logged there never ends a training."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any


class Trackers:
    """Hands every record to several sinks; one that raises is let go of, and that is told.

    Args:
        sinks: the trackers.
        lost: told the kind of a tracker and what it raised, once for each.
    """

    def __init__(self, sinks: Iterable[Any], lost: Callable[[str, Exception], None]) -> None:
        self.sinks = list(sinks)
        self._lost = lost

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one record."""
        for sink in tuple(self.sinks):
            try:
                sink.write(record)
            except Exception as error:
                self._let_go(sink, error)

    def flush(self) -> None:
        """Flush every sink."""
        for sink in tuple(self.sinks):
            try:
                sink.flush()
            except Exception as error:
                self._let_go(sink, error)

    def close(self) -> None:
        """Close every sink; calling it twice is harmless."""
        while self.sinks:
            sink = self.sinks.pop()
            try:
                sink.close()
            except Exception as error:
                self._lost(type(sink).__name__, error)

    def _let_go(self, sink: Any, error: Exception) -> None:
        """Go on without a tracker; what it does when it is closed no longer matters."""
        self.sinks.remove(sink)
        self._lost(type(sink).__name__, error)
        try:
            sink.close()
        except Exception:  # it has failed already, which was told
            return
