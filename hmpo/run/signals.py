"""SIGTERM, SIGHUP and Ctrl-C as a request that a run answers between two updates."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


class Stopped(KeyboardInterrupt):
    """A signal came in a block that can be left at once; its number is the argument."""


class StopRequest:
    """Whether the process was asked to end.

    Args:
        told: called with the signal's number as soon as it comes, in the midst of anything.
    """

    def __init__(self, told: Callable[[int], None] | None = None) -> None:
        self.signal: int | None = None
        """Number of the signal that asked; None so far."""
        self._told = told
        self._breakable = False
        self._unless: Callable[[], bool] = bool

    def __bool__(self) -> bool:
        return self.signal is not None

    def agreed(self, asked: bool) -> bool:
        """Take note that another process of the run was asked to end; gives `asked`."""
        if asked and self.signal is None:
            self.signal = int(signal.SIGTERM)
        return asked

    @contextlib.contextmanager
    def at_once(self, unless: Callable[[], bool] = bool) -> Iterator[None]:
        """Let a signal that comes inside, or has come before, raise `Stopped` here.

        For what changes nothing and can be done again: loading, evaluations.

        Args:
            unless: whether somebody else's code runs at the moment, which a first signal lets
                finish; `check` comes after it.
        """
        self._breakable, self._unless = True, unless
        try:
            self.check()
            yield
        finally:
            self._breakable = False

    def check(self) -> None:
        """Raise `Stopped` if a signal has come."""
        if self.signal is not None:
            raise Stopped(self.signal)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take note of the first signal inside; a second one ends at once.

        Without effect outside the main thread, where Python handles no signals. A hang-up that the
        process was started to ignore (nohup) stays ignored.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt(number)
            self.signal = number
            if self._told is not None:
                with contextlib.suppress(Exception):
                    self._told(number)
            if self._breakable and not self._unless():
                raise Stopped(number)

        previous = {number: signal.signal(number, ask) for number in _numbers()}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _numbers() -> list[int]:
    """The signals that ask for the end."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        numbers.append(hangup)
    return [int(number) for number in numbers]
