"""The controllers over a recorded run: what they decide on its records, again or anew.

Records go in by step, an evaluation before the update that follows it, as they stand in the log.
A decision that the log calls applied is committed as it was; nothing else is, so a replay says
what would have been decided at each record of the run as it went.
"""

import itertools
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hmpo.agm.control import Control
from hmpo.checkpoint import write_atomic
from hmpo.config import to_dict
from hmpo.config.control import ControlConfig
from hmpo.config.reading import from_dict
from hmpo.errors import CheckpointError, ConfigError, TelemetryError
from hmpo.run.folder import refuse_foreign
from hmpo.telemetry.foreign import read_log
from hmpo.telemetry.ingest import Record, RunLog
from hmpo.telemetry.reading import loads, reason
from hmpo.telemetry.records import encode, event_record

LOGS = ("telemetry.jsonl", "telemetry.jsonl.gz", "telemetry.csv")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A log and the settings of the controllers that go with it.

    Example: `load_source(Path("runs/demo"))`.
    """

    path: Path
    """The file."""
    log: RunLog
    config: ControlConfig


def load_source(
    run: Path, config: Path | None = None, adapter: str | None = None, strict: bool = False
) -> Source:
    """A run's folder, or any log that `read_log` reads.

    Args:
        run: folder or file.
        config: TOML or JSON file with an `[agm]` table, or just its content; None takes the run
            folder's own, and for a file the defaults.
        adapter: kind of log; None tells by the names in it.
        strict: raise at the first malformed line.

    Raises:
        TelemetryError: no log there, or not readable.
        ConfigError: settings that cannot be read.
    """
    path = run
    if not os.path.exists(run):  # noqa: PTH110 - unlike pathlib, false for over-long paths
        raise TelemetryError(f"{run}: no such file or folder, expected a run folder or a log")
    if run.is_dir():
        refuse_foreign(run)
        logs = [run / name for name in LOGS if (run / name).is_file()]
        if not logs:
            raise TelemetryError(f"{run}: no telemetry in it, expected a run folder or a log")
        path = logs[0]
        if config is None and (run / "config.json").is_file():
            config = run / "config.json"
    settings = ControlConfig() if config is None else load_settings(config)
    if settings.mode == "off":
        settings = replace(settings, mode="advise")
    return Source(path=path, log=read_log(path, adapter, strict), config=settings)


def load_settings(path: Path) -> ControlConfig:
    """The controllers' settings of a TOML or JSON file: its `agm` table, or all of it.

    Raises:
        ConfigError: one line with the file and the field.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({reason(error)})") from None
    except (ValueError, RecursionError) as error:  # TOML has no limit of depth of its own
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from None
    if isinstance(data, dict) and "schema" not in data and "run_id" not in data:
        whole_run = "trainer" in data or "objective" in data or "agm" in data
        data = data.get("agm", {}) if whole_run else data
    try:
        return from_dict(ControlConfig, data, "agm")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def in_order(log: RunLog) -> list[tuple[Record, Record | None]]:
    """The log's records with the decision that it holds on each, in the order of the run."""
    records = sorted(
        (*log.evals, *log.steps), key=lambda record: (record["step"], record["type"] == "step")
    )
    logged: dict[int, list[Record]] = {}
    for record in log.decisions:
        logged.setdefault(record["step"], []).append(record)
    paired: list[tuple[Record, Record | None]] = []
    for step, group in itertools.groupby(records, key=lambda record: record["step"]):
        here, decisions = list(group), logged.get(step, [])
        # One decision a record, or the log does not say which is whose.
        whole = len(here) == len(decisions)
        paired += zip(here, decisions if whole else [None] * len(here))
    return paired


def replay(source: Source, control: Control, until: int | None = None, after: int = -1) -> list:
    """The decisions on a log's records, as records.

    Args:
        source: the log.
        control: made anew, or with the state of an earlier replay.
        until: last step; None goes to the end.
        after: records up to this step were seen by `control` already.
    """
    return [
        control.follow(record, logged)
        for record, logged in in_order(source.log)
        if after < record["step"] and (until is None or record["step"] <= until)
    ]


