"""A run's folder: whether it may be used, what is written there, and how it is found again.

`config.json`, `environment.json`, `telemetry.jsonl`, `completions.jsonl` and the checkpoints are
functions of the configuration alone; whatever depends on the clock or the process is in
`timing.jsonl`.
"""

import contextlib
import dataclasses
import json
import logging
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
from hmpo.checkpoint.manifest import OtherRunError, read_manifest
from hmpo.config import RunConfig, to_dict
from hmpo.config.identity import changed_settings, config_hash
from hmpo.config.reading import load_run_config
from hmpo.config.unread_run import refuse_unread_run
from hmpo.errors import ConfigError, RunFolderError, StorageError, TelemetryError, require
from hmpo.ranks.launched import launcher
from hmpo.run.afresh import delete, leftovers, without_update
from hmpo.run.best import keeps_best
from hmpo.run.consent import resume_command
from hmpo.run.ending import failure_text
from hmpo.run.environment import describe_environment
from hmpo.run.folder import Place, refuse_foreign
from hmpo.run.logs import load_fitting
from hmpo.run.masked import as_stored, refuse_masked, with_masks
from hmpo.run.prompt_records import PROMPTS, lines_of
from hmpo.telemetry.careful import open_own
from hmpo.telemetry.plain import json_ready
from hmpo.telemetry.records import (
    decode,
    event_record,
    run_record,
    segment_record,
    time_record,
    validate,
)
from hmpo.telemetry.secrets import mask_secrets
from hmpo.telemetry.sinks import JsonlSink, make_sinks
from hmpo.telemetry.trackers import Trackers

