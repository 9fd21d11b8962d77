"""What was decided before the first run that counts: the protocol's file, and its hash.

A suite keeps the hash that the protocol had when its first confirmatory run began. Whatever begins
under another protocol, or was not in the suite then, is exploratory.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hmpo.config.reading import read_tables
from hmpo.errors import ConfigError, require
from hmpo.lab.suite.checked import (
    a_count,
    a_list,
    a_number,
    a_table,
    a_text,
    refuse_unknown,
    seeds_of,
)

KEYS = (
    "title",
    "date",
    "endpoint",
    "smallest",
    "alpha",
    "test",
    "crash",
    "tasks",
    "methods",
    "notes",
    "hypotheses",
    "tuning",
)
HYPOTHESIS = ("id", "claim", "prediction", "suite")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A protocol's file, whole.

    Example: `read_protocol(Path("protocol.toml")).data["smallest"]`.
    """

    sha256: str
    """Of the file's bytes."""
    data: dict[str, Any] = field(default_factory=dict)
    """Its values, with the defaults of `endpoint`, `smallest`, `alpha`, `test` and `crash`."""


DEFAULTS: dict[str, Any] = {
    "title": "",
    "date": "",
    "endpoint": {"last": 3},
    "smallest": 0.02,
    "alpha": 0.05,
    "test": "paired t, Holm within a block; equivalence by two one-sided tests",
    "crash": "zero",
    "hypotheses": [],
}


def read_protocol(path: Path) -> Protocol:
    """Read a protocol strictly.

    Args:
        path: a TOML (or JSON) file.

    Raises:
        ConfigError: one line with the file and the place in it.
    """
    data = read_tables(path)
    try:
        checked = _checked(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return Protocol(sha256=hashlib.sha256(path.expanduser().read_bytes()).hexdigest(), data=checked)


def _checked(data: Any) -> dict[str, Any]:
    table = a_table(data, "protocol")
    refuse_unknown(table, KEYS, "")
    whole = DEFAULTS | table
    for name in ("title", "test", "notes"):
        a_text(whole.get(name, ""), name)
    whole["date"] = str(whole["date"])  # TOML has dates without quotes too
    endpoint = a_table(whole["endpoint"], "endpoint")
    refuse_unknown(endpoint, ("last",), "endpoint")
    whole["endpoint"] = {"last": a_count(endpoint.get("last", 3), "endpoint.last")}
    a_number(whole["smallest"], "smallest", 1e-9, 1)
    a_number(whole["alpha"], "alpha", 1e-9, 0.25)
    crash = whole["crash"]
    require(crash in ("zero", "left_out"), "crash", crash, "zero (of success) or left_out")
    for name in ("tasks", "methods"):
        for item in a_list(whole.get(name, []), name):
            a_text(item, name)
    whole["hypotheses"] = _hypotheses(whole["hypotheses"])
    if "tuning" in whole:
        whole["tuning"] = _tuning(whole["tuning"])
    return whole


def _hypotheses(value: Any) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    for number, item in enumerate(a_list(value, "hypotheses", "tables, [[hypotheses]] each")):
        place = f"hypotheses[{number}]"
        table = a_table(item, place)
        refuse_unknown(table, HYPOTHESIS, place)
        one = {key: a_text(table.get(key, ""), f"{place}.{key}") for key in HYPOTHESIS}
        require(bool(one["id"]), f"{place}.id", one["id"], "a short name such as P1")
        taken = [other["id"] for other in found]
        require(one["id"] not in taken, f"{place}.id", one["id"], "an id that no other has")
        found.append(one)
    return found


def _tuning(value: Any) -> dict[str, Any]:
    """The grid that every method was tuned over, and the seeds of that."""
    table = a_table(value, "tuning")
    refuse_unknown(table, ("grid", "seeds"), "tuning")
    grid = a_table(table.get("grid", {}), "tuning.grid")
    for name, values in grid.items():
        require(bool(a_list(values, f"tuning.grid.{name}")), f"tuning.grid.{name}", [], "values")
    seeds = [*seeds_of(table["seeds"], "tuning.seeds")] if "seeds" in table else []
    return {"grid": grid, "seeds": seeds}
