"""Cells: the run configurations of a suite, from the product of its factors and beside it."""

import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hmpo.config import RunConfig, to_dict
from hmpo.config.identity import config_hash
from hmpo.errors import ConfigError, require
from hmpo.lab.suite.checked import a_table, a_text, nearest, refuse_unknown, seeds_of
from hmpo.lab.suite.layers import Layer, a_layer, merged, refuse_clash, resolved

ROLES = ("main", "tuning", "again", "negative", "positive", "placebo", "null")
LEVEL = r"[a-z0-9][a-z0-9._-]{0,59}"
CELL = r"[a-z0-9][a-z0-9._+-]{0,119}"
FACTOR = r"[a-z][a-z0-9_]{0,39}"
KEYS = ("name", "role", "levels", "settings", "seeds", "against")
MOST_CELLS = 100_000
PLACES = (
    *("name", "out", "relative_to", "seed"),
    *("sinks", "tracker", "samples", "checkpoint", "distributed"),
)
"""Settings that change no number of a cell, or that differ from run to run."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One configuration and its seeds.

    Example: the cell `grpo+stale` has `levels = {"member": "grpo", "regime": "stale"}`.
    """

    name: str
    role: str = "main"
    levels: Mapping[str, str] = field(default_factory=dict)
    seeds: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """As they are written in the suite's file, all layers in one."""
    config: RunConfig
    """Resolved; the seed in it is 0."""
    against: str | None = None
    """The cell that it is compared with."""

    @functools.cached_property
    def config_hash(self) -> str:
        """Of the configuration with seed 0."""
        return config_hash(self.config)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """All settings that may change a number, the number of updates too."""
        data = to_dict(self.config)
        return {key: value for key, value in data.items() if key not in PLACES}

    def run_config(self, seed: int, out: str) -> RunConfig:
        """The configuration of one run.

        Args:
            seed: its seed, whose text is its name.
            out: folder that holds its folder.
        """
        return dataclasses.replace(self.config, seed=seed, name=str(seed), out=out)


@dataclass(frozen=True)
class Where:
    """Settings of the cells that have certain levels together.

    Example: a learning rate for `{"member": ["gspo"], "regime": ["stale"]}`.
    """

    levels: Mapping[str, Sequence[str]]
    """By factor, one or several."""
    layer: Layer


