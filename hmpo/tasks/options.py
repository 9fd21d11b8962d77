"""Strict reading of a task's options."""

from collections.abc import Mapping
from typing import Any

from hmpo.config import TaskConfig
from hmpo.errors import TaskError
from hmpo.rewards.loading import nearest

KINDS = {
    int: "an integer",
    str: "a string",
    float: "a number",
    bool: "true or false",
    dict: "a table",
}
"""How messages call the types of options."""


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
            kind = KINDS[type(defaults[key])]
            raise TaskError(f"task.options.{key}: got {value!r}, expected {kind}")
    return {**defaults, **config.options}


def require_option(holds: bool, name: str, received: object, expected: str) -> None:
    """Raise a one-line TaskError unless `holds`."""
    if not holds:
        raise TaskError(f"task.options.{name}: got {received!r}, expected {expected}")


def stop_strings(config: TaskConfig, own: tuple[str, ...] = ("\n",)) -> tuple[str, ...]:
    """The strings that end a response: those of `config`, or the task's `own` where it has none."""
    return own if config.stop is None else config.stop
