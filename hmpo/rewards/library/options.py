"""Functions of the library by name, with the options of a configuration."""

import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hmpo.errors import ConfigError, HmpoError, RewardError
from hmpo.rewards import library
from hmpo.rewards.library.base import LibraryReward
from hmpo.rewards.values import nearest, shown

ACTING = ("judge", "unit_tests")
"""Functions that do more than look: they send prompts and a key away, or run what is written."""

KINDS = {int: "an integer", str: "a string", float: "a number", bool: "true or false"}


def is_named(spec: str) -> bool:
    """Whether a function's name has the form of one of the library: no `module:`, no file."""
    return ":" not in spec and not spec.endswith(".py")


def factory_name(spec: str, options: Mapping[str, Any]) -> str:
    """The library's function behind a name: its own, or what `function` in its options names.

    Raises:
        RewardError: there is none; one line with the nearest name.
    """
    name = options.get("function", spec)
    if not spec.isidentifier():
        raise RewardError(
            f"reward function {spec!r}: expected 'module:name', 'path/to/file.py:name' or a name "
            "of the library"
        )
    if name not in library.__all__:
        raise RewardError(
            f"reward function {name!r}: none of the library, {nearest(str(name), library.__all__)} "
            "or else expected 'module:name' or 'path/to/file.py:name'"
        )
    return name


def make(spec: str, options: Mapping[str, Any]) -> LibraryReward:
    """The function of the library that a configuration names; nothing heavy is imported.

    Args:
        spec: its name, or another one whose options hold `function`.
        options: keywords of its factory.

    Raises:
        HmpoError: one line that names the option, the package or the file that is wrong.
    """
    factory = getattr(library, factory_name(spec, options))
    table = f"rewards.options.{spec}"
    given = _checked(factory, {k: v for k, v in options.items() if k != "function"}, table)
    try:
        function = factory(**given)
    except HmpoError as error:
        raise type(error)(f"{table}: {error}" if "function" in options else str(error)) from None
    function.__name__ = spec
    return function


def _checked(factory: Callable[..., Any], options: Mapping[str, Any], table: str) -> dict[str, Any]:
    """The options as the factory's signature wants them."""
    parameters = inspect.signature(factory).parameters
    hints = typing.get_type_hints(factory)
    for name, value in options.items():
        if name not in parameters:
            raise ConfigError(f"{table}.{name}: unknown; {nearest(name, parameters)}")
        if not _fits(value, hints[name]):
            expected = _words(hints[name])
            raise ConfigError(f"{table}.{name}: got {shown(value, 60)}, expected {expected}")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in options:
            raise ConfigError(f"{table}.{name}: not given, expected {_words(hints[name])}")
    return {k: float(v) if hints[k] is float else v for k, v in options.items()}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of an annotated type."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(hint))
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if origin is not None and issubclass(origin, Sequence):
        (kind,) = typing.get_args(hint)
        return isinstance(value, list | tuple) and all(_fits(one, kind) for one in value)
    if hint is float:
        return type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)
    return type(value) is hint


def _words(hint: Any) -> str:
    """An annotated type in words."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [one for one in typing.get_args(hint) if one is not types.NoneType]
        return " or ".join(map(_words, kinds))
    if origin is not None:
        return "a table" if issubclass(origin, Mapping) else "a list of strings"
    return KINDS.get(hint, "a value")