def meets(rule: Mapping[str, Sequence[str]], levels: Mapping[str, str]) -> bool:
    """Whether a cell has one of the levels of each factor that a rule names."""
    return all(levels.get(factor) in some for factor, some in rule.items())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the cells of a suite are made of."""

    base: Layer
    """Settings of every run."""
    factors: Mapping[str, Mapping[str, Layer]]
    seeds: tuple[int, ...] | None
    relative_to: Sequence[str]
    where: Sequence["Where"] = ()
    """Settings of combinations of levels."""

    def cell(
        self, name: str, levels: Mapping[str, str], own: Layer | None = None, **more: Any
    ) -> Cell:
        """A resolved cell.

        Raises:
            ConfigError: a setting is wrong, or two levels set the same; one line.
        """
        chosen = [self.factors[factor][level] for factor, level in levels.items()]
        refuse_clash(chosen)
        met = [rule.layer for rule in self.where if meets(rule.levels, levels)]
        refuse_clash(met)
        layers = [self.base, *chosen, *met, *([own] if own else [])]
        settings = merged(layers)
        whole = {"threads": 1} | settings | {"relative_to": list(self.relative_to)}
        more.setdefault("seeds", self.seeds)
        require(more["seeds"] is not None, "seeds", None, f"seeds of cell {name}, or of all")
        config = resolved(name, layers, whole)
        return Cell(name=name, levels=dict(levels), settings=settings, config=config, **more)

    def check_levels(self, value: Any, place: str) -> dict[str, str]:
        """A choice of levels by factor, in the order of the factors.

        Raises:
            ConfigError: an unknown factor or level.
        """
        table = a_table(value, place)
        for factor, level in table.items():
            if factor not in self.factors:
                raise ConfigError(
                    f"{place}.{factor}: no such factor; {nearest(factor, self.factors)}"
                )
            if not isinstance(level, str) or level not in self.factors[factor]:
                hint = nearest(str(level), self.factors[factor])
                raise ConfigError(f"{place}.{factor}: no level {level!r}; {hint}")
        return {factor: table[factor] for factor in self.factors if factor in table}


def read_factors(value: Any) -> dict[str, dict[str, Layer]]:
    """Factors, their levels, and the settings of each level."""
    factors: dict[str, dict[str, Layer]] = {}
    for factor, levels in a_table(value, "factors").items():
        place = f"factors.{factor}"
        fits = bool(re.fullmatch(FACTOR, factor)) and factor != "role"
        require(fits, "factors", factor, "a name of small letters, digits and '_', not role")
        table = a_table(levels, place)
        require(bool(table), place, table, "at least one level")
        for level in table:
            expected = "a level's name of small letters, digits, '.', '_' and '-'"
            a_text(level, place, LEVEL, expected)
        factors[factor] = {
            level: a_layer(settings, f"{place}.{level}") for level, settings in table.items()
        }
    return factors


def product(plan: Plan, exclude: Sequence[Any]) -> list[Cell]:
    """The cells of the product of all factors, less what is excluded.

    Raises:
        ConfigError: one line; an exclusion that leaves nothing out is a mistake too.
    """
    rules = [levels_of(plan, rule, f"exclude[{i}]") for i, rule in enumerate(exclude)]
    used = [False] * len(rules)
    cells = []
    for names in itertools.product(*plan.factors.values()) if plan.factors else ():
        levels = dict(zip(plan.factors, names))
        hits = [meets(rule, levels) for rule in rules]
        used = [was or hit for was, hit in zip(used, hits)]
        if not any(hits):
            cells.append(plan.cell("+".join(names), levels))
        require(len(cells) <= MOST_CELLS, "factors", len(cells), f"at most {MOST_CELLS} cells")
    for number, was in enumerate(used):
        require(was, f"exclude[{number}]", exclude[number], "levels that meet in some cell")
    return cells


def read_where(plan: Plan, items: Sequence[Any]) -> list[Where]:
    """Settings of combinations of levels, which hold over those of the levels themselves.

    Raises:
        ConfigError: one line; levels that no cell of the product can have together included.
    """
    rules = []
    for number, item in enumerate(items):
        place = f"where[{number}]"
        table = a_table(item, place)
        refuse_unknown(table, ("levels", "settings"), place)
        levels = levels_of(plan, table.get("levels"), f"{place}.levels")
        layer = a_layer(table.get("settings", {}), f"{place}.settings")
        require(bool(layer[1]), f"{place}.settings", layer[1], "settings of a run")
        rules.append(Where(levels, layer))
    return rules


def check_where(rules: Sequence[Where], cells: Sequence[Cell]) -> None:
    """Refuse settings of levels that meet in no cell.

    Raises:
        ConfigError: one line.
    """
    for number, rule in enumerate(rules):
        used = any(meets(rule.levels, cell.levels) for cell in cells)
        shown = {factor: list(some) for factor, some in rule.levels.items()}
        require(used, f"where[{number}].levels", shown, "levels that meet in some cell")


def levels_of(plan: Plan, rule: Any, place: str) -> dict[str, list[str]]:
    """Levels by factor, one or several of each.

    Raises:
        ConfigError: an unknown factor or level, or none.
    """
    table = a_table(rule, place)
    require(bool(table), place, table, "levels by factor")
    found: dict[str, list[str]] = {}
    for factor, some in table.items():
        found[factor] = list(some) if isinstance(some, list | tuple) else [some]
        for level in found[factor]:
            plan.check_levels({factor: level}, place)
    return found


def further(plan: Plan, items: Sequence[Any]) -> list[Cell]:
    """The cells outside of the product."""
    cells = []
    for number, item in enumerate(items):
        place = f"cells[{number}]"
        table = a_table(item, place)
        refuse_unknown(table, KEYS, place)
        expected = "a name of small letters, digits, '.', '_', '+' and '-'"
        name = a_text(table.get("name"), f"{place}.name", CELL, expected)
        place = f"cells.{name}"
        role = table.get("role", "main")
        require(role in ROLES, f"{place}.role", role, f"one of {', '.join(ROLES)}")
        levels = plan.check_levels(table.get("levels", {}), f"{place}.levels")
        own = a_layer(table.get("settings", {}), f"{place}.settings")
        more: dict[str, Any] = {"role": role}
        if "seeds" in table:
            more["seeds"] = seeds_of(table["seeds"], f"{place}.seeds")
        if "against" in table:
            more["against"] = a_text(table["against"], f"{place}.against")
        cells.append(plan.cell(name, levels, own, **more))
    return cells


def check_cells(cells: Sequence[Cell]) -> None:
    """Refuse names that are taken, and comparisons with cells that do not exist.

    Raises:
        ConfigError: one line.
    """
    names = [cell.name for cell in cells]
    require(bool(cells), "factors", names, "factors with levels, or [[cells]]")
    for number, cell in enumerate(cells):
        require(names.index(cell.name) == number, f"cells.{cell.name}.name", cell.name, "a new one")
        place = f"cells.{cell.name}.against"
        if cell.against is not None:
            known = [name for name in names if name != cell.name]
            if cell.against not in known:
                raise ConfigError(
                    f"{place}: no cell {cell.against!r}; {nearest(cell.against, known)}"
                )


def cells_hash(name: str, cells: Sequence[Cell], compare: Mapping[str, Any]) -> str:
    """SHA-256 of what a suite is: its cells, what decides their numbers, seeds, its comparison.

    Settings that hmpo has gained since, at the value that says nothing new, do not change it.
    """
    plain = [
        [c.name, c.role, dict(c.levels), list(c.seeds), c.config_hash, c.config.updates, c.against]
        for c in cells
    ]
    text = json.dumps([name, plain, dict(compare)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
