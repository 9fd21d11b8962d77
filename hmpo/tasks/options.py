"""Strict reading of a task's options."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from hmpo.config import TaskConfig
from hmpo.errors import TaskError


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest known one, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"one of {', '.join(known) or 'none'}"


def read_options(config: TaskConfig, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`config.options` over `defaults`; unknown names and other types are refused.

    Raises:
        TaskError: one line that names the option.
    """
    for key, value in config.options.items():
        if key not in defaults:
            raise TaskError(
                f"task.options.{key}: unknown to {config.name}; {nearest(key, defaults)}"
            )
        if type(value) is not type(defaults[key]):
            kind = {int: "an integer", str: "a string", float: "a number"}[type(defaults[key])]
            raise TaskError(f"task.options.{key}: got {value!r}, expected {kind}")
    return {**defaults, **config.options}


def require_option(holds: bool, name: str, received: object, expected: str) -> None:
    """Raise a one-line TaskError unless `holds`."""
    if not holds:
        raise TaskError(f"task.options.{name}: got {received!r}, expected {expected}")
