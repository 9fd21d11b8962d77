"""A run folder that is moved, damaged or a stranger's: one line, and nothing outside is touched."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hmpo import cli
from hmpo.checkpoint import write_atomic
from hmpo.checkpoint.lock import SILENCE_S, RunLock
from hmpo.errors import ConfigError, HmpoError, RunFolderError, TelemetryError
from hmpo.lab.report import write_report
from hmpo.run import loop as run
from hmpo.run.folder import FILES, FOLDERS
from tests.faults.micro import left_by, litter, micro_config, records, toml
from tests.faults.storage import fast_folder
from tests.run.test_run import assert_same

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(policy):
    """A finished run, to be copied."""
    with fast_folder() as folder:
        run.train(micro_config(policy, folder, checkpoint__keep=3))
        yield folder / "run"


def copied(finished: Path, out: Path) -> Path:
    return shutil.copytree(finished, out / "run")


# --- moved, deleted, replaced, rotated -----------------------------------------------------


def moved(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def replaced(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.mkdir()


def rotated(folder: Path) -> None:
    (folder / "telemetry.jsonl").rename(folder / "telemetry.jsonl.1")
    (folder / "telemetry.jsonl").touch()


def truncated(folder: Path) -> None:
    os.truncate(folder / "completions.jsonl", 0)


def written_to(folder: Path) -> None:
    with (folder / "telemetry.jsonl").open("a") as file:
        file.write("{}\n")


HAPPENINGS = [shutil.rmtree, moved, replaced, rotated, truncated, written_to]


@pytest.mark.parametrize("happens", HAPPENINGS, ids=lambda happens: happens.__name__)
def test_a_folder_or_log_that_is_no_longer_ours_stops_the_run_in_one_line(policy, out, happens):
    class Mover(run.Observer):
        def on_update(self, record, timing):
            if record["step"] == 2:
                happens(out / "run")

    with pytest.raises(RunFolderError, match="while the run went on") as caught:
        run.train(micro_config(policy, out, checkpoint__every=0), observer=Mover())
    assert "\n" not in str(caught.value) and str(out / "run") in str(caught.value)
    where = out / ("elsewhere" if (out / "elsewhere").exists() else "run")
    assert not (where / "policy").exists()
    if happens is replaced:
        assert list((out / "run").iterdir()) == [], "nothing is written into a folder of others"


def test_a_reward_that_changes_the_current_folder_does_not_split_the_run(policy, out, monkeypatch):
    monkeypatch.chdir(out)
    (out / "other").mkdir()
    config = micro_config(policy, Path("runs"), rewards__functions=[f"{__name__}:wanders"])
    result = run.train(config)
    assert Path.cwd() == out / "other"
    assert result.folder == out / "runs/run" and list((out / "other").iterdir()) == []
    assert litter(result.folder) == [] and len(records(result.folder, "step")) == 8


def wanders(prompts, completions, completion_ids, **columns):
    if Path("other").is_dir():
        os.chdir("other")
    return [sum(row) % 3 for row in completion_ids]


# --- damaged logs --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["telemetry.jsonl", "completions.jsonl"])
def test_a_log_that_was_damaged_falls_back_to_a_checkpoint_that_fits_or_is_one_line(
    finished, policy, out, name
):
    folder = copied(finished, out)
    expected = left_by(folder)
    expected.pop("config.json")  # it holds where the run was
    config = micro_config(policy, out, checkpoint__keep=3)
    log = folder / name
    whole = log.read_bytes()
    ends = {
        step: json.loads((folder / f"checkpoints/step-{step:08d}/state.json").read_bytes())
        for step in (6, 7, 8)
    }
    first = ends[6]["run"]["offsets"][name.removesuffix(".jsonl")]
    told = []

    class Ear(run.Observer):
        def on_event(self, event):
            told.append((event.data["checkpoint"], event.data["why"]))

    late = bytearray(whole)
    late[first + 10] ^= 4
    log.write_bytes(late)
    run.train(config, resume=True, observer=Ear())
    assert [checkpoint for checkpoint, _ in told][-1:] == ["step-00000007"]
    assert all(name in why and "SHA-256" in why for _, why in told)
    assert_same({**left_by(folder), "config.json": b""}, {**expected, "config.json": b""})
    early = bytearray(whole)
    early[first // 2] ^= 4
    log.write_bytes(early)
    with pytest.raises(TelemetryError, match="no checkpoint fits the logs") as caught:
        run.train(config, resume=True)
    assert "\n" not in str(caught.value) and name in str(caught.value)
    assert log.read_bytes() == early, "a refused resume changes nothing"


# --- links, pipes, devices -----------------------------------------------------------------


def linked(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def piped(path: Path, outside: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("plant", [linked, piped], ids=["link", "pipe"])
def test_what_is_no_file_of_its_own_in_a_run_folder_is_refused_by_every_command(
    finished, out, plant, capsys
):
    outside = out / "outside"
    assert {"config.json", "telemetry.jsonl", "run.lock"} < set(FILES) and "policy" in FOLDERS
    for name in ("config.json", "telemetry.jsonl", "run.lock", "checkpoints", "policy/config.json"):
        shutil.rmtree(out / "run", ignore_errors=True)
        folder = copied(finished, out)
        if (folder / name).is_dir():
            shutil.copytree(folder / name, outside)
        else:
            outside.write_text("mine")
        before = sorted(outside.rglob("*"))
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        (folder / name).unlink(missing_ok=True)
        plant(folder / name, outside)
        for command in (["train", "--resume"], ["report"], ["eval"]):
            assert cli.main([*command, str(folder)]) == 2, (name, command)
            (line,) = capsys.readouterr().err.splitlines()
            assert f"{folder / name}: is a " in line and "not followed" in line
        assert sorted(outside.rglob("*")) == before
        if outside.is_dir():
            shutil.rmtree(outside)
        else:
            assert outside.read_text() == "mine"
            outside.unlink()


def test_a_log_with_a_second_name_is_not_written_to(finished, policy, out):
    folder = copied(finished, out)
    os.link(folder / "timing.jsonl", out / "mine")
    before = (out / "mine").read_bytes()
    with pytest.raises(HmpoError, match="hard link"):
        run.train(micro_config(policy, out, checkpoint__keep=3), resume=True)
    assert (out / "mine").read_bytes() == before


# --- names, settings, locks, leavings ------------------------------------------------------


def test_a_folder_whose_name_is_no_runs_name_can_be_resumed_and_reported(finished, out, capsys):
    folder = shutil.copytree(finished, out / "my run")
    shutil.rmtree(folder / "policy")
    more = ["--set", "updates=9", "--allow-code", "--quiet"]
    assert cli.main(["train", "--resume", str(folder), *more]) == 0, capsys.readouterr().err
    assert len(records(folder, "step")) == 9 and (folder / "policy").is_dir()
    assert not (out / "run").exists()


def test_fewer_updates_than_are_done_are_refused_and_nothing_is_rewritten(finished, policy, out):
    folder = copied(finished, out)
    before = (folder / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=r"updates: got 5, expected at least the 8"):
        run.train(micro_config(policy, out, updates=5, checkpoint__keep=3), resume=True)
    assert (folder / "config.json").read_bytes() == before


def test_decisions_carry_the_first_run_id_and_the_replay_equals_them(policy, out, capsys):
    advised = {"agm__mode": "advise", "agm__controls": ["lr"]}
    run.train(micro_config(policy, out, updates=4, **advised))
    (out / "run").rename(out / "renamed")
    run.train(micro_config(policy, out, "renamed", updates=8, **advised), resume=True)
    assert len({record["run_id"] for record in records(out / "renamed")}) == 1
    assert cli.main(["agm", "replay", str(out / "renamed"), "--compare"]) == 0
    log = out / "renamed/telemetry.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    last = next(line for line in reversed(lines) if line["type"] == "decision")
    last["run_id"] = "another"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    capsys.readouterr()
    assert cli.main(["agm", "replay", str(out / "renamed"), "--compare"]) == 1
    captured = capsys.readouterr()
    assert "run_id" in captured.out + captured.err and "another" in captured.out + captured.err


def elsewhere(folder: Path, age: float, **changes) -> None:
    """A lock of another host, last touched `age` seconds ago."""
    (folder / "run.lock").unlink(missing_ok=True)
    with RunLock(folder):
        owner = json.loads((folder / "run.lock").read_text())
    path = folder / "run.lock"
    path.write_text(json.dumps(owner | {"host": "elsewhere", "pid": 4} | changes))
    then = path.stat().st_mtime - age
    os.utime(path, (then, then))


def test_a_silent_lock_of_another_host_is_taken_over_and_a_live_one_is_not(out):
    elsewhere(out, 5)
    with pytest.raises(RunFolderError, match=r"heard of 5 s ago; it is taken over after 600 s"):
        RunLock(out).acquire()
    elsewhere(out, SILENCE_S + 5)
    with RunLock(out) as lock:
        lock.check()
        (out / "run.lock").unlink()
        (out / "run.lock").write_text("another's")
        with pytest.raises(RunFolderError, match="another process has taken the folder over"):
            lock.check()
    elsewhere(out, SILENCE_S + 5, silence_s=None)
    with pytest.raises(RunFolderError, match="another host; choose another folder"):
        RunLock(out).acquire()
    assert [path.name for path in out.iterdir()] == ["run.lock"]


def test_what_a_killed_writer_left_is_swept_by_the_next_one(finished, out):
    folder = copied(finished, out)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (folder / f".report.html.tmp-{gone.pid}-0a1b2c3d").write_text("half")
    (folder / f".report.html.tmp-{os.getpid()}-0a1b2c3d").write_text("another thread's")
    write_report([folder])
    left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert left == [f".report.html.tmp-{os.getpid()}-0a1b2c3d"]
    write_atomic(out / "[x]", "a")
    assert (out / "[x]").read_text() == "a"


# --- output --------------------------------------------------------------------------------


def test_a_reader_who_leaves_and_paths_that_cannot_be_are_no_tracebacks(finished, out):
    script = (
        f"cd {ROOT}; export HMPO={sys.executable}; "
        f"$HMPO -m hmpo report {finished} --out {out}/r.html | true; "
        f"$HMPO -m hmpo report {finished} --out ''; "
        f"$HMPO -m hmpo report {finished} --out {out}/{'x' * 300}; "
        f"$HMPO -m hmpo report {'y' * 5000}; "
        f"$HMPO -m hmpo --help > /dev/full"
    )
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=280)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 4 and all(line.startswith("hmpo: ") for line in lines), lines


def test_a_skipped_update_and_a_warning_are_told_once(policy, out):
    path = out / "run.toml"
    config = micro_config(policy, out, trainer__minibatches=1, optimizer__lr=1e30, updates=3)
    path.write_text(toml(config))
    done = subprocess.run(
        [sys.executable, "-m", "hmpo", "train", str(path), "--no-report"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    told = done.stdout + done.stderr
    assert told.count("one update per rollout") == 1 and "UserWarning" not in told
    assert "skipped: not finite" not in done.stderr
    assert "Traceback" not in told
