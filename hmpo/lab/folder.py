"""A run folder as the report sees it, whole or cut short."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hmpo.errors import RunFolderError, TelemetryError
from hmpo.run.folder import refuse_foreign
from hmpo.telemetry.ingest import (
    Record,
    RunLog,
    read_process_events,
    read_records,
    read_run,
    read_timing,
)
from hmpo.telemetry.reading import loads, reason
from hmpo.telemetry.secrets import mask_secrets


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Everything a run left behind that a report shows; secrets are masked.

    Example: `load_run(Path("runs/demo")).series("reward/mean")` gives two lists of equal length.
    """

    path: Path
    label: str
    """The run's name, or its folder's where the configuration does not tell."""
    log: RunLog
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    samples: tuple[Record, ...] = ()
    """Responses of completions.jsonl, in the order of the file."""
    tokens: tuple[Record, ...] = ()
    """Records of it that say which tokens an update's gradient came from most."""
    prompts: tuple[Record, ...] = ()
    """Records of prompts.jsonl."""
    events: tuple[Record, ...] = ()
    """Of the log, and what happened to one process alone, by step."""
    segments: tuple[Record, ...] = ()
    times: tuple[Record, ...] = ()
    notes: tuple[str, ...] = ()
    """What could not be read, one line each."""

    def setting(self, *keys: str, default: Any = None) -> Any:
        """A nested value of the configuration, or `default`."""
        value: Any = self.config
        for key in keys:
            if not isinstance(value, Mapping) or key not in value:
                return default
            value = value[key]
        return value

    def series(self, name: str, records: str = "steps") -> tuple[list[int], list[float]]:
        """Steps and values of one metric; both empty if it was never logged as a number."""
        source = self.times if records == "times" else getattr(self.log, records)
        points = [(r["step"], float(r[name])) for r in source if _is_number(r.get(name))]
        if not any(math.isfinite(value) for _, value in points):
            return [], []
        return [step for step, _ in points], [value for _, value in points]

    @property
    def last_step(self) -> int:
        """Updates done, as far as the log tells."""
        done = [record["step"] + 1 for record in self.log.steps[-1:]]
        done += [record["step"] for record in self.log.evals[-1:]]
        done += [self.log.end["step"]] if self.log.end else []
        return max(done, default=0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def load_run(path: Path | str) -> RunData:
    """Read a run folder; only telemetry.jsonl (or .gz) must be there and be sound.

    Raises:
        RunFolderError: no such folder, or no telemetry in it.
        TelemetryError: the log is of another version or more than 1 % of it is malformed.
    """
    path = Path(path)
    if not os.path.isdir(path):  # noqa: PTH112 - unlike pathlib, false for over-long paths
        raise RunFolderError(f"{path}: no such folder, expected a run folder")
    refuse_foreign(path)
    logs = [path / name for name in ("telemetry.jsonl", "telemetry.jsonl.gz")]
    present = [log for log in logs if log.is_file()]
    if not present:
        raise RunFolderError(f"{path}: no telemetry.jsonl in it, expected a run folder")
    notes: list[str] = []
    config = _read_object(path / "config.json", notes, needed=True)
    environment = _read_object(path / "environment.json", notes, needed=False)
    segments, times, own = _read_timing(path / "timing.jsonl", notes)
    log = read_run(present[0])
    written = _read_samples(path / "completions.jsonl", notes)
    name = config.get("name")
    return RunData(
        path=path,
        label=name if isinstance(name, str) and name else path.resolve().name,
        log=log,
        events=tuple(sorted((*log.events, *own), key=lambda record: record["step"])),
        config=config,
        environment=environment,
        samples=tuple(record for record in written if "heaviest" not in record),
        tokens=tuple(record for record in written if "heaviest" in record),
        prompts=_read_samples(path / "prompts.jsonl", notes),
        segments=segments,
        times=times,
        notes=tuple(notes),
    )


def _read_object(path: Path, notes: list[str], needed: bool) -> dict[str, Any]:
    if not path.is_file():
        if needed:
            notes.append(f"{path.name} is missing")
        return {}
    try:
        value = mask_secrets(loads(path.read_bytes()))
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read: {reason(error)}")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path.name} holds {type(value).__name__}, expected a JSON object")
        return {}
    return value


def _read_timing(path: Path, notes: list[str]) -> tuple[tuple[Record, ...], ...]:
    """Segments, times and events of timing.jsonl."""
    if not path.is_file():
        return (), (), ()
    try:
        return (*read_timing(path), read_process_events(path))
    except TelemetryError as error:
        notes.append(str(error))
        return (), (), ()


def _read_samples(path: Path, notes: list[str]) -> tuple[Record, ...]:
    if not path.is_file():
        return ()
    try:
        records, problems, _ = read_records(path, non_finite=False)
    except TelemetryError as error:
        notes.append(str(error))
        return ()
    broken = [problem for problem in problems if problem.kind == "malformed"]
    if broken:
        notes.append(f"{path.name}: {len(broken)} malformed lines left out")
    return tuple(record for _, record in records if isinstance(record.get("rollout"), int))
