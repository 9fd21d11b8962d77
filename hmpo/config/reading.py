"""Configurations from TOML, JSON and the command line, strictly.

An unknown key, a wrong type or a value out of range gives one line that names the field:
`objective.cliplow: unknown; did you mean clip_low?`. Standard library only.
"""

import copy
import dataclasses
import json
import math
import stat
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from hmpo import members
from hmpo.config import RunConfig, to_dict
from hmpo.config.formats import file_kind
from hmpo.config.hints import unknown_member, unknown_name
from hmpo.config.overrides import apply_overrides, refuse_deep
from hmpo.errors import ConfigError, require

T = TypeVar("T")
LARGEST_FILE = 16_000_000
"""Bytes of a configuration: more is another file, given by mistake or to fill the memory."""


def load_run_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run's configuration from a TOML (or resolved JSON) file.

    Args:
        path: the file.
        overrides: `dotted.key=value` each; the value is TOML, or else taken as a string.

    Raises:
        ConfigError: one line with the file and the field.
    """
    data = read_tables(path)
    if path.suffix == ".json":
        _forget_old_defaults(data)
    elif isinstance(data, dict):
        _place(data, path)
    try:
        return run_config(data, overrides)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def config_of_text(text: str, path: Path) -> RunConfig:
    """The configuration that a TOML file would have, as `load_run_config` reads it.

    Args:
        text: of the file.
        path: where it will be.

    Raises:
        ConfigError: one line with the file and the field.
    """
    data = tomllib.loads(text)
    _place(data, path)
    try:
        return run_config(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _place(data: dict[str, Any], path: Path) -> None:
    """Let relative paths count from the folder of the file, or else from the current one."""
    folders = dict.fromkeys((str(path.expanduser().resolve().parent), str(Path.cwd())))
    data.setdefault("relative_to", list(folders))


def read_tables(path: Path) -> Any:
    """The plain values in a TOML (or JSON) file; a byte-order mark before them is passed over.

    Raises:
        ConfigError: one line with the file.
    """
    try:
        place = path.expanduser()
        state = place.stat()
        ordinary = stat.S_ISREG(state.st_mode) or stat.S_ISDIR(state.st_mode)
        if not ordinary or state.st_size > LARGEST_FILE:
            what = "larger than 16 MB" if ordinary else "no regular file"
            raise ConfigError(f"{path}: {what}; give a TOML file")
        raw = place.read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of nobody
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read ({reason}); give a TOML file") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        kind = file_kind(raw) or "not UTF-8 text"
        raise ConfigError(f"{path}: {kind}; give a TOML file") from None
    try:
        return json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:  # both decoders' own, and integers of thousands of digits
        kind, name = file_kind(raw), "JSON" if path.suffix == ".json" else "TOML"
        reason = (
            f"{kind}; give a TOML file"
            if kind
            else f"not valid {name}: {str(error).splitlines()[0]}"
        )
        raise ConfigError(f"{path}: {reason}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None


def run_config(data: Any, overrides: Iterable[str] = ()) -> RunConfig:
    """A `RunConfig` from nested plain values, with `objective.member` resolved to its preset."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"config: got {type(data).__name__}, expected a table of settings")
    refuse_deep(data)
    data = copy.deepcopy(dict(data))
    apply_overrides(data, overrides)
    refuse_deep(data)
    objective = data.get("objective")
    if isinstance(objective, dict) and "member" in objective:
        data["objective"] = _member(objective)
    return from_dict(RunConfig, data)


OLD_DEFAULTS = {"trainer": {"eos_token": 2, "pad_token": 0}, "task": {"stop": []}}
"""What older runs wrote where nothing was chosen; it says something else by now."""


def _forget_old_defaults(data: Any) -> None:
    """Take `OLD_DEFAULTS` out of the config.json of an older run (it has no `policy.attention`).

    And the estimator of a KL that has no weight: k3 stood there in every file.
    """
    if not isinstance(data, dict):
        return
    objective, name, k3 = data.get("objective"), "kl_estimator", "k3"
    if isinstance(objective, dict) and (objective.get("kl_coef"), k3) == (0, objective.get(name)):
        del objective[name]
    if "attention" in (data.get("policy") or {}):
        return
    for name, defaults in OLD_DEFAULTS.items():
        table = data.get(name)
        for key, value in defaults.items():
            if isinstance(table, dict) and table.get(key) == value:
                del table[key]


