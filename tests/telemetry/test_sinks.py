import builtins
import contextlib
import errno
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from hmpo.errors import (
    ConfigError,
    MissingDependencyError,
    RunFolderError,
    StorageError,
    TelemetryError,
)
from hmpo.telemetry import sinks
from hmpo.telemetry.records import eval_record, event_record, step_record

ROOT = Path(__file__).resolve().parents[2]


def steps(first, last):
    return [step_record("r", {"step": i, "loss": i / 7}) for i in range(first, last + 1)]


def write(path, records, resume_at=None):
    with sinks.JsonlSink(path, resume_at) as sink:
        for record in records:
            sink.write(record)
        return sink.offset()


def test_each_record_is_in_the_file_as_soon_as_write_returns(tmp_path):
    sink = sinks.JsonlSink(tmp_path / "t.jsonl")
    for i, record in enumerate(steps(1, 3), start=1):
        sink.write(record)
        lines = (tmp_path / "t.jsonl").read_bytes().splitlines(keepends=True)
        assert len(lines) == i and lines[-1].endswith(b"\n")
    assert sink.offset() == (tmp_path / "t.jsonl").stat().st_size
    sink.close()
    sink.close()


def test_resume_at_a_checkpoint_gives_the_bytes_of_an_undisturbed_run(tmp_path):
    write(tmp_path / "straight.jsonl", steps(1, 8))
    offset = write(tmp_path / "killed.jsonl", steps(1, 4))
    write(tmp_path / "killed.jsonl", steps(5, 6), resume_at=offset)
    with (tmp_path / "killed.jsonl").open("ab") as file:
        file.write(b'{"type":"step","run_')
    write(tmp_path / "killed.jsonl", steps(5, 8), resume_at=offset)
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "straight.jsonl").read_bytes()


@pytest.mark.parametrize("whole", [0, 1, 3])
def test_resume_at_the_end_drops_only_a_torn_last_line(tmp_path, whole):
    path = tmp_path / "timing.jsonl"
    offset = write(path, steps(1, whole))
    with path.open("ab") as file:
        file.write(b"x" * 100_000)
    assert write(path, [], resume_at="end") == offset
    assert path.stat().st_size == offset


def test_truncate_to_returns_to_an_earlier_offset(tmp_path):
    with sinks.JsonlSink(tmp_path / "t.jsonl") as sink:
        sink.write(steps(1, 1)[0])
        offset = sink.offset()
        sink.write(steps(2, 2)[0])
        sink.truncate_to(offset)
        sink.write(steps(3, 3)[0])
    kept = [json.loads(line)["step"] for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert kept == [1, 3]


def test_an_offset_of_another_file_is_refused_and_nothing_is_lost(tmp_path):
    path = tmp_path / "t.jsonl"
    size = write(path, steps(1, 2))
    for offset, message in ((size + 1, f"the file holds {size} bytes"), (5, "not the end of")):
        with pytest.raises(TelemetryError, match=message):
            sinks.JsonlSink(path, resume_at=offset)
        assert path.stat().st_size == size


def test_a_new_sink_never_overwrites_a_log(tmp_path):
    write(tmp_path / "t.jsonl", steps(1, 1))
    before = (tmp_path / "t.jsonl").read_bytes()
    with pytest.raises(RunFolderError, match=r"t\.jsonl exists already"):
        sinks.JsonlSink(tmp_path / "t.jsonl")
    assert (tmp_path / "t.jsonl").read_bytes() == before


@pytest.mark.parametrize("resume_at", [0, "end"])
def test_resume_of_a_file_that_was_never_written_starts_it(tmp_path, resume_at):
    assert write(tmp_path / "t.jsonl", steps(1, 1), resume_at) > 0
    with pytest.raises(StorageError, match="No such file"):
        sinks.JsonlSink(tmp_path / "gone.jsonl", resume_at=10)
    assert not (tmp_path / "gone.jsonl").exists()


def test_a_missing_folder_is_one_line_of_storage_error(tmp_path):
    with pytest.raises(StorageError, match=r"cannot write .*No such file") as caught:
        sinks.JsonlSink(tmp_path / "no" / "t.jsonl")
    assert "\n" not in str(caught.value)


class FullDisk(io.FileIO):
    """Takes `room` bytes, then is full: first by a short write, then by ENOSPC."""

    room = 0

    def write(self, data):
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = super().write(data[: self.room])
        self.room -= taken
        return taken


def test_a_full_disk_keeps_whole_lines_and_says_where_and_how_much_is_free(tmp_path):
    path = tmp_path / "t.jsonl"
    sink = sinks.JsonlSink(path)
    sink._file.close()
    sink._file = FullDisk(path, "r+b")
    line = len(json.dumps(steps(1, 1)[0], separators=(",", ":"))) + 1
    sink._file.room = line + 20
    sink.write(steps(1, 1)[0])
    for expected in ("the disk took only part of it", "No space left on device"):
        with pytest.raises(StorageError, match=expected) as caught:
            sink.write(steps(2, 2)[0])
        assert str(path) in str(caught.value) and "B free" in str(caught.value)
        assert [json.loads(row)["step"] for row in path.read_text().splitlines()] == [1]
    sink._file.room = 10_000
    sink.write(steps(3, 3)[0])
    sink.close()
    assert [json.loads(row)["step"] for row in path.read_text().splitlines()] == [1, 3]


def test_a_killed_writer_loses_at_most_the_line_at_hand_and_resume_drops_it(tmp_path):
    path = tmp_path / "t.jsonl"
    code = (
        "import sys, itertools; from hmpo.telemetry.sinks import JsonlSink\n"
        "sink = JsonlSink(sys.argv[1])\n"
        "for i in itertools.count(): sink.write({'step': i, 'text': 'x' * 5000})"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT)
    deadline = time.monotonic() + 20
    while not (path.exists() and path.stat().st_size > 200_000):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # The system may cut a write of several pages short for a fatal signal: the last line only.
    *whole, last = path.read_bytes().splitlines(keepends=True)
    whole += [last] if last.endswith(b"\n") else []
    assert [json.loads(line)["step"] for line in whole] == list(range(len(whole)))
    with sinks.JsonlSink(path, resume_at="end") as again:
        again.write({"step": len(whole)})
    lines = path.read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in lines] == list(range(len(whole) + 1))


