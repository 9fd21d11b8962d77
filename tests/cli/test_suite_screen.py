"""What a suite shows in a terminal, and the lines where there is none."""

import io
import json
import signal
from pathlib import Path

import pytest
from rich.console import Console

from hmpo.cli.suite_screen import SuiteScreen, duration, result_lines
from hmpo.lab.suite.reading import read_suite
from hmpo.lab.suite.selection import chosen_runs
from hmpo.lab.suite.watch import SuiteResult
from tests.lab.suite.small import NAMES, data


@pytest.fixture
def runs(tmp_path: Path):
    path = tmp_path / "suite.json"
    path.write_text(json.dumps(data()))
    return chosen_runs(read_suite(str(path)).cells, None)


def screen(terminal: bool, height: int = 40) -> tuple[SuiteScreen, io.StringIO]:
    file = io.StringIO()
    console = Console(
        file=file, force_terminal=terminal, color_system=None, width=100, height=height
    )
    return SuiteScreen("small", console), file


def ended(status: str = "finished", **more: object) -> dict[str, object]:
    return {"event": "ended", "status": status, "reason": "", "sampled": 0.25, **more}


def test_without_a_terminal_each_run_that_ends_is_one_line(runs) -> None:
    shown, file = screen(False)
    with shown:
        shown.on_begin(runs, {("grpo+low", 100): "finished"}, 2)
        shown.on_run("hmpo+low", 100, {"event": "start", "step": 0})
        shown.on_run("hmpo+low", 100, {"event": "update", "step": 1})
        shown.on_run("hmpo+low", 100, {"event": "died", "how": "SIGKILL"})
        shown.on_run("hmpo+low", 100, {"event": "start", "step": 1})
        shown.on_run("hmpo+low", 100, ended())
        shown.on_run("hmpo+high", 100, ended("failed", reason="no \x1b[2J numbers"))
        shown.on_run("hmpo+high", 101, ended("interrupted"))
        shown.on_tick()
    assert file.getvalue().splitlines() == [
        "hmpo: suite small: 4 cells, 8 runs, 1 done, 2 at once",
        "hmpo: hmpo+low seed 100: its process died (SIGKILL); it is taken up",
        "hmpo: 2/8 hmpo+low seed 100: finished, success 0.250",
        "hmpo: 3/8 hmpo+high seed 100: failed (no \\x1b[2J numbers)",
    ]


def test_the_table_has_a_row_for_each_cell_with_what_is_done_and_runs(runs) -> None:
    shown, file = screen(True)
    with shown:
        shown.on_begin(runs, {("grpo+low", 100): "finished", ("grpo+low", 101): "failed"}, 2)
        shown.on_run("hmpo+low", 100, {"event": "start", "step": 0})
        shown.on_run("hmpo+low", 100, {"event": "evaluation", "step": 0, "sampled": 0.625})
        shown.drawn = -1.0
        shown.on_tick()
    text = file.getvalue()
    picture = text[text.rindex("suite small") :]
    rows = {name: line for name in NAMES for line in picture.splitlines() if f" {name} " in line}
    assert rows.keys() == set(NAMES)
    assert "2/2" in rows["grpo+low"] and "1" in rows["grpo+low"].split("2/2")[1]
    assert "0/2" in rows["hmpo+low"] and "0.625" in rows["hmpo+low"]
    assert "seed 100" in text and "2/8" in picture


def test_a_small_terminal_shows_what_runs_and_says_how_much_is_hidden(runs) -> None:
    shown, file = screen(True, height=10)
    with shown:
        shown.on_begin(runs, {}, 2)
        shown.on_run("hmpo+high", 100, {"event": "start", "step": 0})
        shown.drawn = -1.0
        shown.on_tick()
    picture = file.getvalue()[file.getvalue().rindex("suite small") :]
    assert " hmpo+high " in picture and "... and 2 more cells" in picture


def test_the_time_left_counts_what_runs_and_what_waits(runs, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr("hmpo.cli.suite_screen.time.monotonic", lambda: now[0])
    shown, _ = screen(False)
    shown.on_begin(runs, {}, 2)
    assert shown.time_left() == ""
    shown.on_run("grpo+low", 100, {"event": "start", "step": 0})
    now[0] = 30.0
    shown.on_run("grpo+low", 100, ended())
    assert shown.time_left() == f"{duration(7 * 30 / 2)} left"
    shown.on_run("grpo+low", 101, {"event": "start", "step": 0})
    now[0] = 40.0
    shown.on_run("grpo+low", 101, {"event": "update", "step": 3})
    assert shown.time_left() == f"{duration(6 * 30 / 2)} left"


def test_quiet_says_nothing_on_the_way(runs) -> None:
    file = io.StringIO()
    with SuiteScreen("small", Console(file=file, force_terminal=True), quiet=True) as shown:
        shown.on_begin(runs, {}, 2)
        shown.on_run("grpo+low", 100, {"event": "start", "step": 0})
        shown.on_run("grpo+low", 100, ended())
        shown.on_stop(signal.SIGINT)
    assert file.getvalue() == ""


def test_the_result_names_what_failed_what_is_left_and_how_to_go_on(tmp_path) -> None:
    result = SuiteResult(
        folder=tmp_path,
        finished=3,
        failed=[("grpo", 100 + i, "no\x07 numbers") for i in range(11)],
        left=2,
        exploratory=1,
        signal=2,
        compared=["final success equal to the committed one: 1 of 1"],
    )
    lines = result_lines(result, "small", "hmpo experiment run small.toml")
    assert lines[0] == f"suite small: 3 finished, 11 failed, 2 left; {tmp_path}"
    assert lines[1] == "failed: grpo seed 100: no\\x07 numbers"
    assert lines[11] == "... and 1 more; each run's outcome.json says why"
    assert "1 runs are exploratory" in lines[12]
    assert lines[-1].endswith("Go on with: hmpo experiment run small.toml")


def test_times_are_read_as_people_say_them() -> None:
    assert [duration(float(s)) for s in (3, 89, 600, 9000)] == ["3 s", "89 s", "10 min", "2.5 h"]
