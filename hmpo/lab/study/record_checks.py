"""Whether what a file holds is the record of a run: everything that the tables rely on."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from hmpo.errors import TelemetryError

SCHEMA = 1
STATUSES = ("finished", "failed", "stopped")
ROLES = ("main", "tuning", "again", "negative", "positive", "placebo", "null")
_KINDS: dict[str, type | tuple[type, ...]] = {
    "suite": str,
    "cell": str,
    "role": str,
    "levels": dict,
    "seed": int,
    "status": str,
    "reason": str,
    "config_hash": str,
    "registered": str,
    "updates": int,
    "tokens": int,
    "evals": dict,
    "before": dict,
    "after": dict,
    "passed": list,
    "heldout": (str, type(None)),
    "metrics": dict,
    "reward": dict,
    "curves": dict,
    "decisions": dict,
    "weights": str,
    "cost": dict,
    "environment": dict,
}


def check(value: Mapping[str, Any]) -> None:
    """Refuse what the tables could not use.

    Raises:
        TelemetryError: another schema, or an entry that is missing or of a wrong kind.
    """
    if value.get("schema") != SCHEMA:
        raise TelemetryError(f"outcome: schema {value.get('schema')!r}, expected {SCHEMA}")
    for name, kind in _KINDS.items():
        if name not in value and name in ("cell", "seed", "status"):
            raise TelemetryError(f"outcome: no entry {name!r}")
        item = value.get(name)
        if name in value and (not isinstance(item, kind) or isinstance(item, bool)):
            raise TelemetryError(f"outcome: {name} is {_short(item)}, expected another kind")
    for name, known in (("status", STATUSES), ("role", ROLES)):
        if name in value and value[name] not in known:
            expected = ", ".join(known)
            raise TelemetryError(
                f"outcome: {name} is {_short(value[name])}, expected one of {expected}"
            )
    if not all(isinstance(level, str) for level in value.get("levels", {}).values()):
        raise TelemetryError("outcome: levels holds another kind than texts")
    for text in value.get("passed", []):
        if not isinstance(text, str) or not re.fullmatch("[0-9a-f]*", text):
            raise TelemetryError(f"outcome: passed holds {_short(text)}, expected hex digits")
    for name in ("metrics", "cost", "before", "after"):
        _numbers(name, value.get(name, {}).values())
    _decided(value.get("decisions", {}))
    for name in ("evals", "reward", "curves"):
        _columns(name, value.get(name, {}))
    evals = value.get("evals", {})
    if evals and None in evals.get("tokens", [None]):
        raise TelemetryError("outcome: evals has no number of tokens for each evaluation")


def _decided(value: Mapping[str, Any]) -> None:
    """Counts that are numbers, and states and marks that are pairs of step and text."""
    actions = value.get("actions", {})
    if not isinstance(actions, dict):
        raise TelemetryError(f"outcome: decisions.actions is {_short(actions)}, expected a table")
    _numbers("decisions.actions", actions.values())
    _numbers("decisions", [value.get(name) for name in ("count", "applied", "end")])
    for name in ("marks", "stop", "regime", "phase"):
        pairs = value.get(name, [])
        fine = isinstance(pairs, list) and all(
            isinstance(pair, list) and list(map(type, pair)) == [int, str] for pair in pairs
        )
        if not fine:
            raise TelemetryError(f"outcome: decisions.{name} holds no pairs of step and text")


def _columns(name: str, table: Mapping[str, Any]) -> None:
    """Columns of numbers or None, all of one length, with a `step` for each."""
    if not all(isinstance(column, list) for column in table.values()):
        raise TelemetryError(f"outcome: {name} holds another kind than lists")
    if len({len(column) for column in table.values()}) > 1 or (table and "step" not in table):
        raise TelemetryError(f"outcome: the lists of {name} do not belong together")
    for column in table.values():
        _numbers(name, column)
    if any(step is None for step in table.get("step", [])):
        raise TelemetryError(f"outcome: {name} holds a step that is no number")


def _numbers(name: str, values: Iterable[Any]) -> None:
    for item in values:
        fine = item is None or (isinstance(item, int | float) and not isinstance(item, bool))
        if not fine or (isinstance(item, float) and not math.isfinite(item)):
            raise TelemetryError(f"outcome: {name} holds {_short(item)}, expected numbers")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
