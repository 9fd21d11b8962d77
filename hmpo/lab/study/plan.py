"""What a suite meant to run, as `suite.json` in its folder tells."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hmpo.errors import RunFolderError, TelemetryError
from hmpo.telemetry.reading import loads, reason
from hmpo.telemetry.secrets import mask_secrets

NAME = "suite.json"
MOST_BYTES = 32 * 2**20
"""Bytes of the longest suite.json that is read."""
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}")
"""Names that are safe as the name of a folder."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One configuration and its seeds.

    Example: `Cell(name="grpo+dense", levels={"member": "grpo", "task": "dense"}, seeds=(1, 2))`.
    """

    name: str
    role: str = "main"
    levels: Mapping[str, str] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Nested, as in a run's file."""
    resolved: Mapping[str, Any] = field(default_factory=dict)
    """All settings that decide what a run does, defaults too; {} where the plan does not say."""
    config_hash: str = ""
    against: str = ""
    """Cell that it is compared with; "" for none."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A suite as its report needs it.

    Example: `read_plan(Path("experiments/headline")).cell("grpo+dense").seeds`.
    """

    name: str
    hash: str = ""
    cells: tuple[Cell, ...] = ()
    factor: str = ""
    """What is compared."""
    to: tuple[str, ...] = ()
    """Its levels that the others are compared with."""
    within: tuple[str, ...] = ()
    """Factors whose levels make the blocks."""
    protocol: Mapping[str, Any] = field(default_factory=dict)
    """{} where there is none."""
    protocol_hash: str = ""
    first_protocol_hash: str = ""
    """Of the first confirmatory run; "" before it."""
    exploratory: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """Seeds by cell of runs that were not decided on before the first confirmatory one."""

    def cell(self, name: str) -> Cell | None:
        """The cell of this name, or None."""
        return next((cell for cell in self.cells if cell.name == name), None)

    @property
    def smallest(self) -> float:
        """Smallest difference of success that matters; .02 where the protocol does not say."""
        return float(self.protocol.get("smallest", 0.02))

    @property
    def alpha(self) -> float:
        """Level of the tests."""
        return float(self.protocol.get("alpha", 0.05))

    @property
    def last(self) -> int:
        """Evaluations at the end of a run whose mean is the endpoint."""
        endpoint = self.protocol.get("endpoint")
        return int(endpoint.get("last", 3)) if isinstance(endpoint, Mapping) else 3

    @property
    def crash_is_zero(self) -> bool:
        """Whether a run that failed counts as a success of 0, else it is left out."""
        return self.protocol.get("crash", "zero") == "zero"

    @property
    def unchanged(self) -> bool:
        """Whether there is a protocol, the same since the first confirmatory run."""
        return bool(self.protocol_hash) and self.first_protocol_hash in ("", self.protocol_hash)

    @property
    def registered(self) -> bool:
        """Whether there is, or was, a protocol at all; else everything is exploratory."""
        return bool(self.protocol_hash or self.first_protocol_hash)

    def confirmatory(self, cell: str, seeds: Iterable[int]) -> bool:
        """Whether all these runs were decided on, with a protocol, before the first of them."""
        return self.registered and self.exploratory.get(cell, frozenset()).isdisjoint(seeds)


def read_plan(folder: Path) -> Plan:
    """The plan of a suite's folder.

    Raises:
        RunFolderError: no such folder, or no suite.json in it.
        TelemetryError: suite.json is no JSON, of another schema, or lacks what a report needs.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        raise RunFolderError(f"{folder}: no {NAME} in it, expected the folder of a suite")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise TelemetryError(f"{path}: larger than {MOST_BYTES // 2**20} MiB")
        value = mask_secrets(loads(path.read_bytes()))
        return plan_of(value)
    except TelemetryError:
        raise
    except (OSError, ValueError) as error:
        raise TelemetryError(f"{path}: cannot be read: {reason(error)}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise TelemetryError(f"{path}: not as a suite's plan is: {error!r}") from None


def plan_of(value: Any) -> Plan:
    """The plan that the contents of a suite.json tell.

    Raises:
        ValueError, KeyError, TypeError: they are not as a suite's plan is.
    """
    if not isinstance(value, dict) or value.get("schema") != 1:
        raise ValueError("expected a JSON object with schema 1")
    compare = value.get("compare") or {}
    protocol = value.get("protocol") or {}
    plan = Plan(
        name=_text(value["name"]),
        hash=_text(value.get("hash") or ""),
        cells=tuple(_cell(cell) for cell in value["cells"]),
        factor=_text(compare.get("factor") or ""),
        to=_texts(compare.get("to") or ()),
        within=_texts(compare.get("within") or ()),
        protocol=dict(protocol),
        protocol_hash=_text(value.get("protocol_hash") or ""),
        first_protocol_hash=_text(value.get("first_protocol_hash") or ""),
        exploratory={
            _text(cell): frozenset(seeds)
            for cell, seeds in (value.get("exploratory") or {}).items()
        },
    )
    names = [cell.name for cell in plan.cells]
    if len(set(names)) < len(names):
        raise ValueError("two cells of one name")
    if not (0 < plan.alpha < 1 and 0 < plan.smallest < 1 and plan.last >= 1):
        raise ValueError("the protocol's alpha, smallest or endpoint.last is out of range")
    return plan


def _cell(value: Mapping[str, Any]) -> Cell:
    name = _text(value["name"])
    if not _PLAIN.fullmatch(name):
        raise ValueError(f"a cell named {name[:60]!r}, expected letters, digits and . _ + -")
    if not all(isinstance(seed, int) for seed in value["seeds"]):
        raise ValueError(f"cell {name}: seeds that are no integers")
    return Cell(
        name=name,
        role=_text(value.get("role") or "main"),
        levels={_text(key): _text(level) for key, level in (value.get("levels") or {}).items()},
        seeds=tuple(value["seeds"]),
        settings=dict(value.get("settings") or {}),
        resolved=dict(value.get("resolved") or {}),
        config_hash=_text(value.get("config_hash") or ""),
        against=_text(value.get("against") or ""),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} where a text was expected")
    return value


def _texts(values: Sequence[Any]) -> tuple[str, ...]:
    if isinstance(values, str):
        return (values,)
    return tuple(_text(value) for value in values)
