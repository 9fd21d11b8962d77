"""One call of one reward function, and what its return value is worth.

`call_reward` never raises for a fault of the function: faults are data, because they may have
to cross a process border and because the caller decides between raising and dropping.
"""

import asyncio
import atexit
import difflib
import inspect
import math
import numbers
import os
import re
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from hmpo.errors import HmpoError, RewardError
from hmpo.rewards.host import Notes, RewardTrainerState

RewardFn = Callable[..., Any]
"""`(prompts, completions, completion_ids, **columns) -> list[float | None]`, sync or async."""

LIMIT = 1e9
"""Largest magnitude of a reward: the squares of larger ones overflow float32 statistics."""


class UsageError(RewardError):
    """A fault of the caller, never of the function: raised whatever the policy on faults."""


MODEST = f"expected at most {LIMIT:g} in magnitude; rescale the reward"
ADVICE = "return None where the function does not apply"
OWN_NAME = re.compile(r"^reward '[^']*': ")
"""What the library's own errors begin with, where the name is said already."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What was wrong with one sample, or (sample None) with the whole return.

    Example: `Fault(kind="reward_nonfinite", sample=3, detail="got nan, expected ...")`.
    """

    kind: str
    sample: int | None
    detail: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Values of N samples (None: not applicable, nan: faulty) and the faults.

    Example: `Outcome(values=[1.0, None], faults=[])`.
    """

    values: list[float | None]
    faults: list[Fault]
    cause: BaseException | None = None
    """The exception behind a fault, where it happened in this process."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the function told by `log_metric`."""
    extras: dict[str, list[Any]] = field(default_factory=dict)
    """What it told by `log_extra`: by column, N values."""


@runtime_checkable
class _Array(Protocol):
    """NumPy arrays and scalars and torch tensors, without importing either."""

    @property
    def ndim(self) -> int: ...

    def tolist(self) -> Any: ...


def failed(kind: str, detail: str, count: int, cause: BaseException | None = None) -> Outcome:
    """The outcome of a call that gave nothing usable for any of its `count` samples."""
    fault = Fault(kind=kind, sample=None, detail=detail)
    return Outcome(values=[math.nan] * count, faults=[fault], cause=cause)


def one_line(text: object, limit: int = 200) -> str:
    """The text on one line, cut to `limit` characters."""
    try:
        line = " ".join(str(text).split())
    except Exception as error:  # code of others, also in `str`
        line = f"a {type(text).__name__} whose text raises {type(error).__name__}"
    return line if len(line) <= limit else line[: limit - 3] + "..."


class EventLoop:
    """One event loop for async reward functions, made when the first one is called.

    Clients, locks and semaphores that a function keeps between calls are bound to the loop that
    they first met, so it lives as long as whoever calls the functions. Where another loop runs in
    the caller's thread, as in a notebook, it is run by a thread beside it.
    """

    def __init__(self) -> None:
        self._end: weakref.finalize | None = None

    def run(self, awaitable: Any) -> Any:
        """What the awaitable gives."""

        async def result() -> Any:
            return await awaitable

        _close_left()
        if self._end is None or not self._end.alive:
            self._runner = asyncio.Runner()
            _open[id(self._runner)] = self._runner, os.getpid()
            self._end = weakref.finalize(self, _left.append, id(self._runner))
        return _aside(lambda: self._runner.run(result()), self._cancel)

    def close(self) -> None:
        """End it, what still runs in it included; a later call makes a new one."""
        if self._end is not None and self._end.detach() is not None:
            _close(id(self._runner))

    def _cancel(self) -> None:
        """Cancel what runs in it, from another thread."""
        loop = self._runner.get_loop()
        loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])


