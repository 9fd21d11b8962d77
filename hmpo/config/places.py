"""Where the relative paths of a configuration are, whatever folder a command is typed in."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from hmpo.config import RunConfig

BUNDLED = ("tiny-sort", "smollm2")
"""Policies that are found by their names, not as paths."""


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
    if policy.path not in BUNDLED:
        policy = dataclasses.replace(policy, path=_found(policy.path, folders))
    if policy.start:
        run, at, step = policy.start.rpartition("@")
        whole = not (run and step.isdigit())
        start = _found(policy.start, folders) if whole else f"{_found(run, folders)}{at}{step}"
        policy = dataclasses.replace(policy, start=start)
    options = {
        name: _found(value, folders) if isinstance(value, str) and _is_path(name, value) else value
        for name, value in config.task.options.items()
    }
    task = dataclasses.replace(
        config.task,
        name=_code(config.task.name, folders),
        environment=_code(config.task.environment, folders),
        options=options,
    )
    functions = tuple(_code(spec, folders) for spec in config.rewards.functions)
    rewards = dataclasses.replace(config.rewards, functions=functions)
    return dataclasses.replace(config, policy=policy, task=task, rewards=rewards)


def _is_path(name: str, value: str) -> bool:
    """Whether an option names a file: by its own name, or as it is written."""
    return name.endswith(("path", "file", "folder", "dir")) or "/" in value or "\\" in value


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
