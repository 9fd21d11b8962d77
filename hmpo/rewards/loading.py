"""Objects named by the user: `module:name` or `path/to/file.py:name`."""

import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from hmpo.errors import HmpoError, RewardError
from hmpo.rewards.compose import Rewards
from hmpo.rewards.values import RewardFn, one_line, shown


def load_reward(spec: str) -> RewardFn:
    """The reward function that `spec` names.

    Args:
        spec: `module:function`, looked up from the current folder too, or
            `path/to/file.py:function`. The module is imported, so its code runs.

    Raises:
        RewardError: one line that says what could not be found, with the nearest name.
    """
    function = load_object(spec, "reward function", RewardError)
    if not callable(function):
        raise RewardError(f"reward function {spec!r}: got {shown(function, 60)}")
    Rewards(function)  # checks the signature
    return function


def load_object(spec: str, what: str, error: type[HmpoError]) -> Any:
    """The object behind `module:name` or `path/to/file.py:name`; failures raise `error`."""
    source, name = check_object(spec, what, error)
    is_file = source.endswith(".py")
    try:
        module = _from_file(source) if is_file else _from_name(source)
    except (Exception, SystemExit) as cause:
        text = f"{type(cause).__name__}: {one_line(cause)}"
        raise error(f"{what} {spec!r}: cannot import {source} ({text})") from cause
    if name not in vars(module):
        names = [key for key in vars(module) if not key.startswith("_")]
        raise error(f"{what} {spec!r}: no {name} in {source}; {nearest(name, names)}")
    return vars(module)[name]


def check_spec(spec: str) -> None:
    """Refuse a reward function whose file is not there; nothing is imported.

    Raises:
        RewardError: one line with the nearest name.
    """
    check_object(spec, "reward function", RewardError)


def check_object(spec: str, what: str, error: type[HmpoError]) -> tuple[str, str]:
    """Module or file and name in `module:name` or `path/to/file.py:name`, `~` expanded.

    Nothing is imported; another form, or a file that is not there, raises `error`.
    """
    source, name = split_spec(spec)
    if not source or not name:
        raise error(f"{what}: got {spec!r}, expected 'module:name' or 'path/to/file.py:name'")
    if not source.endswith(".py"):
        return source, name
    try:
        path = Path(source).expanduser()
        found = path.is_file()
    except (OSError, RuntimeError) as cause:  # a name too long, or ~ of nobody
        reason = getattr(cause, "strerror", None) or one_line(cause)
        raise error(f"{what} {spec!r}: cannot look for {source} ({reason})") from None
    if not found:
        folder = path.parent
        names = [str(other) for other in folder.glob("*.py")] if folder.is_dir() else []
        raise error(f"{what} {spec!r}: no file {source}; {nearest(source, names)}")
    return str(path), name


def split_spec(spec: str) -> tuple[str, str]:
    """Module or file, and name, in `module:name`; empty where there is none."""
    source, _, name = spec.rpartition(":")
    return source, name


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest known one, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"expected one of {one_line(', '.join(known))}" if known else "expected none"


def _from_name(source: str) -> ModuleType:
    _make_importable(Path.cwd())
    return importlib.import_module(source)


def _from_file(source: str) -> ModuleType:
    """The module of a file, imported once for each path."""
    path = Path(source).resolve()
    _make_importable(path.parent)
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a .py file always has both
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _make_importable(folder: Path) -> None:
    """Put the folder at the end of the import path, so that it shadows nothing."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