def _aside(call: Callable[[], Any], cancel: Callable[[], Any] | None = None) -> Any:
    """What `call` gives, in a thread of its own where an event loop runs in this one.

    An interrupt of the wait for it is handed on by `cancel`.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return call()
    with ThreadPoolExecutor(1, "hmpo rewards") as pool:
        future = pool.submit(call)
        try:
            return future.result()
        except BaseException:
            if cancel is not None and not future.done():
                cancel()
            raise


_open: dict[int, tuple[asyncio.Runner, int]] = {}
"""Loops that are not closed, each with the process that made it, by the id of their runner."""
_left: deque[int] = deque()
"""Those among them whose owner is gone: garbage is collected anywhere, also where this thread holds
a lock that closing would wait for, so they are closed later."""


def _close(key: int) -> None:
    """Close a loop, in the process that made it only."""
    runner, owner = _open.pop(key, (None, 0))
    if runner is not None and os.getpid() == owner:
        _aside(runner.close)


def _close_left() -> None:
    """Close the loops whose owners are gone."""
    while _left:
        _close(_left.popleft())


@atexit.register
def _close_all() -> None:
    """Close what is open as the process ends."""
    for key in list(_open):
        _close(key)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest known one, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"expected one of {one_line(', '.join(known))}" if known else "expected none"


def shown(value: object, limit: int) -> str:
    """`repr` of a value on one line, whatever its own `repr` does."""
    try:
        return one_line(repr(value), limit)
    except Exception as error:
        return f"its repr raises {type(error).__name__}"


def call_reward(
    function: RewardFn,
    arguments: Mapping[str, Any],
    count: int,
    loop: EventLoop | None = None,
    *,
    asked: Collection[str] = (),
    state: RewardTrainerState | None = None,
) -> Outcome:
    """Call the function by keyword (awaiting what it returns, if need be) and read its return.

    Args:
        function: sync or async.
        arguments: its keyword arguments.
        count: number of samples.
        loop: for async functions; None makes one for this call.
        asked: names of `host.SUPPLIED` that the function takes.
        state: how far the training is.
    """
    notes = Notes(count)
    supplied = notes.supply(asked, state or RewardTrainerState(global_step=0))
    try:
        raw = function(**arguments, **supplied)
        if inspect.isawaitable(raw):
            raw = _await(raw, loop)
        outcome = read_values(raw, count)
        return replace(outcome, metrics=notes.metrics, extras=notes.extras)
    except (UsageError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit, GeneratorExit, CancelledError: faults like others
        return failed("reward_exception", _describe(error), count, error)


def _await(awaitable: Any, loop: EventLoop | None) -> Any:
    """Run an awaitable to its end, in the given event loop or in one of its own."""
    if loop is not None:
        return loop.run(awaitable)
    own = EventLoop()
    try:
        return own.run(awaitable)
    finally:
        own.close()


def _describe(error: BaseException) -> str:
    """An exception in one line: the library's own as it is, others with where they came from."""
    if isinstance(error, HmpoError):
        return OWN_NAME.sub("", one_line(error))
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = "" if frame.filename == __file__ else f" ({Path(frame.filename).name}:{frame.lineno})"
    text = one_line(error)
    said = f": {text}" if text else ""
    return f"raised {type(error).__name__}{said}{place}, expected a list of numbers; fix it"


def read_values(raw: Any, count: int) -> Outcome:
    """Read the return of a reward function that was given `count` samples.

    Lists, tuples and 1-d arrays or tensors of numbers, bools and None are fine; everything else
    is a fault.
    """
    expected = f"expected a list of {count} numbers"
    if raw is None:
        return failed("reward_type", f"got None, {expected}; is a return missing?", count)
    if isinstance(raw, _Array):
        if raw.ndim != 1:
            detail = f"got an array of {raw.ndim} dimensions, {expected}; one for each completion"
            return failed("reward_type", detail, count)
        raw = raw.tolist()
    if not isinstance(raw, list | tuple):
        detail = f"got {_kind(raw)}, {expected}; one for each completion, in order"
        return failed("reward_type", detail, count)
    if len(raw) != count:
        detail = f"got {len(raw)} rewards, {expected}; one for each completion"
        return failed("reward_length", detail, count)
    values: list[float | None] = []
    faults: list[Fault] = []
    for sample, item in enumerate(raw):
        value, kind, detail = _read_one(item)
        values.append(value)
        if kind:
            faults.append(Fault(kind=kind, sample=sample, detail=detail))
    return Outcome(values=values, faults=faults)


def _read_one(item: Any) -> tuple[float | None, str, str]:
    """Value of one entry (nan where faulty), and its fault's kind and detail."""
    if item is None:
        return None, "", ""
    if isinstance(item, _Array) and item.ndim == 0:
        item = item.tolist()
    if not isinstance(item, numbers.Real):
        return math.nan, "reward_type", f"got {_kind(item)}, expected a number; {ADVICE}"
    try:
        value = float(item)
    except OverflowError:
        return math.nan, "reward_out_of_range", f"got an integer beyond every float, {MODEST}"
    if not math.isfinite(value):
        return math.nan, "reward_nonfinite", f"got {value}, expected a finite number; {ADVICE}"
    if abs(value) > LIMIT:
        return math.nan, "reward_out_of_range", f"got {value:g}, {MODEST}"
    return value, "", ""


def _kind(value: Any) -> str:
    """Type and value of something unusable, in a few words."""
    name = type(value).__name__
    article = "an" if name[0] in "aeiou" else "a"
    return f"{article} {name} ({shown(value, 40)})"