def _member(objective: Mapping[str, Any]) -> dict[str, Any]:
    """An `[objective]` table whose `member` names its starting point."""
    name = objective["member"]
    if not isinstance(name, str) or name not in members.BY_NAME:
        hint = unknown_member(name, members.BY_NAME)
        raise ConfigError(f"objective.member: got {name!r}; {hint}")
    rest = {key: value for key, value in objective.items() if key != "member"}
    start = to_dict(members.BY_NAME[name]())
    for table in ("exponent", "weight"):
        given = rest.get(table)
        if isinstance(given, Mapping) and "kind" not in given:
            rest[table] = start[table] | dict(given)
    return start | rest


def from_dict(cls: type[T], data: Any, path: str = "") -> T:
    """A configuration dataclass from nested plain values, strictly.

    Args:
        cls: a dataclass of `hmpo.config`.
        data: nested mappings, as from TOML or JSON.
        path: dotted name of `data`, used in messages.

    Raises:
        ConfigError: one line `objective.cliplow: unknown; did you mean clip_low?`.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path or 'config'}: got {data!r}, expected a table")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in data.items():
        own = str(key) if str(key).isprintable() else ascii(key)
        name = f"{path}.{own}" if path else own
        if key not in fields:
            hint = unknown_name(str(key), path, fields, RunConfig)
            raise ConfigError(f"{name}: unknown; {hint}")
        values[key] = _convert(hints[key], value, name)
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}.{error}" if path else str(error)) from None


def _convert(kind: Any, value: Any, name: str) -> Any:
    """`value` as the annotated type `kind`, or a one-line ConfigError."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return from_dict(typing.cast(type, kind), value, name)
    if origin is Literal:
        same = [a for a in args if type(a) is type(value) and a == value]
        require(bool(same), name, value, "one of " + ", ".join(repr(a) for a in args))
        return same[0]
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _convert(option, value, name)
            except ConfigError:
                continue
        raise ConfigError(f"{name}: got {value!r}, expected {_describe(kind)}")
    if origin is tuple and isinstance(value, list | tuple):
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], item, f"{name}[{i}]") for i, item in enumerate(value))
        require(len(value) == len(args), name, value, _describe(kind))
        return tuple(_convert(a, v, f"{name}[{i}]") for i, (a, v) in enumerate(zip(args, value)))
    if origin is dict and isinstance(value, Mapping):
        return _plain(value, name)
    if kind is int and isinstance(value, bool):
        raise ConfigError(f"{name}: got {value!r}, expected an integer")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(_plain(value, name))
    if isinstance(kind, type) and origin is None and isinstance(value, kind):
        return _plain(value, name)
    raise ConfigError(f"{name}: got {value!r}, expected {_describe(kind)}")


def _plain(value: Any, name: str) -> Any:
    """The value if it is fit for JSON and file names: text, 64-bit integers, finite floats."""
    if isinstance(value, Mapping):
        return {_plain(key, name): _plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, str):
        readable = "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)
        require(readable, name, value, "text without NUL and lone surrogates")
    elif isinstance(value, int):
        fits = -(2**63) <= value < 2**63
        require(fits, name, value if fits else "a larger one", "an integer of 64 bits")
    elif isinstance(value, float):
        require(math.isfinite(value), name, value, "a finite number")
    elif value is not None:
        raise ConfigError(f"{name}: got {value!r}, expected text, a number, true, false or a table")
    return value


def _describe(kind: Any) -> str:
    """A type annotation in words."""
    words: dict[type, str] = {int: "an integer", float: "a number", str: "a string"}
    words |= {bool: "true or false", type(None): "nothing"}
    args = typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_describe(a) for a in args if a is not type(None))
    if typing.get_origin(kind) is tuple:
        return f"a list of {len(args)} values" if Ellipsis not in args else "a list"
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    return words.get(kind, "a table")