def test_multi_sink_hands_on_everything_and_closes_all_even_if_one_fails():
    calls = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def write(self, record):
            calls.append((self.name, record["step"]))

        def flush(self):
            calls.append((self.name, "flush"))

        def close(self):
            calls.append((self.name, "close"))
            if self.name == "a":
                raise StorageError("full")

    multi = sinks.MultiSink([Recorder("a"), Recorder("b")])
    multi.write({"step": 1})
    multi.flush()
    with pytest.raises(StorageError):
        multi.close()
    assert calls == [(n, c) for c in (1, "flush", "close") for n in "ab"]


def test_scalars_are_the_finite_numbers_of_measured_records():
    record = step_record(
        "r",
        {"step": 4, "loss": float("nan"), "lr": 0.1, "update_skipped": True}
        | {"qk/max_by_layer": [1.0]},
    )
    assert sinks.scalars(record) == {"lr": 0.1, "learning_rate": 0.1, "update_skipped": 1.0}
    assert sinks.scalars(event_record("r", 4, "x", {"a": 1})) == {}


def test_tensorboard_reads_back_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = sinks.TensorBoardSink(tmp_path)
    for record in steps(1, 3):
        sink.write(record)
    sink.write(eval_record("r", 3, {"eval/greedy": 0.5}))
    sink.write(event_record("r", 3, "rollback", {"api_key": "hunter2"}))
    sink.close()
    log = EventAccumulator(str(tmp_path)).Reload()
    assert [(p.step, round(p.value, 4)) for p in log.Scalars("loss")] == [
        (i, round(i / 7, 4)) for i in (1, 2, 3)
    ]
    assert log.Scalars("eval/greedy")[0].value == 0.5
    text = log.Tensors("event/rollback/text_summary")[0].tensor_proto.string_val[0]
    assert b"hunter2" not in text


@pytest.mark.parametrize("backend", ["wandb", "trackio"])
def test_wandb_shaped_sink_logs_numbers_by_step_and_masks_the_config(monkeypatch, backend):
    calls = []
    fake = types.ModuleType(backend)
    fake.init = lambda **kw: calls.append(("init", kw)) or object()
    fake.log = lambda values, step: calls.append(("log", step, values))
    fake.finish = lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, backend, fake)
    sink = sinks.WandbShapedSink(backend, "p", "run-1", {"lr": 0.1, "api_key": "x"}, resume=True)
    for record in (*steps(1, 1), event_record("r", 1, "x", {})):
        sink.write(record)
    sink.close()
    sink.close()
    more = {"id": "run-1"} if backend == "wandb" else {}
    config = {"lr": 0.1, "api_key": "***"}
    init = {"project": "p", "name": "run-1", "config": config, "resume": "allow", **more}
    logs = [("log", 1, {"loss": 1 / 7}), ("log", 1, {"event/x": 1.0})]
    assert calls == [("init", init), *logs, ("finish",)]


