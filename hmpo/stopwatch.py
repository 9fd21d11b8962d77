"""Where the time of a step goes: exclusive wall time by named section.

Code marks what it does with `section(name)`, as a block or over a function; whoever wants the
times makes a `Stopwatch` active. Without an active one a section costs well under a microsecond,
so it may stand on hot paths. A device is never waited for: on an accelerator a section holds the
launches made in it and the waiting that its own host reads cause.
"""

import functools
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from types import TracebackType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

PARTS = (
    "sampling",
    "rewards",
    "logprobs",
    "objective",
    "backward",
    "optimizer",
    "qk_clip",
    "telemetry",
)
"""Sections of a training step, in their order; each is `time/<name>_s` in timing.jsonl."""


def time_fields(seconds: Mapping[str, float]) -> dict[str, float]:
    """Times of the parts that ran, by telemetry name."""
    return {f"time/{name}_s": seconds[name] for name in PARTS if name in seconds}


class Stopwatch:
    """Wall time in seconds of each section that ran while it was active, less the inner ones.

    Active inside its `with` block, for the thread (or task) that entered it; blocks may be
    entered one after the other and add up. An inner section's time is its own alone, so the
    sections of one stopwatch never count a moment twice.

    Example:
        watch = Stopwatch()
        with watch:
            loss = train()
        watch.take()  # {"backward": 0.031, "optimizer": 0.004}
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """Seconds by section so far."""
        self._open: list[str] = []
        self._since = 0.0
        self._token: Token[Stopwatch | None] | None = None

    def __enter__(self) -> "Stopwatch":
        self._token = _active.set(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._token is not None, "entered first"
        _active.reset(self._token)
        self._token = None

    def take(self) -> dict[str, float]:
        """Seconds by section since the last call; starts again at nothing."""
        seconds, self.seconds = self.seconds, {}
        return seconds

    def _begin(self, name: str) -> None:
        self._charge()
        self._open.append(name)

    def _end(self) -> None:
        self._charge()
        self._open.pop()

    def _charge(self) -> None:
        """Give the time since the last call to the innermost open section."""
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


_active: ContextVar[Stopwatch | None] = ContextVar("hmpo_stopwatch", default=None)


class section:
    """Add wall time to the active `Stopwatch`; nothing without one.

    Args:
        name: of the section; one name may be used in many places.

    Example:
        with section("backward"):
            loss.backward()

        @section("telemetry")
        def report(record): ...
    """

    __slots__ = ("_name", "_watch")

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        self._watch = watch = _active.get()
        if watch is not None:
            watch._begin(self._name)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._watch is not None:
            self._watch._end()

    def __call__(self, function: Callable[P, T]) -> Callable[P, T]:
        """The function with each of its calls as a section."""
        name = self._name

        @functools.wraps(function)
        def timed(*args: P.args, **kwargs: P.kwargs) -> T:
            with section(name):  # of its own, so that calls may nest
                return function(*args, **kwargs)

        return timed
