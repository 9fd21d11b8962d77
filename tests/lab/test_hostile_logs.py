"""Every reader of logs answers a hostile or odd log with one line or with what the log says."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.axes
import pytest

import hmpo.cli
from hmpo.cli.agm import _say
from hmpo.config.control import ControlConfig
from hmpo.errors import TelemetryError
from hmpo.lab.folder import RunData, load_run
from hmpo.lab.panels import PLOTS
from hmpo.lab.plots import render
from hmpo.lab.replay import Source, load_source, replay_file
from hmpo.lab.report import write_report
from hmpo.lab.thin import MOST
from hmpo.lab.timeline import render_timeline
from hmpo.telemetry.ingest import RunLog
from hmpo.telemetry.records import encode
from tests.lab.synthetic import make_run

COMMANDS = (("replay",), ("plot",), ("sweep", "--grid", "adapter.gap_target=1e-3"))
ODD = {
    "1e308": "1e308",
    "-1e308": "-1e308",
    "1e400": "1e400",
    "400 digits": "9" * 400,
    "5000 digits": "9" * 5000,
    "a text": '"abc"',
    "a lone surrogate": '"\\ud800x"',
    "an escape": '"\\u001b[31mred"',
    "none": "null",
    "a list": "[]",
    "deep": "[" * 200 + "]" * 200,
}


@pytest.fixture(scope="module")
def decided(tmp_path_factory):
    """The records of a run's log with decisions in it."""
    run = make_run(tmp_path_factory.mktemp("decided") / "run", updates=40)
    decisions = replay_file(load_source(run))
    first, *rest = (run / "telemetry.jsonl").read_text().splitlines()
    return run, [json.loads(line) for line in (first, *map(encode, decisions), *rest)]