def replay_file(
    source: Source,
    *,
    out: Path | None = None,
    until: int | None = None,
    state_in: Path | None = None,
    state_out: Path | None = None,
) -> list[Record]:
    """Replay with state from and to files, and decisions to a file that is replaced at once.

    Raises:
        CheckpointError: `state_in` is no state of these controllers.
        StorageError: a file cannot be written.
    """
    control, after = Control(source.config, source.log.run), -1
    if state_in is not None:
        state = _read_state(state_in)
        after = _continue(control, state, state_in)
    decisions = replay(source, control, until, after)
    if out is not None:
        lines = [encode(_header(source, control, until)), *map(encode, decisions)]
        write_atomic(out, "\n".join(lines) + "\n", make_folder=True)
    if state_out is not None:
        last = max([after, *(record["step"] for record in decisions)])
        state = {"schema": "hmpo.agm/1", "step": last, "control": control.state_dict()}
        write_atomic(state_out, json.dumps(state, sort_keys=True) + "\n", make_folder=True)
    return decisions


def _continue(control: Control, state: Mapping[str, Any], path: Path) -> int:
    """Load a state that --state-out wrote; returns the last step that it has seen."""
    try:
        control.load_state_dict(state["control"])
        after = state["step"]
        if not isinstance(after, int):
            raise TypeError(f"step is {after!r}")
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: damaged, {error!r}; replay the log from its start"
        ) from None
    return after


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {reason(error)}") from None
    if not isinstance(state, dict) or state.get("schema") != "hmpo.agm/1":
        raise CheckpointError(f"{path}: expected a state that --state-out wrote")
    return state


def _header(source: Source, control: Control, until: int | None) -> Record:
    """What the decisions were taken from, as an event."""
    log = source.log
    data = {
        "adapter": log.adapter,
        "notes": list(log.notes),
        "approximate": sum(record.get("approx") is True for record in log.steps),
        "malformed": log.count("malformed"),
        "controller": type(control.controller).__name__,
        "config_hash": control.controller.config_hash,
        "until": until,
    }
    return event_record(control.run_id, 0, "replay", data)


def first_difference(source: Source, decisions: Sequence[Record]) -> str | None:
    """Where a replay and the log's own decisions part; None where they are equal to the bit.

    Raises:
        TelemetryError: the log holds no decisions.
    """
    logged = [record for _, record in in_order(source.log) if record is not None]
    if not logged:
        raise TelemetryError(f"{source.path}: holds no decisions to compare with")
    for replayed, recorded in zip(decisions, logged):
        if encode(replayed) != encode(recorded):
            ids = f"run_id {replayed.get('run_id')!r}, was {recorded.get('run_id')!r}"
            parts = differing(replayed, recorded) or [ids]
            return f"step {replayed['step']}: {'; '.join(parts)}"
    if len(logged) < len(decisions):
        return f"{len(decisions)} decisions, the log holds {len(logged)}"
    return None


def differing(replayed: Mapping[str, Any], recorded: Mapping[str, Any]) -> list[str]:
    """The fields in which two decisions differ, with both values."""
    names = sorted({*replayed, *recorded} - {"run_id"})
    return [
        f"{name} {replayed.get(name)!r}, was {recorded.get(name)!r}"
        for name in names
        if encode({"": replayed.get(name)}) != encode({"": recorded.get(name)})
    ]


def grid_of(items: Sequence[str]) -> list[dict[str, Any]]:
    """All combinations of `table.key=value,value` items; values are TOML.

    Raises:
        ConfigError: an item of another form.
    """
    axes: list[list[tuple[str, Any]]] = []
    for item in items:
        key, sign, text = item.partition("=")
        try:
            values = tomllib.loads(f"values = [{text}]")["values"]
        except ValueError:
            values = []
        if not sign or not key.strip() or not values:
            raise ConfigError(f"--grid: got {item!r}, expected table.key=value,value,...")
        axes.append([(key.strip(), value) for value in values])
    return [dict(choice) for choice in itertools.product(*axes)]


def with_settings(config: ControlConfig, changes: Mapping[str, Any]) -> ControlConfig:
    """The settings with dotted names changed, such as `adapter.gap_target`.

    Raises:
        ConfigError: an unknown name or a bad value.
    """
    data = to_dict(config)
    for name, value in changes.items():
        *tables, last = name.split(".")
        table = data
        for inner in tables:
            if not isinstance(table.get(inner), dict):
                raise ConfigError(f"--grid: {name}: unknown; {inner} is no table of [agm]")
            table = table[inner]
        table[last] = value
    return from_dict(ControlConfig, data, "agm")


def sweep(source: Source, grid: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping, list]]:
    """One replay for each choice of settings."""
    for changes in grid:
        control = Control(with_settings(source.config, changes), source.log.run)
        yield changes, replay(source, control)