logger = logging.getLogger(__name__)


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
        RunFolderError: it holds a run and this is no resume, or the other way round; or a link, a
            pipe or a device in place of a file of ours.
        ConfigError: the run in it was started with other settings that decide its numbers, or there
            is none and nothing would read one of the settings.
    """
    refuse_foreign(folder)
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
            f"{folder}: holds a run already; resume it with `{resume_command(config, folder)}`, "
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
        refuse_masked(config, folder)
        before = load_run_config(folder / "config.json")
        now = with_masks(as_stored(config), before)
        changed = changed_settings(before, measured_every(now, before.eval.every))
        if changed:
            raise ConfigError(
                f"{folder}: cannot be resumed with other settings, which would change its "
                f"numbers: {'; '.join(changed)}; leave them as they were, or start a new run "
                f"from its weights with `hmpo train --from {folder} --set ...`"
            )


def measured_every(config: RunConfig, every: int) -> RunConfig:
    """The configuration with another `eval.every`, where measuring decides nothing.

    It decides what controllers see, so with them the configuration stays as it is.
    """
    if config.agm.mode != "off":
        return config
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, every=every))


def sweep(folder: Path) -> None:
    """Delete what killed processes left half-written in a folder that is ours alone.

    What cannot be deleted does no harm: it is told, and left.
    """
    names = ("config.json", "environment.json", "report.html", PROMPTS)
    for pattern in (".policy-*", *(f".{name}.tmp-*" for name in names)):
        for path in folder.glob(pattern):
            try:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            except OSError as error:
                logger.warning("%s: could not be deleted (%s)", path, error.strerror)


class RunFiles:
    """What one process writes into a run's folder: settings, records, completions, checkpoints.

    Args:
        config: the run.
        place: its folder, which need not exist yet.
    """

    def __init__(self, config: RunConfig, place: Place) -> None:
        self.config, self.place, self.folder = config, place, place.path
        self.stored = as_stored(config)
        self.every = config.eval.every
        """`eval.every` that the run began with, which is the one in the hash."""
        self.hash = config_hash(self.stored)
        """Of the settings, in each checkpoint."""
        self.former: list[Path] = []
        """What a run left here that is started anew."""
        self.source: dict[str, Any] = {}
        """Where a hub's policy is from, beside the machine in environment.json."""
        self.run_id = ""
        """Stands in every record; set by `header`, or by a resumed run's first name."""
        self.timing: JsonlSink | None = None
        self.steps = 0
        """Updates done, for what is told of trackers."""

    def take(
        self, stack: contextlib.ExitStack, *, resume: bool, exist_ok: bool, overwrite: bool
    ) -> Checkpoint | None:
        """Make the folder, lock it, and load its newest valid checkpoint that fits the logs.

        There is none to load where the run is not resumed.

        Raises:
            RunFolderError: it cannot be made, is locked, or holds another run.
            CheckpointError: the checkpoint is of other settings.
            TelemetryError: the logs are damaged where every checkpoint vouches for them.
        """
        folder = self.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(
                f"{folder}: cannot be made ({error.strerror}); choose another `out`"
            ) from None
        self.lock = stack.enter_context(RunLock(folder))
        self.place.settle()
        # once more, as nobody else writes now
        check_folder(self.config, folder, resume=resume, exist_ok=exist_ok, overwrite=overwrite)
        if not resume:
            self.former = leftovers(folder)
            return None
        saved = load_checkpoint(folder / "checkpoints")
        if (folder / "config.json").is_file():
            before = load_run_config(folder / "config.json")
            self.stored = with_masks(self.stored, before)
            self._find_hash(saved, before.eval.every)
        done = 0 if saved is None else saved.step
        expected = f"at least the {done} that are done in {folder}"
        require(self.config.updates >= done, "updates", self.config.updates, expected)
        return None if saved is None else load_fitting(folder, self.hash, saved)

    def _find_hash(self, saved: Checkpoint | None, every: int) -> None:
        """The hash of the settings as the run began with them, which the checkpoint must carry.

        Raises:
            OtherRunError: it carries that of other settings.
        """
        began = every if saved is None else saved.state["run"].get("every", every)
        found = None if saved is None else read_manifest(saved.path, saved.step)["config_hash"]
        # a checkpoint of before says nothing of `every`: config.json's, or the one given
        for candidate in (began, self.config.eval.every):
            self.every = candidate
            self.hash = config_hash(measured_every(self.stored, candidate))
            if found in (None, self.hash):
                return
        assert saved is not None
        raise OtherRunError(
            f"{saved.path}: saved under the configuration {found!r}, expected {self.hash!r}; "
            "resume with the configuration of the run, or start a new run"
        )

    def check_room(self, state: Mapping[str, Any]) -> None:
        """Refuse a disk without room for the checkpoints of such a state (`StorageError`).

        Args:
            state: at the begin of a run, when no old weights are kept yet.
        """
        config = self.config
        rollouts = -(-config.updates // config.trainer.updates_per_rollout)
        old = min(config.rollout.lag, rollouts) * estimate_bytes({"model": state["model"]})
        copies = config.checkpoint.keep + 2 + keeps_best(config)
        check_free_space(self.folder, (estimate_bytes(state) + old) * copies)

    def header(self, base: Mapping[str, Any], saved: Checkpoint | None) -> dict[str, Any]:
        """The first record of telemetry.jsonl: on resume the one that is there.

        Args:
            base: adds to the values that controllers scale.
            saved: what the run goes on from.
        """
        first = None if saved is None else self._first_record()
        record = self._new_header(base) if first is None else first
        self.run_id = record["run_id"]
        return record

    def _first_record(self) -> dict[str, Any] | None:
        """The `run` record of the log that is there; None where it does not begin with one."""
        try:
            with open(open_own(self.folder / "telemetry.jsonl", os.O_RDONLY), "rb") as file:  # noqa: PTH123
                record = decode(file.readline(1 << 20))
            validate(record, strict=False)
        except (OSError, TelemetryError):
            return None
        return record if record["type"] == "run" else None

    def _new_header(self, base: Mapping[str, Any]) -> dict[str, Any]:
        config = self.config
        return run_record(
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

    def open(
        self, stack: contextlib.ExitStack, header: Mapping[str, Any], saved: Checkpoint | None
    ) -> None:
        """Write the settings and open the logs, cut to where the checkpoint left them."""
        folder, step = self.folder, None if saved is None else saved.step
        plain = to_dict(self.config)
        sinks = make_sinks(self.config.sinks, folder, plain, step, run_id=self.run_id)
        self.trackers = Trackers(sinks.sinks, self._lost)
        stack.callback(self.trackers.close)
        delete(self.former)
        sweep(folder)
        environment = describe_environment() | self.source
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
        self.timing = JsonlSink(path, resume_at="end")
        stack.callback(self.timing.close)
        stack.callback(self.trackers.close)  # before the log in which it would be told if they fail
        starts = path.read_bytes().count(b'"type":"segment"')
        self.timing.write(
            segment_record(
                self.run_id,
                starts,
                started_s=time.time(),
                pid=os.getpid(),
                resumed_from_step=resumed,
                launcher=launcher(),
            )
        )

    def publish(self, record: Mapping[str, Any]) -> None:
        """A record for telemetry.jsonl and for the trackers."""
        self.telemetry.write(record)
        self.trackers.write(record)

    def write_completion(self, record: Mapping[str, Any]) -> None:
        """One response for completions.jsonl, secrets masked."""
        self.completions.write(mask_secrets(json_ready(record)))

    def write_time(self, step: int, seconds: Mapping[str, Any]) -> None:
        """A record of the clock for timing.jsonl and for the trackers, by telemetry name."""
        assert self.timing is not None, "opened with the logs"
        record = time_record(self.run_id, step, seconds)
        self.timing.write(record)
        self.trackers.write(record)

    def note(self, step: int, name: str, data: Mapping[str, Any]) -> None:
        """An event of this process alone, for timing.jsonl: another run would not have it.

        Where the file is not open, or takes nothing more, the event is told by others at least.
        """
        if self.timing is not None:
            with contextlib.suppress(StorageError, ValueError):
                self.timing.write(event_record(self.run_id, step, name, data))

    def _lost(self, tracker: str, error: Exception) -> None:
        """Tell that a tracker has failed; the run goes on without it."""
        data = {"tracker": tracker, "why": failure_text(error)}
        logger.warning("tracker_detached: %s; the run goes on without it", data)
        self.note(self.steps, "tracker_detached", data)

    def logs(self) -> dict[str, tuple[int, str]]:
        """Bytes and SHA-256 of the two logs so far; a resume cuts them to this."""
        return {"telemetry": self.telemetry.end(), "completions": self.completions.end()}

    def check(self) -> None:
        """Insist that the folder and its logs are still where, and what, they were.

        Raises:
            RunFolderError: one line that says what has become of them.
        """
        self.place.check()
        self.lock.check()
        self.lock.beat()
        for log in (self.telemetry, self.completions, self.timing):
            if log is not None and (problem := log.moved()):
                raise RunFolderError(
                    f"{log.path}: was moved, deleted or written to by somebody else while the run "
                    f"went on ({problem}); the run stopped, put the file back and resume"
                )

    def save(self, step: int, state: Mapping[str, Any], best: int | None = None) -> None:
        """A checkpoint; the oldest beyond `checkpoint.keep` go, but for that of step `best`.

        Raises:
            NonFiniteError: the state holds NaN or infinities.
            RunFolderError: the folder or a log is no longer what it was.
            StorageError: it could not be written; the former ones stay.
        """
        self.check()
        self.telemetry.flush()
        self.completions.flush()
        keep, folder = self.config.checkpoint.keep, self.folder / "checkpoints"
        save_checkpoint(folder, step, state, keep=keep, spare=best, config_hash=self.hash)
        table = state.get("run", {}).get("steering", {}).get("records")
        if table is not None:
            write_atomic(self.folder / PROMPTS, "".join(f"{line}\n" for line in lines_of(table)))
