"""Settings in layers: those of every run, those of levels, a cell's own; later ones hold.

`objective.member` is a starting point, as in a run's file: what any layer sets beside it holds.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from hmpo.config import RunConfig
from hmpo.config.overrides import refuse_deep
from hmpo.config.reading import run_config
from hmpo.errors import ConfigError
from hmpo.lab.suite.checked import a_table

OURS = ("name", "out", "seed", "relative_to")
"""Settings of a run that the suite decides."""
Layer = tuple[str, Mapping[str, Any]]
"""Where settings stand in the suite's file, and the settings."""


def a_layer(value: Any, place: str) -> Layer:
    """Settings in the sections of a run's file.

    Raises:
        ConfigError: no table, or one of the settings that a suite decides.
    """
    settings = a_table(value, place)
    refuse_deep(settings)
    for name in OURS:
        if name in settings:
            raise ConfigError(f"{place}.{name}: the suite decides it; leave it out")
    return place, settings


def refuse_clash(layers: Iterable[Layer]) -> None:
    """Refuse two levels that set the same thing, as one of them would be lost.

    Raises:
        ConfigError: one line that names both.
    """
    owners: dict[str, str] = {}
    for place, settings in layers:
        for name in leaves(settings):
            for other in (name, *_parents(name)):
                if other in owners:
                    raise ConfigError(
                        f"{place}.{name}: {owners[other]} sets {other} too; let one factor set it"
                    )
        for name in leaves(settings):
            owners[name] = place


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def leaves(settings: Mapping[str, Any], path: str = "") -> list[str]:
    """The dotted names of all values in nested tables."""
    found = []
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found += leaves(value, f"{path}{key}.")
        else:
            found.append(f"{path}{key}")
    return found


def merged(layers: Iterable[Layer]) -> dict[str, Any]:
    """All layers as one table; of a value that several set, the last one's."""
    whole: dict[str, Any] = {}
    for _, settings in layers:
        _merge(whole, settings)
    return whole


def _merge(whole: dict[str, Any], settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if isinstance(value, Mapping) and isinstance(whole.get(key), dict):
            _merge(whole[key], value)
        else:
            whole[key] = copy.deepcopy(dict(value)) if isinstance(value, Mapping) else value


def resolved(cell: str, layers: list[Layer], settings: Mapping[str, Any]) -> RunConfig:
    """The configuration that settings make, as a run's file does.

    Args:
        cell: named in a message.
        layers: what the settings were made of.
        settings: `merged(layers)`, and what the suite itself adds.

    Raises:
        ConfigError: one line that says where in the suite's file the fault is.
    """
    try:
        return run_config(settings)
    except ConfigError as error:
        name, _, problem = str(error).partition(": ")
        for place, own in reversed(layers):
            if name in {n for leaf in leaves(own) for n in (leaf, *_parents(leaf))}:
                raise ConfigError(f"{place}.{name}: {problem} (cell {cell})") from None
        raise ConfigError(f"cell {cell}: {error}") from None
