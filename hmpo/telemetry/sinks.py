"""Where records go: the JSONL file that is the log of record, and optional trackers."""

import hashlib
import importlib
import math
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

from hmpo.errors import (
    ConfigError,
    HmpoError,
    MissingDependencyError,
    RunFolderError,
    StorageError,
    TelemetryError,
    byte_size,
)
from hmpo.telemetry.careful import open_own
from hmpo.telemetry.lookup import lookup
from hmpo.telemetry.records import config_hash, encode, make_run_id
from hmpo.telemetry.secrets import mask_secrets


class Sink(Protocol):
    """What takes records."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one record."""
        ...

    def flush(self) -> None:
        """Hand on what is held back."""
        ...

    def close(self) -> None:
        """Flush and release; calling it twice is harmless."""
        ...


class JsonlSink:
    """Appends records to a file, one line and one system call each; never keeps half a line.

    A kill may cut the line at hand short; the next start drops it. The file is opened for appending
    alone, and only a regular file that has no other name is written to.

    Args:
        path: the file; its folder must exist.
        resume_at: None starts a new file; a byte offset, as from `offset()`, keeps that much of
            an existing one and drops the rest; "end" keeps all its whole lines. With 0 and "end"
            the file need not exist.

    Raises:
        RunFolderError: the file exists already and `resume_at` is None.
        TelemetryError: `resume_at` is not the end of a record of that file.
        StorageError: the disk is full or the file cannot be written; the line that did not fit
            is taken back.

    Example:
        >>> with JsonlSink(folder / "telemetry.jsonl") as sink:
        ...     sink.write(step_record("run-0123", {"step": 1, "loss": 0.1}))
    """

    def __init__(self, path: Path | str, resume_at: int | Literal["end"] | None = None) -> None:
        self.path = Path(path)
        flags = os.O_RDWR | os.O_APPEND
        if resume_at in (None, 0, "end"):
            flags |= os.O_CREAT
        if resume_at is None:
            flags |= os.O_EXCL
        try:
            # The raw file has no buffer: a write is one system call, and what it took is known.
            self._file = open(open_own(self.path, flags), "r+b", buffering=0)  # noqa: SIM115, PTH123
        except FileExistsError:
            message = f"{self.path} exists already; choose another run name or resume that run"
            raise RunFolderError(message) from None
        except OSError as error:
            raise self._failed(error) from None
        try:
            self._end = self._keep(resume_at)
        except BaseException:
            self._file.close()
            raise

    def _keep(self, resume_at: int | Literal["end"] | None) -> int:
        self._digest, self._end = hashlib.sha256(), 0
        if resume_at is None:
            return 0
        size = self._file.seek(0, os.SEEK_END)
        if resume_at == "end":
            resume_at = self._whole_lines(size)
        self._end = size
        self.truncate_to(resume_at)
        return self._end

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; it is in the file (not yet on the disk) when this returns."""
        line = (encode(record) + "\n").encode("ascii")
        try:
            written = self._file.write(line) or 0
            if written == len(line):
                self._end += written
                self._digest.update(line)
                return
            problem: OSError | None = None
        except OSError as error:
            problem = error
        self._drop_tail()
        raise self._failed(problem) from None

    def offset(self) -> int:
        """Bytes of whole records, after forcing them onto the disk."""
        self.flush()
        return self._end

    def end(self) -> tuple[int, str]:
        """Bytes of whole records so far and their SHA-256 (hex)."""
        return self._end, self._digest.hexdigest()

    def moved(self) -> str | None:
        """What has become of the file, if its path leads elsewhere or it has another length."""
        try:
            there, here = self.path.lstat(), os.fstat(self._file.fileno())
        except OSError as error:
            return error.strerror or "it cannot be reached"
        if (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino):
            return "another file is in its place"
        if here.st_size != self._end:
            return f"it holds {here.st_size} bytes, {self._end} were written"
        return None

    def truncate_to(self, offset: int) -> None:
        """Drop everything after byte `offset`, which must be the end of a record."""
        if not 0 <= offset <= self._end:
            raise TelemetryError(
                f"{self.path}: cannot resume at byte {offset}, the file holds {self._end} bytes; "
                "it is not the log that the checkpoint was saved with"
            )
        if offset > 0:
            self._file.seek(offset - 1)
            if self._file.read(1) != b"\n":
                raise TelemetryError(
                    f"{self.path}: byte {offset} is not the end of a record; "
                    "it is not the log that the checkpoint was saved with"
                )
        self._end, self._digest = offset, self._hashed(offset)
        try:
            self._file.truncate(offset)
            self._file.seek(offset)
        except OSError as error:
            raise self._failed(error) from None

    def flush(self) -> None:
        """Force all records onto the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failed(error) from None

    def close(self) -> None:
        """Flush and close the file."""
        if not self._file.closed:
            try:
                self.flush()
            finally:
                self._file.close()

    def __enter__(self) -> "JsonlSink":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drop_tail(self) -> None:
        """Take back a line of which only a part fitted."""
        self._file.truncate(self._end)
        self._file.seek(self._end)

    def _hashed(self, end: int) -> Any:
        """SHA-256 object over the first `end` bytes."""
        digest, left = hashlib.sha256(), end
        self._file.seek(0)
        while left > 0 and (chunk := self._file.read(min(left, 1 << 20))):
            digest.update(chunk)
            left -= len(chunk)
        return digest

    def _whole_lines(self, size: int) -> int:
        """Bytes up to and including the last newline."""
        position = size
        while position > 0:
            start = max(0, position - 65536)
            self._file.seek(start)
            newline = self._file.read(position - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            position = start
        return 0

    def _failed(self, error: OSError | None) -> StorageError:
        reason = error.strerror if error and error.strerror else "the disk took only part of it"
        return StorageError(f"cannot write {self.path}: {reason} ({_free(self.path)})")


def _free(path: Path) -> str:
    try:
        return f"{byte_size(shutil.disk_usage(path.parent).free)} free"
    except OSError:
        return "folder not reachable"


class MultiSink:
    """Hands every record to several sinks, in order."""

    def __init__(self, sinks: Sequence[Any]) -> None:
        self.sinks = tuple(sinks)

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one record."""
        for sink in self.sinks:
            sink.write(record)

    def flush(self) -> None:
        """Flush every sink."""
        for sink in self.sinks:
            sink.flush()

    def close(self) -> None:
        """Close every sink, the later ones even if an earlier one fails."""
        _close_all(list(self.sinks))


def _close_all(sinks: list[Any]) -> None:
    if sinks:
        try:
            sinks[0].close()
        finally:
            _close_all(sinks[1:])


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a step, eval or time record, under the names they carry."""
    if record.get("type") not in ("step", "eval", "time"):
        return {}
    result = {}
    for name, value in record.items():
        row = lookup(name)
        framed = row is not None and (row.name == "step" or row.kind == "str")
        if isinstance(value, int | float) and not framed and math.isfinite(value):
            result[name] = float(value)
    return result


class TensorBoardSink:
    """Writes scalars for TensorBoard; needs `pip install 'hmpo[tensorboard]'`.

    Args:
        folder: where the event files go.
        resume_step: on resume, the checkpoint's step; later points of the old log are hidden.
    """

    def __init__(self, folder: Path | str, resume_step: int | None = None) -> None:
        module = _optional("torch.utils.tensorboard", "tensorboard", "hmpo[tensorboard]")
        purge = None if resume_step is None else resume_step + 1
        self._writer = module.SummaryWriter(log_dir=str(folder), purge_step=purge)

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one record; events become texts."""
        step = record.get("step", 0)
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, step)
        if record.get("type") == "event":
            text = f"    {encode(mask_secrets(record['data']))}"  # a Markdown code block
            self._writer.add_text(f"event/{record['name']}", text, step)

    def flush(self) -> None:
        """Write the event file."""
        self._writer.flush()

    def close(self) -> None:
        """Write and close the event file."""
        self._writer.close()


class WandbShapedSink:
    """Logs to Weights & Biases or trackio, which share one call form.

    Args:
        backend: the package; trackio keeps everything on this machine.
        project: name of the project.
        run_id: what tells the run from others.
        config: the resolved configuration; secrets in it are masked.
        resume: continue the run of this id.
        name: of the run; None takes `run_id`.
    """

    def __init__(
        self,
        backend: Literal["wandb", "trackio"],
        project: str,
        run_id: str,
        config: Mapping[str, Any],
        resume: bool = False,
        name: str | None = None,
    ) -> None:
        self._events: Counter[str] = Counter()
        self._module = _optional(backend, backend, f"hmpo[{backend}]")
        more = {"id": run_id} if backend == "wandb" else {}
        self._run = self._module.init(
            project=project,
            name=name or run_id,
            config=mask_secrets(config),
            resume="allow" if resume else "never",
            **more,
        )

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one record: its numbers, and of events how many of that name there were."""
        values = scalars(record)
        if record.get("type") == "event":
            self._events[record["name"]] += 1
            values = {f"event/{record['name']}": float(self._events[record["name"]])}
        if values and self._run is not None:
            self._module.log(values, step=record["step"])

    def flush(self) -> None:
        """Nothing to do: the package has its own queue."""

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run = None
            self._module.finish()


def make_sinks(
    names: Sequence[str],
    folder: Path,
    config: Mapping[str, Any],
    resume_step: int | None = None,
    run_id: str | None = None,
) -> MultiSink:
    """The optional trackers of a run.

    Args:
        names: any of tensorboard, trackio, wandb.
        folder: the run folder; TensorBoard's files go to its `tensorboard/`.
        config: the resolved configuration; its `tracker` has the project and the run's name.
        resume_step: step of the checkpoint on resume, else None.
        run_id: what its records carry; None makes it from the configuration.

    Raises:
        MissingDependencyError: the message gives the pip command.
        TelemetryError: a tracker could not be started.
    """
    if run_id is None:
        run_id = make_run_id(str(config["name"]), config_hash(config))
    made: list[Sink] = []
    tracker = config.get("tracker", {})
    project, called = tracker.get("project", "hmpo"), tracker.get("name")
    for name in names:
        if name not in ("tensorboard", "trackio", "wandb"):
            raise ConfigError(f"sinks: got {name!r}, expected tensorboard, trackio or wandb")
        try:
            if name == "tensorboard":
                parts = [part for part in (project, called) if part not in ("hmpo", None)]
                place = folder.joinpath("tensorboard", *map(str, parts))
                made.append(TensorBoardSink(place, resume_step))
            else:
                resumed = resume_step is not None
                made.append(WandbShapedSink(name, project, run_id, config, resumed, called))  # type: ignore[arg-type]
        except HmpoError:
            raise
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            raise TelemetryError(
                f"sinks: {name} could not be started ({type(error).__name__}: {said}); mend that, "
                "or leave it out of `sinks`"
            ) from error
    return MultiSink(made)


def _optional(module: str, package: str, extra: str) -> ModuleType:
    """Import an optional module, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingDependencyError(
            f"{package} is not installed; run: pip install '{extra}'"
        ) from None
