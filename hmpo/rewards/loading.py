"""Objects named by the user: `module:name`, `path/to/file.py:name`, or a name of the library."""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from hmpo.errors import HmpoError, RewardError
from hmpo.rewards.compose import Rewards
from hmpo.rewards.library import options as library
from hmpo.rewards.parameters import NAMED, Parameters
from hmpo.rewards.values import RewardFn, nearest, one_line, shown

DYNAMIC = {"__dict__", "exec", "globals", "locals", "setattr", "vars"}
"""By these a file may define names that do not stand in it."""


def load_reward(spec: str, options: Mapping[str, Any] | None = None) -> RewardFn:
    """The reward function that `spec` names.

    Args:
        spec: `module:function`, looked up from the current folder too, or
            `path/to/file.py:function`, whose module is imported, so its code runs; or a function
            of `hmpo.rewards.library`, such as `math`.
        options: of a function of the library.

    Raises:
        RewardError: one line that says what could not be found, with the nearest name.
    """
    if library.is_named(spec):
        function = library.make(spec, options or {})
        function.prepare()
        return function
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


def check_spec(
    spec: str, options: Mapping[str, Any] | None = None, columns: Iterable[str] | None = None
) -> None:
    """Refuse a reward function that is not there, or that needs columns which are not.

    No code of the user is imported: of a file the text is read. One of the library is refused for
    a wrong option, a package that is not installed, or a column that the task does not have.

    Args:
        spec: as for `load_reward`.
        options: of a function of the library.
        columns: of the task; None where they are not known.

    Raises:
        HmpoError: one line, with the nearest name.
    """
    if not library.is_named(spec):
        function = check_defined(spec, "reward function", RewardError)
    else:
        function = library.make(spec, options or {})
    if columns is not None and function is not None:
        name = split_spec(spec)[1] or spec
        Parameters(name, function).refuse_missing([*NAMED, *columns])


def check_defined(spec: str, what: str, error: type[HmpoError]) -> RewardFn | None:
    """Refuse an object whose file does not mention it, as `check_object`; the file is not run.

    Returns:
        What has the parameters of the file's function and does nothing; None where the text alone
        does not tell them.
    """
    source, name = check_object(spec, what, error)
    if not source.endswith(".py"):
        return None
    try:
        with warnings.catch_warnings(action="ignore"):  # importing it warns
            tree = ast.parse(Path(source).read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):  # importing it tells more
        return None
    bound, dynamic = _bound(tree)
    if dynamic:
        return None
    if name not in bound:
        raise error(f"{what} {spec!r}: no {name} in {source}; {nearest(name, sorted(bound))}")
    node = next((one for one in tree.body if getattr(one, "name", "") == name), None)
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.decorator_list:
        return None
    return _StandIn(node) if bound[name] == 1 else None


class _StandIn:
    """A function's parameters, read from its text."""

    def __init__(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        kinds, given = inspect.Parameter, node.args
        placed = [(one, kinds.POSITIONAL_ONLY) for one in given.posonlyargs]
        placed += [(one, kinds.POSITIONAL_OR_KEYWORD) for one in given.args]
        needed = len(placed) - len(given.defaults)
        named = [(one, kinds.KEYWORD_ONLY) for one in given.kwonlyargs]
        optional = [k >= needed for k in range(len(placed))]
        optional += [default is not None for default in given.kw_defaults]
        found = [
            kinds(one.arg, kind, default=None if free else kinds.empty)
            for (one, kind), free in zip([*placed, *named], optional, strict=True)
        ]
        if given.kwarg is not None:
            found.append(kinds(given.kwarg.arg, kinds.VAR_KEYWORD))
        self.__signature__ = inspect.Signature(found)

    def __call__(self, **_: Any) -> list[float | None]:
        raise NotImplementedError("stands for its parameters alone")


def _bound(tree: ast.Module) -> tuple[Counter[str], bool]:
    """How often a file binds which names, and whether it may bind others by what it runs."""
    bound: Counter[str] = Counter()
    dynamic = False
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom() | ast.Import():
                names = [alias.asname or alias.name.partition(".")[0] for alias in node.names]
                dynamic |= "*" in names
                bound.update(names)
            case ast.Name(id=name) | ast.Attribute(attr=name) if name in DYNAMIC:
                dynamic = True
            case ast.Name(id=name, ctx=ast.Store()):
                bound[name] += 1
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                bound[node.name] += 1
    return bound, dynamic


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
