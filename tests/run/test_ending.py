"""Whatever ends a run: what was done is saved, the reason is in its log and report."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hmpo.cli.screen import Screen
from hmpo.config import CheckpointConfig
from hmpo.errors import ConfigError, RewardError
from hmpo.lab.report import write_report
from hmpo.run import loop as run
from hmpo.run.ending import failure_text
from hmpo.run.saving import Cadence
from hmpo.run.steering import Steering
from hmpo.telemetry import sinks
from hmpo.telemetry.ingest import read_process_events
from hmpo.trainer.power_mean import PowerMeanTrainer
from tests.faults.micro import left_by, litter, micro_config, records, toml
from tests.run.test_run import assert_same, trained

ROOT = Path(__file__).parents[2]


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


# --- an exception, wherever it comes from --------------------------------------------------


class Broke(Exception):
    pass


def breaks(patch: pytest.MonkeyPatch, owner, name: str, when) -> None:
    """Let a method raise as soon as `when` is true of what it is called with."""
    method = getattr(owner, name)

    def broken(self, *args, **keywords):
        if when(self, *args):
            raise Broke("it broke at <object at 0x7f00deadbeef>")
        return method(self, *args, **keywords)

    patch.setattr(owner, name, broken)


SITES = {
    "the first evaluation": (run.Run, "_evaluate", lambda r, *_: r.saver.before is None, 0),
    "a task": (Steering, "_own_prompts", lambda s, *_: s.trainer.step == 4, 4),
    "a rollout": (PowerMeanTrainer, "advantages", lambda t, *_: t.step == 4, 4),
    "what is written of a rollout": (
        run.Run,
        "_report_rollout",
        lambda r, *_: r.trainer.step == 4,
        4,
    ),
    "a forward pass": (PowerMeanTrainer, "gradient", lambda t, *_: t.step == 5, 5),
    "an evaluation on the way": (run.Run, "_evaluate", lambda r, *_: r.trainer.step == 5, 5),
    "the last evaluation": (run.Run, "_evaluate", lambda r, *_: r.trainer.step == 8, 8),
}


@pytest.mark.parametrize("site", SITES)
def test_any_exception_saves_says_why_is_raised_and_the_resumed_run_is_the_same(policy, out, site):
    config = micro_config(policy, out, checkpoint__every=0, eval__every=5)
    folder = out / "run"
    run.train(config)
    expected = left_by(folder)
    shutil.rmtree(folder)
    owner, name, when, step = SITES[site]
    with pytest.MonkeyPatch.context() as patch:
        breaks(patch, owner, name, when)
        with pytest.raises(Broke) as caught:
            run.train(config)
    assert f"hmpo train --resume {folder}" in caught.value.__notes__[0]
    (end,) = records(folder, "end")
    assert (end["status"], end["step"]) == ("failed", step)
    assert end["reason"] == "Broke: it broke at <object at 0x...>"
    assert saved_steps(folder) == [step]
    assert not (folder / "run.lock").exists()
    assert run.train(config, resume=True).status == "completed"
    assert_same(left_by(folder), expected)
    assert litter(folder) == []


@pytest.mark.parametrize("name", ["_check_step", "measure"])
def test_what_breaks_within_a_step_leaves_the_checkpoint_before_it(policy, out, name):
    """Weights that have moved without being counted are no state to go on from."""
    config = micro_config(policy, out, checkpoint__every=3)
    run.train(config)
    expected = left_by(out / "run")
    shutil.rmtree(out / "run")
    with pytest.MonkeyPatch.context() as patch:
        breaks(patch, PowerMeanTrainer, name, lambda trainer, *_: trainer.step == 4)
        with pytest.raises(Broke):
            run.train(config)
    assert saved_steps(out / "run") == [3]
    assert records(out / "run", "end")[-1]["status"] == "failed"
    run.train(config, resume=True)
    assert_same(left_by(out / "run"), expected)


def test_the_report_of_a_failed_run_says_why(policy, out):
    config = micro_config(policy, out, rewards__functions=["tests.faults.rewards:raises"])
    with pytest.raises(RewardError):
        run.train(config)
    page = write_report([out / "run"]).read_text()
    assert "0 updates: reward &#39;raises&#39; at step 0: raised KeyError" in page


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError


def test_a_reason_is_one_short_line_whatever_was_raised():
    assert failure_text(ConfigError("updates: got 0")) == "updates: got 0"
    assert failure_text(ValueError("a\n b")) == "ValueError: a b"
    assert failure_text(ZeroDivisionError()) == "ZeroDivisionError"
    assert failure_text(Unspeakable()) == "Unspeakable: its text cannot be made"
    assert failure_text(ValueError("x" * 9000)).endswith("x...")
    assert "hf_abcdefghijklmnop" not in failure_text(ValueError("token hf_abcdefghijklmnop"))


# --- saving along the way ------------------------------------------------------------------


def test_a_run_saves_along_the_way_unless_it_is_told_not_to():
    assert CheckpointConfig().every == "auto"
    now = [0.0]
    cadence = Cadence("auto", lambda: now[0])
    assert cadence.due(1), "after the first update: it shows what a save takes"
    for seconds, pause in ((0.01, 10.0), (1.0, 50.0), (100.0, 1800.0)):
        cadence.saved(seconds)
        now[0] += pause - 0.5
        assert not cadence.due(2)
        now[0] += 0.5
        assert cadence.due(2)
    assert [step for step in range(1, 7) if Cadence(3).due(step)] == [3, 6]
    assert not any(Cadence(0).due(step) for step in range(9))


def test_by_default_a_killed_run_has_something_to_resume(policy, out):
    config = micro_config(policy, out, checkpoint__every="auto")
    run.train(config)
    expected = left_by(out / "run")
    assert saved_steps(out / "run") == [1, 8]
    shutil.rmtree(out / "run/checkpoints/step-00000008")
    run.train(config, resume=True)
    assert_same(left_by(out / "run"), expected)


# --- output that fails ---------------------------------------------------------------------


class Failing:
    """A tracker that takes so many records and then raises."""

    def __init__(self, records: int, error: Exception) -> None:
        self.left, self.error = records, error

    def write(self, record) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error

    def flush(self) -> None:
        raise self.error

    close = flush


@pytest.mark.parametrize("count", [3, 10**6], ids=["writing", "closing"])
def test_a_tracker_that_fails_is_let_go_of_with_an_event(policy, out, caplog, count):
    error = RuntimeError("offline")
    run.train(micro_config(policy, out, "plain"))
    with pytest.MonkeyPatch.context() as patch:
        made = sinks.MultiSink([Failing(count, error)])
        patch.setattr("hmpo.run.files.make_sinks", lambda *args, **keywords: made)
        assert run.train(micro_config(policy, out)).status == "completed"
    assert_same(trained(out / "run"), trained(out / "plain"))
    (event,) = read_process_events(out / "run" / "timing.jsonl")
    assert event["name"] == "tracker_detached"
    assert event["data"] == {"tracker": "Failing", "why": failure_text(error)}
    assert "tracker_detached" in caplog.text
    assert "tracker_detached" in write_report([out / "run"]).read_text()
    assert records(out / "run", "event") == [], "equal runs write equal logs"


@pytest.mark.parametrize("method", ["on_start", "on_rollout", "on_update", "on_evaluation"])
def test_a_screen_that_fails_is_let_go_of_with_an_event(policy, out, method):
    class Screen(run.Observer):
        expendable = True

    def fail(*told: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    screen = Screen()
    setattr(screen, method, fail)
    assert run.train(micro_config(policy, out), observer=screen).status == "completed"
    (event,) = read_process_events(out / "run" / "timing.jsonl")
    assert (event["name"], event["data"]["observer"]) == ("observer_detached", "Screen")


def hmpo(out: Path, *arguments: str, **streams) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "hmpo", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        **streams,
    )


def test_standard_output_that_is_closed_or_full_does_not_end_a_training(policy, out):
    read, write = os.pipe()
    os.close(read)
    streams = {"pipe": write, "closed": None}
    if Path("/dev/full").exists():
        streams["full"] = os.open("/dev/full", os.O_WRONLY)
    processes: dict[str, subprocess.Popen] = {}
    for name, stream in streams.items():
        path = out / f"{name}.toml"
        path.write_text(toml(micro_config(policy, out, name)))
        close = {} if stream is not None else {"preexec_fn": lambda: os.close(1)}
        processes[name] = hmpo(out, "train", str(path), "--no-report", stdout=stream, **close)
    told = {name: process.communicate(timeout=120)[1] for name, process in processes.items()}
    for name, errors in told.items():
        process = processes[name]
        assert process.returncode == 0, (name, errors)
        assert "Traceback" not in errors and "Exception ignored" not in errors
        assert records(out / name, "end")[-1]["status"] == "completed"
    assert_same(trained(out / "pipe"), trained(out / "closed"))
    for stream in filter(None, streams.values()):
        os.close(stream)


def test_a_hang_up_saves_and_one_that_is_ignored_stays_ignored(policy, out):
    def hang_up(*told: object) -> None:
        os.kill(os.getpid(), signal.SIGHUP)

    observer = run.Observer()
    observer.on_rollout = hang_up
    result = run.train(micro_config(policy, out, checkpoint__every=0), observer=observer)
    assert (result.status, result.signal) == ("interrupted", signal.SIGHUP)
    assert saved_steps(out / "run") == [0]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run.train(micro_config(policy, out, "nohup"), observer=observer).signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


# --- answers to a signal, and progress -----------------------------------------------------


def test_a_signal_in_the_first_evaluation_is_answered_at_once_and_measured_anew(policy, out):
    """It arrives before the first response is sampled, and a batch more would take long."""
    heard: list = []

    class Impatient(run.Observer):
        def on_measuring(self, step, name, done, total):
            heard.append((name, done, total))
            os.kill(os.getpid(), signal.SIGINT)

        def on_stop(self, number):
            heard.append(number)

    config = micro_config(policy, out, eval__final_prompts=64, eval__batch_size=1)
    run.train(config)
    expected = left_by(out / "run")
    shutil.rmtree(out / "run")
    result = run.train(config, observer=Impatient())
    (told, number) = heard
    assert told[:2] == ("before", 0) and number == signal.SIGINT
    assert (result.status, result.before, saved_steps(out / "run")) == ("interrupted", None, [0])
    run.train(config, resume=True)
    assert_same(left_by(out / "run"), expected)


def test_a_signal_while_the_policy_is_loaded_ends_the_start_and_leaves_no_run(policy, out):
    class Impatient(run.Observer):
        def on_loading(self, config, what):
            assert str(policy) in what
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt) as caught:
        run.train(micro_config(policy, out), observer=Impatient())
    assert caught.value.args == (signal.SIGTERM,)
    assert list(out.iterdir()) == []


def test_the_screen_tells_of_loading_and_of_how_far_an_evaluation_is(policy, out, capsys):
    with Screen() as screen:
        run.train(micro_config(policy, out), observer=screen)
    lines = capsys.readouterr().out.splitlines()
    assert f"hmpo: loading the policy {policy} ..." in lines
    assert "hmpo: measuring 6 held-out responses after 0 updates ..." in lines


# --- nothing to learn from -----------------------------------------------------------------

LACKING = {
    "equal": ({"rewards__functions": ["tests.run.test_ending:equal"]}, "all rewards were equal"),
    "failing": (
        {"rewards__functions": ["tests.faults.rewards:raises"], "trainer__on_reward_error": "skip"},
        "none of 48 responses has a reward",
    ),
    "truncated": (
        {"trainer__max_length": 1, "trainer__top_k": 1, "trainer__mask_truncated": True},
        "every one of 48 responses was cut off at trainer.max_length",
    ),
}


def equal(prompts, **columns):
    return [0.5] * len(prompts)


@pytest.mark.filterwarnings("ignore:top_k=1")
@pytest.mark.parametrize("name", LACKING)
def test_a_run_without_a_signal_says_so_everywhere_and_ends_well(policy, out, caplog, name):
    changes, expected = LACKING[name]
    config = micro_config(policy, out, **changes)
    result = run.train(config)
    assert result.status == "completed" and expected in result.warning
    assert expected in caplog.text
    (end,) = records(out / "run", "end")
    assert end["warning"] == result.warning
    assert expected in write_report([out / "run"]).read_text()
    shutil.rmtree(out / "run/checkpoints/step-00000008")
    assert run.train(config, resume=True).warning == result.warning, "counted over all processes"


def test_a_run_with_a_signal_has_no_warning(policy, out):
    assert run.train(micro_config(policy, out)).warning == ""
    assert "warning" not in records(out / "run", "end")[0]
