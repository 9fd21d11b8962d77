"""A suite's folder: its plan, its runs, its journal; one process at a time writes into it."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hmpo.checkpoint import RunLock, write_atomic
from hmpo.config import RunConfig
from hmpo.config.identity import config_hash
from hmpo.errors import ConfigError, RunFolderError, TelemetryError
from hmpo.lab.study.outcomes import Outcome, read_outcome
from hmpo.lab.suite.cells import Cell
from hmpo.lab.suite.layers import leaves
from hmpo.lab.suite.reading import KEEP, Suite
from hmpo.telemetry.careful import open_own
from hmpo.telemetry.reading import loads
from hmpo.telemetry.secrets import mask_secrets

PLAN = "suite.json"
JOURNAL = "journal.jsonl"
OUT = "experiments"
"""Folder that holds the folders of suites."""
Key = tuple[str, int]
"""Cell and seed of a run."""


@dataclass(frozen=True, kw_only=True)
class Deaths:
    """Deaths of one run's process in a row, none of which came further than the first.

    Example: `Deaths(count=2, step=6)` is a run that died twice after its sixth update.
    """

    count: int = 0
    step: int = -2
    """Updates that were done; -1 before the run was set up."""

    def then(self, step: int) -> "Deaths":
        """After one more death."""
        return Deaths(count=1 if step > self.step else self.count + 1, step=max(step, self.step))


class SuiteFolder:
    """The folder of a suite, absolute; nothing is written before `opened`.

    Args:
        suite: whose.
        out: folder that holds it.
    """

    def __init__(self, suite: Suite, out: Path) -> None:
        self.suite = suite
        self.shown = out / suite.name
        self.path = Path(os.path.abspath(self.shown))  # noqa: PTH100 - resolve() follows links
        self.plan: dict[str, Any] = {}
        self.lock: RunLock | None = None

    def cell_folder(self, cell: str) -> Path:
        """Where the runs of a cell are."""
        return self.path / "runs" / cell

    def run_folder(self, cell: str, seed: int) -> Path:
        """Where one run is."""
        return self.cell_folder(cell) / str(seed)

    # ------------------------------------------------------------------------------- the plan

    @contextlib.contextmanager
    def opened(self, wanted: Sequence[tuple[Cell, int]] = ()) -> Iterator[None]:
        """Take the folder and write the plan; it is given back at the end.

        Args:
            wanted: the runs that are to be made now.

        Raises:
            RunFolderError: another process writes there, or it holds another suite.
            ConfigError: a cell that has runs has other settings by now.
        """
        with RunLock(self.path) as self.lock:
            before = self._read_plan()
            self._refuse_changed(before)
            self.plan = self._new_plan(before, wanted)
            write_atomic(self.path / PLAN, json.dumps(self.plan, indent=1) + "\n")
            yield

    def _read_plan(self) -> dict[str, Any]:
        path = self.path / PLAN
        if not os.path.lexists(path):
            return {}
        try:
            with open(open_own(path, os.O_RDONLY), "rb") as file:  # noqa: PTH123
                plan = loads(file.read())
            fits = isinstance(plan, dict) and plan["schema"] == 1
            known = {cell["name"]: cell["settings"] for cell in plan["cells"]} if fits else {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunFolderError(
                f"{path}: cannot be read ({error}); choose another --out"
            ) from None
        if not fits or plan.get("name") != self.suite.name or not known:
            raise RunFolderError(f"{path}: is of another suite; choose another --out")
        return plan

    def _refuse_changed(self, before: Mapping[str, Any]) -> None:
        """Refuse a cell that has runs and other settings than they were made with."""
        then = {c["name"]: c for c in (*before.get("former", ()), *before.get("cells", ()))}
        for cell in self.suite.cells:
            was, now = then.get(cell.name), _plain(cell)
            folder = self.cell_folder(cell.name)
            if was is None or not folder.exists():
                continue
            old, new = was.get("resolved", {}), json.loads(json.dumps(now["resolved"]))
            same = was.get("config_hash") == now["config_hash"]
            if same and old.get("updates") == new["updates"]:
                continue
            names = dict.fromkeys(leaves(old) + leaves(new))
            changed = [n for n in names if _at(old, n) != _at(new, n)][:3]
            shown = ", ".join(f"{n} was {_at(old, n)!r}, now {_at(new, n)!r}" for n in changed)
            raise ConfigError(
                f"cell {cell.name}: has runs under other settings ({shown}); give the suite "
                f"another name, or delete {folder}"
            )

    def _new_plan(
        self, before: Mapping[str, Any], wanted: Sequence[tuple[Cell, int]]
    ) -> dict[str, Any]:
        suite = self.suite
        now = suite.protocol.sha256 if suite.protocol else ""
        plan: dict[str, Any] = {
            "schema": 1,
            "name": suite.name,
            "hash": suite.hash,
            "source": suite.source,
            "protocol": suite.protocol.data if suite.protocol else None,
            "protocol_hash": now,
            "first_protocol_hash": before.get("first_protocol_hash"),
            "registered": before.get("registered"),
            "exploratory": dict(before.get("exploratory") or {}),
            "compare": dict(suite.compare),
            "cells": [_plain(cell) for cell in suite.cells],
            "former": self._former(before),
        }
        counted = [(cell, seed) for cell, seed in wanted if cell.role != "tuning"]
        if counted and plan["registered"] is None:
            plan["first_protocol_hash"] = now
            plan["registered"] = {cell.name: list(cell.seeds) for cell in suite.cells}
        self._mark_exploratory(plan, counted)
        return plan

    def _former(self, before: Mapping[str, Any]) -> list[Any]:
        """Cells that the suite no longer has and whose runs are still there."""
        present = {cell.name for cell in self.suite.cells}
        known = {c["name"]: c for c in (*before.get("former", ()), *before.get("cells", ()))}
        left = [name for name in known if name not in present]
        return [known[name] for name in left if self.cell_folder(name).exists()]

    def _mark_exploratory(self, plan: dict[str, Any], runs: Iterable[tuple[Cell, int]]) -> None:
        """Note the runs that begin now and were not decided on before the first that counted."""
        if not (plan["first_protocol_hash"] or plan["protocol_hash"]):
            return  # nothing was decided at all, and the report says so
        changed = plan["first_protocol_hash"] != plan["protocol_hash"]
        for cell, seed in runs:
            added = seed not in plan["registered"].get(cell.name, ())
            begun = (self.run_folder(cell.name, seed) / "config.json").exists()
            if (changed or added) and not begun:
                seeds = plan["exploratory"].setdefault(cell.name, [])
                plan["exploratory"][cell.name] = sorted({*seeds, seed})

    def is_exploratory(self, cell: str, seed: int) -> bool:
        """Whether a run was not decided on before the first that counted."""
        return seed in self.plan.get("exploratory", {}).get(cell, ())

    # ------------------------------------------------------------------------------- the runs

    def outcome(self, cell: Cell, seed: int) -> Outcome | None:
        """What a run came to; None where it is to be made, or its record is not to be believed."""
        try:
            found = read_outcome(self.run_folder(cell.name, seed))
        except TelemetryError:
            return None
        return found if found is not None and self.fits(found, cell, seed) else None

    def fits(self, outcome: Outcome, cell: Cell, seed: int) -> bool:
        """Whether an outcome is of this run under these settings."""
        return fits(outcome, (cell.name, seed), cell.run_config(seed, "."))

    def tidy(self, cell: str, seed: int) -> None:
        """Delete what need not be kept of a run whose outcome is written."""
        tidy(self.run_folder(cell, seed), self.suite.keep)

    # ---------------------------------------------------------------------------- the journal

    def note(self, event: str, cell: str, seed: int, **data: Any) -> None:
        """Add a line to the journal: started, ended or died."""
        about = {"event": event, "cell": cell, "seed": seed, **data, "time": round(time.time(), 3)}
        line = json.dumps(about) + "\n"
        fd = open_own(self.path / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            if os.fstat(fd).st_size:
                os.lseek(fd, -1, os.SEEK_END)
                if os.read(fd, 1) != b"\n":  # a process was killed in the midst of a line
                    line = "\n" + line
            os.write(fd, line.encode())
        finally:
            os.close(fd)

    def journal(self) -> list[dict[str, Any]]:
        """What the journal holds; lines that were cut off are passed over."""
        try:
            with open(open_own(self.path / JOURNAL, os.O_RDONLY), "rb") as file:  # noqa: PTH123
                lines = file.read().splitlines()
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                entry = loads(line)
                if isinstance(entry, dict) and {"event", "cell", "seed"} <= entry.keys():
                    found.append(entry)
        return found

    def deaths(self) -> dict[Key, Deaths]:
        """By run, how often its process has died in a row, as the journal tells."""
        found: dict[Key, Deaths] = {}
        for entry in self.journal():
            key = (entry["cell"], entry["seed"])
            step = entry.get("step")
            if entry["event"] == "died" and isinstance(step, int):
                found[key] = found.get(key, Deaths()).then(step)
            elif entry.get("status") in ("finished", "failed", "stopped"):
                found.pop(key, None)  # whoever deletes the run's folder wants it made again
        return found


def plan_value(suite: Suite) -> dict[str, Any]:
    """What suite.json holds before the first run, for reports of committed outcomes alone."""
    return SuiteFolder(suite, Path())._new_plan({}, ())


def fits(outcome: Outcome, key: Key, config: RunConfig) -> bool:
    """Whether an outcome is of the run of this key and configuration."""
    whole = outcome.status != "finished" or outcome.updates == config.updates
    return outcome.key() == key and outcome.config_hash == config_hash(config) and whole


def tidy(folder: Path, keep: Iterable[str]) -> None:
    """Delete what of `KEEP` is not in `keep` from a finished run; links are not followed."""
    names = {"completions": "completions.jsonl"}
    for item in KEEP:
        path = folder / names.get(item, item)
        if item in keep or not os.path.lexists(path):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _plain(cell: Cell) -> dict[str, Any]:
    """A cell as the plan keeps it."""
    return {
        "name": cell.name,
        "role": cell.role,
        "levels": dict(cell.levels),
        "seeds": list(cell.seeds),
        "settings": mask_secrets(dict(cell.settings)),
        "config_hash": cell.config_hash,
        "against": cell.against,
        "resolved": mask_secrets(cell.identity),
    }


def _at(table: Any, name: str) -> Any:
    """The value behind a dotted name; None where there is none."""
    for part in name.split("."):
        table = table.get(part) if isinstance(table, Mapping) else None
    return table
