"""Where the relative paths of a configuration are, whatever folder a command is typed in."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hmpo.config import RunConfig

BUNDLED = ("tiny-sort", "smollm2")
"""Policies that are found by their names, not as paths."""
SPLITS = ("train", "held_out")
"""Options of the task `data`: files, or beside a `dataset` the names of its splits."""
FILES = ("dataset", *SPLITS)


def located(config: RunConfig) -> RunConfig:
    """The configuration with the paths of policy, data and code as they are found.

    A relative path counts from the first folder of `relative_to` that holds it; one that none
    holds, and one whose folders are unknown, stays as it is: it counts from the current folder.
    Only what is used is located: what decides a run's hash stays as it was written.
    """
    folders = [Path(folder) for folder in config.relative_to]
    if not folders:
        return config
    policy = config.policy
    if policy.path not in BUNDLED and not policy.revision:  # which a hub's has alone
        policy = dataclasses.replace(policy, path=_found(policy.path, folders))
    if policy.start:
        run, at, step = policy.start.rpartition("@")
        whole = not (run and (step.isdigit() or step == "best"))
        start = _found(policy.start, folders) if whole else f"{_found(run, folders)}{at}{step}"
        policy = dataclasses.replace(policy, start=start)
    splits = SPLITS if "dataset" in config.task.options else ()
    options = {
        name: value if name in splits else _option(name, value, folders)
        for name, value in config.task.options.items()
    }
    task = dataclasses.replace(
        config.task,
        name=_code(config.task.name, folders),
        environment=_code(config.task.environment, folders),
        options=options,
    )
    functions = tuple(_code(spec, folders) for spec in config.rewards.functions)
    tables = {
        function: {
            name: _found(value, folders) if isinstance(value, str) and is_path_name(name) else value
            for name, value in table.items()
        }
        for function, table in config.rewards.options.items()
    }
    rewards = dataclasses.replace(config.rewards, functions=functions, options=tables)
    return dataclasses.replace(config, policy=policy, task=task, rewards=rewards)


def _option(name: str, value: Any, folders: Iterable[Path]) -> Any:
    """An option with the files that it names, one or a list, as they are found."""
    if isinstance(value, list):
        return [_option(name, item, folders) for item in value]
    return _found(value, folders) if isinstance(value, str) and _is_path(name, value) else value


def _is_path(name: str, value: str) -> bool:
    """Whether an option names a file: by its own name, or as it is written."""
    return name in FILES or is_path_name(name) or "/" in value or "\\" in value


def is_path_name(name: str) -> bool:
    """Whether an option of this name holds a path."""
    return name.endswith(("path", "file", "folder", "dir"))


def _code(spec: str, folders: Iterable[Path]) -> str:
    """`file.py:name` with the file as it is found; a module's name as it is."""
    source, colon, name = spec.rpartition(":")
    return f"{_found(source, folders)}{colon}{name}" if source.endswith(".py") else spec


def _found(text: str, folders: Iterable[Path]) -> str:
    """A relative path below the first folder that holds it, absolute; else the text as it is."""
    if not text or text.startswith("~") or Path(text).is_absolute():
        return text
    for folder in folders:
        try:
            if (folder / text).exists():
                return str(folder / text)
        except OSError:  # a name too long is no path
            return text
    return text
