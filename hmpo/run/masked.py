"""Settings as a run's folder keeps them: secrets masked, paths never; and what a mask costs.

A masked setting cannot be used again: a run that is resumed, measured or started from asks for it
on the command line. No torch in here.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hmpo.config import RunConfig, to_dict
from hmpo.config.reading import run_config
from hmpo.errors import ConfigError
from hmpo.telemetry.secrets import MASK, mask_secrets

PATHS = (
    *("name", "out", "relative_to", "task.name"),
    *("policy.path", "policy.revision", "policy.start"),
)
"""Settings that are paths, commits or names of code, which are never masked."""
PATH_OPTIONS = ("path", "file", "folder", "dir")
"""Ends of the names of a task's options that are paths."""


def as_stored(config: RunConfig) -> RunConfig:
    """The configuration as config.json keeps it: secrets masked."""
    plain = to_dict(config)
    kept = mask_secrets(plain)
    for name in PATHS:
        table, _, last = name.rpartition(".")
        (kept[table] if table else kept)[last] = (plain[table] if table else plain)[last]
    kept["rewards"] = plain["rewards"]
    for name, value in plain["task"]["options"].items():
        if isinstance(value, str) and name.endswith(PATH_OPTIONS):
            kept["task"]["options"][name] = value
    return run_config(kept)


def with_masks(config: RunConfig, before: RunConfig) -> RunConfig:
    """`config` with the masks that the folder's own settings `before` hold in its place.

    What was masked once stays so in config.json, and in the hash that the checkpoints carry.
    """

    def merged(now: Any, then: Any) -> Any:
        if isinstance(now, Mapping) and isinstance(then, Mapping):
            return {name: merged(value, then.get(name)) for name, value in now.items()}
        if isinstance(now, list) and isinstance(then, list) and len(now) == len(then):
            return list(map(merged, now, then))
        return then if isinstance(then, str) and MASK in then else now

    data = to_dict(config)
    whole = merged(data, to_dict(before))
    whole["rewards"]["options"] = data["rewards"]["options"]  # never masked
    return run_config(whole)


def refuse_masked(config: RunConfig, folder: Path) -> None:
    """Refuse settings that a run's folder holds masked only.

    Args:
        config: the folder's settings, with what the user gave over them.
        folder: of the run.

    Raises:
        ConfigError: one line that names the setting and how to give it.
    """
    data = to_dict(config)
    data["task"].pop("stop")  # a stop string may be anything, and is no secret
    data["rewards"].pop("options")  # nor is a template; what looks like one is refused
    for name, value in _texts(data):
        if MASK in value:
            raise ConfigError(
                f"{folder}: {name} is masked in its config.json, as it looked like a secret; give "
                f"it again with --set {name}=..."
            )


def _texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """All texts in nested tables and lists, each with the dotted name of its setting."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, path)
