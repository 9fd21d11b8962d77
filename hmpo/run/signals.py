"""SIGTERM and Ctrl-C as a request that a run answers between two updates."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class StopRequest:
    """Whether the process was asked to end."""

    def __init__(self) -> None:
        self.signal: int | None = None
        """Number of the signal that asked; None so far."""

    def __bool__(self) -> bool:
        return self.signal is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take note of the first signal inside; a second one ends at once.

        Without effect outside the main thread, where Python handles no signals.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt(number)
            self.signal = number

        previous = {
            number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