@pytest.mark.parametrize(
    ("make", "command"),
    [
        (lambda: sinks.WandbShapedSink("trackio", "p", "r", {}), "pip install 'hmpo[trackio]'"),
        (lambda: sinks.WandbShapedSink("wandb", "p", "r", {}), "pip install 'hmpo[wandb]'"),
        (lambda: sinks.TensorBoardSink("x"), "pip install 'hmpo[tensorboard]'"),
    ],
)
def test_a_missing_tracker_says_how_to_install_it(monkeypatch, make, command):
    def refuse(name):
        raise ImportError(name)

    monkeypatch.setattr(sinks.importlib, "import_module", refuse)
    with pytest.raises(MissingDependencyError) as caught:
        make()
    assert command in str(caught.value) and isinstance(caught.value, builtins.ImportError)


def test_make_sinks_makes_what_the_config_names(tmp_path):
    pytest.importorskip("tensorboard")
    made = sinks.make_sinks(["tensorboard"], tmp_path, {"name": "demo"})
    made.write(steps(1, 1)[0])
    made.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))
    assert sinks.make_sinks([], tmp_path, {"name": "demo"}).sinks == ()
    told = {"name": "demo", "tracker": {"project": "mine", "name": "first"}}
    sinks.make_sinks(["tensorboard"], tmp_path, told).close()
    assert list((tmp_path / "tensorboard" / "mine" / "first").glob("events.*"))
    with pytest.raises(ConfigError, match="got 'mlflow', expected tensorboard, trackio or wandb"):
        sinks.make_sinks(["mlflow"], tmp_path, {"name": "demo"})


# --- the trackers themselves, offline, in a process of their own ------------------------------

TRACK = """
import sys
from hmpo.telemetry.records import eval_record, step_record
from hmpo.telemetry.sinks import WandbShapedSink

sink = WandbShapedSink(sys.argv[1], "hmpo-test", "run-1", {"lr": 0.1, "api_key": "hush"})
for step in range(3):
    sink.write(step_record("run-1", {"step": step, "loss": 0.5 * step, "update_skipped": False}))
sink.write(eval_record("run-1", 3, {"eval/name": "after", "eval/mean": 0.75}))
sink.close()
"""


def tracked(backend, folder):
    """Log a few records with the real package; nothing leaves the machine."""
    pytest.importorskip(backend)
    env = dict(os.environ, WANDB_MODE="offline", WANDB_DIR=str(folder), TRACKIO_DIR=str(folder))
    command = [sys.executable, "-c", TRACK, backend]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"hush" not in b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())


@pytest.mark.slow
def test_trackio_itself_stores_the_numbers_by_step(tmp_path):
    tracked("trackio", tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "hmpo-test.db")) as database:
        rows = database.execute("select step, metrics from metrics order by id").fetchall()
    stored = [(step, json.loads(metrics)) for step, metrics in rows]
    assert [step for step, _ in stored] == [0, 1, 2, 3]
    assert [values.get("loss") for _, values in stored] == [0.0, 0.5, 1.0, None]
    assert stored[3][1]["eval/mean"] == 0.75


@pytest.mark.slow
def test_wandb_itself_stores_the_numbers_by_step(tmp_path):
    tracked("wandb", tmp_path)
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, stored = next(tmp_path.rglob("*.wandb")).read_bytes(), 7, []
    assert len(data) < 32768  # one block: each record is whole, behind checksum, length and type
    while at < len(data):
        length = int.from_bytes(data[at + 4 : at + 6], "little")
        record = Record.FromString(data[at + 7 : at + 7 + length])
        at += 7 + length
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            stored.append(
                {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
            )
    assert [row["_step"] for row in stored] == [0, 1, 2, 3]
    assert [row.get("loss") for row in stored] == [0.0, 0.5, 1.0, None]
    assert stored[3]["eval/mean"] == 0.75
