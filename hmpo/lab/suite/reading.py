"""A suite from its TOML file, or from a function that returns the same as a dict.

Every cell is resolved and validated here, before anything runs. No torch in here.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hmpo.config.reading import read_tables
from hmpo.config.run import RUN_NAME
from hmpo.errors import ConfigError, HmpoError, require
from hmpo.lab.suite.cells import (
    Cell,
    Plan,
    cells_hash,
    check_cells,
    check_where,
    further,
    product,
    read_factors,
    read_where,
)
from hmpo.lab.suite.checked import a_list, a_table, a_text, nearest, refuse_unknown, seeds_of
from hmpo.lab.suite.layers import a_layer
from hmpo.lab.suite.protocol import Protocol, read_protocol
from hmpo.rewards.loading import load_object, split_spec

KEYS = (
    "name",
    "protocol",
    "outcomes",
    "seeds",
    "keep",
    "run",
    "factors",
    "compare",
    "where",
    "exclude",
    "cells",
)
KEEP = ("checkpoints", "policy", "completions")
"""What of a finished run may be kept, beside its settings, logs and outcome."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A suite, read and resolved.

    Example: `read_suite("suites/headline.toml").cells[0].name`.
    """

    name: str
    source: str
    """As it was given on the command line."""
    cells: tuple[Cell, ...]
    compare: Mapping[str, Any]
    protocol: Protocol | None = None
    outcomes: Path | None = None
    """Committed outcomes; such runs are not made again."""
    keep: tuple[str, ...] = ("policy", "completions")

    @functools.cached_property
    def hash(self) -> str:
        """Of the name, the cells with all their settings and seeds, and the comparison."""
        return cells_hash(self.name, self.cells, self.compare)


def read_suite(source: str) -> Suite:
    """Read a suite strictly.

    Args:
        source: a TOML or JSON file, or `module:function` or `file.py:function`, whose function
            returns the same as nested dicts. Naming it is consent to run it.

    Raises:
        ConfigError: one line with the source and the place in it.
    """
    try:
        data, folder = _loaded(source)
    except OSError as error:
        raise ConfigError(f"{source[:200]}: {error.strerror or error}") from None
    try:
        return _suite(data, folder, source)
    except HmpoError as error:
        raise ConfigError(f"{source}: {error}") from None


def _loaded(source: str) -> tuple[Any, Path]:
    """The plain values of a suite, and the folder that relative paths count from."""
    module, name = split_spec(source)
    if not module or not name.isidentifier() or Path(source).is_file():
        path = Path(source)
        return read_tables(path), path.expanduser().resolve().parent
    function = load_object(source, "suite", ConfigError)
    require(callable(function), "suite", source, "a function that returns a dict")
    try:
        data = function()
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{source}: the function raised {type(error).__name__}: {said}"
        ) from error
    home = getattr(sys.modules.get(getattr(function, "__module__", "")), "__file__", None)
    return data, Path(home).resolve().parent if home else Path.cwd()


def _suite(data: Any, folder: Path, source: str) -> Suite:
    table = a_table(data, "suite")
    refuse_unknown(table, KEYS, "")
    expected = "a folder's name: letters, digits, '.', '_' and '-'"
    name = a_text(table.get("name"), "name", RUN_NAME.pattern, expected)
    folders = dict.fromkeys((str(folder), os.fspath(Path.cwd())))
    plan = Plan(
        base=a_layer(table.get("run", {}), "run"),
        factors=read_factors(table.get("factors", {})),
        seeds=seeds_of(table["seeds"], "seeds") if "seeds" in table else None,
        relative_to=list(folders),
    )
    rules = a_list(table.get("where", []), "where", "tables, [[where]] each")
    plan = dataclasses.replace(plan, where=read_where(plan, rules))
    exclude = a_list(table.get("exclude", []), "exclude", "tables, [[exclude]] each")
    items = a_list(table.get("cells", []), "cells", "tables, [[cells]] each")
    cells = [*product(plan, exclude), *further(plan, items)]
    check_cells(cells)
    check_where(plan.where, cells)
    keep = a_list(table.get("keep", ["policy", "completions"]), "keep")
    for item in keep:
        require(item in KEEP, "keep", item, f"one of {', '.join(KEEP)}")
    protocol = table.get("protocol")
    outcomes = table.get("outcomes")
    return Suite(
        name=name,
        source=source,
        cells=tuple(cells),
        compare=_comparison(table.get("compare", {}), plan),
        protocol=None if protocol is None else read_protocol(_beside(folder, protocol, "protocol")),
        outcomes=None if outcomes is None else _beside(folder, outcomes, "outcomes"),
        keep=tuple(keep),
    )


def _beside(folder: Path, value: Any, place: str) -> Path:
    """A path that counts from the suite's folder."""
    text = a_text(value, place, r"[^\0]+", "a path, relative to the suite's file")
    try:
        return folder / Path(text).expanduser()
    except RuntimeError as error:  # ~ of nobody
        raise ConfigError(f"{place}: got {text!r}: {str(error).rstrip('.')}") from None


def _comparison(value: Any, plan: Plan) -> dict[str, Any]:
    """`[compare]`: a factor, its baselines, and the factors that make blocks."""
    table = a_table(value, "compare")
    if not table:
        return {}
    refuse_unknown(table, ("factor", "to", "within"), "compare")
    factor = table.get("factor")
    known = list(plan.factors)
    if factor not in known:
        raise ConfigError(f"compare.factor: no factor {factor!r}; {nearest(factor, known)}")
    to = a_list(table.get("to", []), "compare.to", "levels of that factor")
    require(bool(to), "compare.to", to, f"at least one level of {factor}")
    for level in to:
        plan.check_levels({factor: level}, "compare.to")
    rest = [name for name in known if name != factor]
    within = a_list(table.get("within", rest), "compare.within", "factors")
    for name in within:
        if name not in rest:
            raise ConfigError(f"compare.within: no other factor {name!r}; {nearest(name, rest)}")
    return {"factor": factor, "to": to, "within": within}