def with_values(decided, folder, changes):
    """A copy of the log with the JSON texts of some fields replaced wherever they stand."""
    run, records = decided
    folder.mkdir()
    lines = []
    for record in records:
        record = {**record, **{name: f"@{name}@" for name in changes if name in record}}
        line = json.dumps(record)
        for name, text in changes.items():
            line = line.replace(f'"@{name}@"', text)
        lines.append(line)
    (folder / "config.json").write_bytes((run / "config.json").read_bytes())
    (folder / "telemetry.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("odd", ODD)
def test_odd_values_are_one_line_or_shown_in_every_command(decided, tmp_path, capsys, odd):
    decisions = ("decision/lr_mult", "decision/phase", "decision/stop", "decision/p_target")
    for i, names in enumerate((("reward/mean", "ratio/log_gap_mean"), decisions, ("run_id",))):
        folder = with_values(decided, tmp_path / str(i), dict.fromkeys(names, ODD[odd]))
        for command in COMMANDS[:: 2 - i % 2]:
            code = hmpo.cli.main(["agm", command[0], str(folder), *command[1:]])
            told = capsys.readouterr()
            assert code in (0, 2) and "\x1b" not in told.out + told.err
            told.out.encode("utf-8")
            if code == 2:
                assert told.err.startswith("hmpo: ") and told.err.count("\n") == 1


def test_an_immense_value_is_told_in_the_report_and_left_out_of_its_plots(decided, tmp_path):
    changes = {"kl/ref": "1e308", "reward/mean": "1e308", "grad_norm": "-1e308", "eval/k": "4"}
    changes |= {"entropy": "1e308", "ratio/log_gap_mean": "1e308"}
    folder = with_values(decided, tmp_path / "run", changes)
    assert "grad_norm: got -1e+308" in told(folder)
    del changes["grad_norm"]
    folder = with_values(decided, tmp_path / "other", changes)
    page = write_report([folder]).read_text()
    assert "train reward" in page and "inf" in page


def told(folder):
    with pytest.raises(TelemetryError) as caught:
        load_run(folder)
    return str(caught.value)


def test_settings_with_immense_numbers_are_shown_or_named(decided, tmp_path):
    folder = with_values(decided, tmp_path / "run", {})
    config = json.loads((folder / "config.json").read_text())
    config["trainer"]["max_qk_score"] = 10**300
    config["seed"] = 1e308
    (folder / "config.json").write_text(json.dumps(config))
    assert "1e+300" in write_report([folder]).read_text()
    (folder / "config.json").write_text('{"seed": ' + "9" * 400 + "}")
    assert "an integer of 400 digits" in write_report([folder]).read_text()


def test_more_successes_than_trials_are_a_malformed_record(decided, tmp_path):
    folder = with_values(decided, tmp_path / "run", {"eval/sampled_k": "9999"})
    assert "eval/sampled_k: got 9999, expected at most eval/sampled_n" in told(folder)


def test_an_unknown_phase_is_drawn_as_what_it_is(decided, tmp_path):
    folder = with_values(decided, tmp_path / "run", {"decision/phase": '"$\\\\frac{"'})
    source = load_source(folder)
    assert render_timeline(source, source.log.decisions, "run").startswith(b"\x89PNG")


def test_long_runs_are_drawn_by_few_points_and_strips(monkeypatch):
    steps = tuple(
        {"type": "step", "run_id": "r", "step": i, "rollout": i, "staleness": 0, "lr": 1e-4,
         "reward/mean": 0.5 + i % 3, "ratio/log_gap_mean": 1e-3, "ratio/p": i % 2, "kl/ref": 0.1,
         "curriculum/level": 1}
        for i in range(20_000)
    )  # fmt: skip
    decisions = [
        {"step": i, "applied": True, "decision/regime": ("unstable", "struggling")[i % 2],
         "decision/phase": "plateau", "decision/action": "emergency", "decision/p_target": i % 5}
        for i in range(20_000)
    ]  # fmt: skip
    calls = {"points": 0, "bars": 0, "marks": 0}

    def counted(name, key, size):
        method = getattr(matplotlib.axes.Axes, name)

        def call(axes, *arguments, **options):
            calls[key] = max(calls[key], size(arguments)) if key == "points" else calls[key] + 1
            return method(axes, *arguments, **options)

        monkeypatch.setattr(matplotlib.axes.Axes, name, call)

    counted("plot", "points", lambda arguments: len(arguments[0]))
    counted("broken_barh", "bars", len)
    counted("axvline", "marks", len)
    log = RunLog(run=None, steps=steps)
    render_timeline(Source(path=Path("log"), log=log, config=ControlConfig()), decisions, "long")
    assert 0 < calls["points"] <= 2 * MOST and calls["bars"] <= 10 and calls["marks"] <= 6 * 200
    calls["points"] = 0
    run = RunData(path=Path("run"), label="long", log=log)
    for plot in PLOTS:
        render(plot, [run])
    assert 0 < calls["points"] <= 2 * MOST


@pytest.mark.parametrize("command", ["replay", "summarize", "plot", "report"])
def test_a_run_that_is_not_there_is_one_line_without_a_number_of_an_error(
    tmp_path, capsys, command
):
    for name, what in (("nosuch", "no such"), ("n" * 300, "name too long")):
        words = [command] if command == "report" else ["agm", command]
        assert hmpo.cli.main([*words, str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert what in error.lower() and "Errno" not in error and error.count("\n") == 1


@pytest.mark.parametrize("out", ["", ".", "n" * 300, "x/" + "n" * 300 + "/y"])
def test_an_output_that_cannot_be_is_one_line(decided, tmp_path, capsys, monkeypatch, out):
    folder = with_values(decided, tmp_path / "run", {})
    monkeypatch.chdir(tmp_path)
    for words in (["report"], ["agm", "replay"], ["agm", "plot"]):
        assert hmpo.cli.main([*words, str(folder), "--out", out]) == 2
        error = capsys.readouterr().err
        assert error.startswith("hmpo: ") and error.count("\n") == 1 and "Errno" not in error


def test_a_damaged_state_of_controllers_is_one_line(decided, tmp_path, capsys):
    folder = with_values(decided, tmp_path / "run", {})
    state = tmp_path / "state.json"
    assert hmpo.cli.main(["agm", "replay", str(folder), "--state-out", str(state)]) == 0
    whole = json.loads(state.read_text())
    del whole["control"]["controller"]["state"]["course"]["step"]
    for damaged in (whole, {"schema": "hmpo.agm/1"}, {**whole, "control": 5}):
        state.write_text(json.dumps(damaged))
        capsys.readouterr()
        assert hmpo.cli.main(["agm", "replay", str(folder), "--state-in", str(state)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_report_clears_away_what_a_killed_one_left(decided, tmp_path, monkeypatch):
    folder = with_values(decided, tmp_path / "run", {})
    few = [plot for plot in PLOTS if plot.name == "kl"]
    monkeypatch.setattr("hmpo.lab.report.PLOTS", few)
    monkeypatch.setattr("hmpo.lab.plots.PLOTS", few)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (folder / "plots").mkdir()
    names = (f".report.html.tmp-{gone.pid}-ab12", f"plots/.kl.png.tmp-{gone.pid}-0a")
    left = [folder / name for name in names]
    names = (f".report.html.tmp-{os.getpid()}-ab12", ".report.html.tmp-notes")
    others = [folder / name for name in names]
    for path in (*left, *others):
        path.write_bytes(b"half")
    write_report([folder])
    assert not any(path.exists() for path in left) and all(path.exists() for path in others)


def test_output_that_takes_ascii_only_is_no_error(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    _say("caf\xe9 \ud800")
    stream.flush()
    assert stream.buffer.getvalue() == b"caf\\xe9 <U+D800>\n"


def test_a_log_of_nothing_is_told(decided, tmp_path, capsys):
    run, _ = decided
    empty, begun = tmp_path / "empty.jsonl", tmp_path / "begun.jsonl"
    empty.write_bytes(b"")
    begun.write_bytes((run / "telemetry.jsonl").read_bytes().split(b"\n", 1)[0] + b"\n")
    assert hmpo.cli.main(["agm", "replay", str(empty)]) == 2
    assert "empty, expected the records of a run" in capsys.readouterr().err
    for command in COMMANDS:
        assert hmpo.cli.main(["agm", command[0], str(begun), *command[1:]]) == 0
        told = capsys.readouterr().out
        assert command[0] == "plot" or "nothing to decide on" in told


def test_a_disk_that_takes_nothing_is_one_line(decided, tmp_path, capsys, monkeypatch):
    folder = with_values(decided, tmp_path / "run", {})

    def refuse(path, parts):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("hmpo.checkpoint.files.write_file", refuse)
    words = (["report"], ["agm", "replay", "--out", "x.jsonl"], ["agm", "plot"])
    for first, *more in words:
        command = [first, *more[:1], str(folder), *more[1:]]
        assert hmpo.cli.main(command) == 2
        error = capsys.readouterr().err
        assert "Read-only file system" in error and error.count("\n") == 1
