"""A run's folder: whether it may be used, what is written there, and how it is found again.

`config.json`, `environment.json`, `telemetry.jsonl`, `completions.jsonl` and the checkpoints are
functions of the configuration alone; whatever depends on the clock or the process is in
`timing.jsonl`.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hmpo import __version__
from hmpo.checkpoint import (
    Checkpoint,
    RunLock,
    check_free_space,
    estimate_bytes,
    load_checkpoint,
    save_checkpoint,
    write_atomic,
)
from hmpo.config import RunConfig, to_dict
from hmpo.config.identity import changed_settings, config_hash
from hmpo.config.reading import load_run_config, run_config
from hmpo.config.unread_run import refuse_unread_run
from hmpo.errors import ConfigError, RunFolderError
from hmpo.run.afresh import delete, leftovers, without_update
from hmpo.run.environment import describe_environment
from hmpo.telemetry.records import run_record, segment_record, time_record
from hmpo.telemetry.secrets import mask_secrets
from hmpo.telemetry.sinks import JsonlSink, make_sinks


def run_folder(config: RunConfig) -> Path:
    """The folder of a run, `~` expanded.

    Raises:
        RunFolderError: `out` names the home of nobody.
    """
    try:
        return Path(config.out).expanduser() / config.name
    except RuntimeError as error:
        raise RunFolderError(f"out: got {config.out!r}: {str(error).rstrip('.')}") from None


def check_folder(
    config: RunConfig, folder: Path, *, resume: bool, exist_ok: bool, overwrite: bool = False
) -> None:
    """Refuse a folder that does not fit, before anything is read or written there.

    A run that has made no update may be started afresh, and any run where `overwrite` says so.

    Raises:
        RunFolderError: it holds a run and this is no resume, or the other way round.
        ConfigError: the run in it was started with other settings that decide its numbers, or there
            is none and nothing would read one of the settings.
    """
    try:
        started = (folder / "config.json").is_file()
        remains = [n for n in ("checkpoints", "telemetry.jsonl") if (folder / n).exists()]
    except OSError as error:
        raise RunFolderError(
            f"{folder}: cannot be looked into ({error.strerror}); choose another `out`"
        ) from None
    if not (started and resume):
        refuse_unread_run(config)
    if resume and overwrite:
        raise RunFolderError(f"{folder}: a run is resumed or overwritten, not both; choose one")
    if started and not resume:
        if overwrite or without_update(folder):
            return
        raise RunFolderError(
            f"{folder}: holds a run already; resume it with `hmpo train --resume {folder}`, "
            "choose another name, or delete it and start over with --overwrite"
        )
    if remains and not started and not overwrite:
        raise RunFolderError(
            f"{folder}: holds {remains[0]} of a run but no config.json; put that back, or choose "
            "another name"
        )
    if resume and not started and not exist_ok:
        raise RunFolderError(f"{folder}: holds no run (no config.json); start it without --resume")
    if started:
        changed = changed_settings(load_run_config(folder / "config.json"), as_stored(config))
        if changed:
            raise ConfigError(
                f"{folder}: cannot be resumed with other settings, which would change its "
                f"numbers: {'; '.join(changed)}; leave them as they were, or start a new run "
                f"from its weights with `hmpo train --from {folder} --set ...`"
            )


def as_stored(config: RunConfig) -> RunConfig:
    """The configuration as config.json keeps it: secrets masked."""
    plain = to_dict(config)
    return run_config(mask_secrets(plain) | {"name": config.name, "out": config.out})


def sweep(folder: Path) -> None:
    """Delete what killed processes left half-written in a folder that is ours alone."""
    for path in folder.glob(".policy-*"):
        shutil.rmtree(path)
    for name in ("config.json", "environment.json"):
        for path in folder.glob(f".{name}.tmp-*"):
            path.unlink()


class RunFiles:
    """What one process writes into a run's folder: settings, records, completions, checkpoints.

    Args:
        config: the run.
        folder: its folder, which need not exist yet.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.stored = as_stored(config)
        self.hash = config_hash(self.stored)
        self.former: list[Path] = []
        """What a run left here that is started anew."""
        self.run_id = ""
        """Stands in every record; set by `header`, or by a resumed run's first name."""

    def take(
        self, stack: contextlib.ExitStack, *, resume: bool, exist_ok: bool, overwrite: bool
    ) -> Checkpoint | None:
        """Make the folder, lock it, and load its newest valid checkpoint if it is resumed.

        Raises:
            RunFolderError: it cannot be made, is locked, or holds another run.
            CheckpointError: the checkpoint is of other settings.
        """
        folder = self.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(
                f"{folder}: cannot be made ({error.strerror}); choose another `out`"
            ) from None
        stack.enter_context(RunLock(folder))
        # once more, as nobody else writes now
        check_folder(self.config, folder, resume=resume, exist_ok=exist_ok, overwrite=overwrite)
        if not resume:
            self.former = leftovers(folder)
            return None
        return load_checkpoint(folder / "checkpoints", config_hash=self.hash)

    def check_room(self, state: Mapping[str, Any]) -> None:
        """Refuse a disk without room for the checkpoints of such a state (`StorageError`)."""
        needed = estimate_bytes(state) * (self.config.checkpoint.keep + 2)
        check_free_space(self.folder, needed)

    def header(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """The first record of telemetry.jsonl; `base` adds to the values controllers scale."""
        config = self.config
        record = run_record(
            name=config.name,
            config=to_dict(config),
            algo=config.algorithm,
            seed=config.seed,
            code_version=__version__,
            group_size=config.trainer.group_size,
            base={
                "lr": config.optimizer.lr,
                "eps": config.objective.clip_high,
                "batch": config.prompts_per_rollout * config.trainer.group_size,
                "p": config.objective.p,
                **base,
            },
        )
        self.run_id = record["run_id"]
        return record

    def open(
        self, stack: contextlib.ExitStack, header: Mapping[str, Any], saved: Checkpoint | None
    ) -> None:
        """Write the settings and open the logs, cut to where the checkpoint left them."""
        folder, step = self.folder, None if saved is None else saved.step
        self.trackers = make_sinks(self.config.sinks, folder, to_dict(self.config), step)
        stack.callback(self.trackers.close)
        delete(self.former)
        sweep(folder)
        environment = describe_environment()
        write_atomic(folder / "config.json", json.dumps(to_dict(self.stored), indent=2) + "\n")
        write_atomic(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
        ends = {"telemetry": 0, "completions": 0}
        if saved is not None:
            ends = saved.state["run"]["offsets"]
        self.telemetry = JsonlSink(folder / "telemetry.jsonl", resume_at=ends["telemetry"])
        stack.callback(self.telemetry.close)
        self.completions = JsonlSink(folder / "completions.jsonl", resume_at=ends["completions"])
        stack.callback(self.completions.close)
        if saved is None:
            self.telemetry.write(header)
        self._open_timing(stack, step)

    def _open_timing(self, stack: contextlib.ExitStack, resumed: int | None) -> None:
        path = self.folder / "timing.jsonl"
        starts = path.read_bytes().count(b'"type":"segment"') if path.exists() else 0
        self.timing = JsonlSink(path, resume_at="end")
        stack.callback(self.timing.close)
        self.timing.write(
            segment_record(
                self.run_id,
                starts,
                started_s=time.time(),
                pid=os.getpid(),
                resumed_from_step=resumed,
            )
        )

    def publish(self, record: Mapping[str, Any]) -> None:
        """A record for telemetry.jsonl and for the trackers."""
        self.telemetry.write(record)
        self.trackers.write(record)

    def write_completion(self, record: Mapping[str, Any]) -> None:
        """One response for completions.jsonl, secrets masked."""
        self.completions.write(mask_secrets(record))

    def write_time(self, step: int, seconds: Mapping[str, Any]) -> None:
        """A record of the clock for timing.jsonl, by telemetry name."""
        self.timing.write(time_record(self.run_id, step, seconds))

    def offsets(self) -> dict[str, int]:
        """Bytes of the two logs so far; a resume cuts them to this."""
        return {"telemetry": self.telemetry.offset(), "completions": self.completions.offset()}

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """A checkpoint; the oldest beyond `checkpoint.keep` go.

        Raises:
            NonFiniteError: the state holds NaN or infinities.
            StorageError: it could not be written; the former ones stay.
        """
        keep, folder = self.config.checkpoint.keep, self.folder / "checkpoints"
        save_checkpoint(folder, step, state, keep=keep, config_hash=self.hash)
