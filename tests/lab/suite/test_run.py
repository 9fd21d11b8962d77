"""Running suites in worker processes: what is made, what is not made again, what a crash is."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hmpo.config.reading import load_run_config
from hmpo.errors import ConfigError, RunFolderError
from hmpo.lab.study.outcomes import collect, read_outcome, save_outcomes
from hmpo.lab.suite.folder import Deaths, SuiteFolder
from hmpo.lab.suite.pool import Maker
from hmpo.lab.suite.run import default_jobs, run_suite, runs_left, usable_cores
from hmpo.lab.suite.selection import chosen_runs
from hmpo.lab.suite.watch import Watcher
from tests.faults.storage import fast_folder
from tests.lab.suite.kills import workers
from tests.lab.suite.small import (
    FACTORS,
    MAD,
    NAMES,
    QUICK,
    data,
    in_process,
    outcomes,
    suite,
    write,
)

HIGH = {"rate": {"high": {"optimizer": {"lr": 0.01}}}}
"""One cell."""


class Noted(Watcher):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, str]] = []

    def on_run(self, cell: str, seed: int, message: Any) -> None:
        self.told.append((cell, seed, message["event"]))


@pytest.fixture(scope="module")
def finished():
    """A suite that ran in two processes, and all of its outcomes."""
    with fast_folder() as root:
        whole = suite(root / "plan")
        noted = Noted()
        runs = chosen_runs(whole.cells, None)
        result = run_suite(whole, runs=runs, out=root / "out", jobs=2, watcher=noted)
        yield whole, result, noted, root


def run(place: Path, maker: Maker | None = in_process, **changes: Any) -> Any:
    """A suite of one cell and two seeds, or what is asked for, run to its end."""
    whole = suite(place, **({"factors": HIGH, "compare": {}, "run": QUICK} | changes))
    return run_suite(whole, runs=chosen_runs(whole.cells, None), out=place / "out", maker=maker)


def test_every_run_becomes_an_ordinary_folder_with_one_outcome(finished) -> None:
    _, result, noted, _ = finished
    assert (result.finished, result.failed, result.left) == (8, [], 0)
    found = collect(result.folder)
    assert [(o.cell, o.seed) for o in found] == [(n, s) for n in NAMES for s in (100, 101)]
    assert all(o.status == "finished" and o.updates == 3 and o.suite == "small" for o in found)
    folder = result.folder / "runs" / "hmpo+high" / "101"
    config = load_run_config(folder / "config.json")
    assert (config.name, config.seed, config.threads) == ("101", 101, 1)
    assert sorted(path.name for path in folder.iterdir()) == [
        "completions.jsonl",
        "config.json",
        "environment.json",
        "outcome.json",
        "policy",
        "telemetry.jsonl",
        "timing.jsonl",
    ]
    events = [event for cell, seed, event in noted.told if (cell, seed) == ("hmpo+high", 101)]
    assert events == ["start", *["evaluation", *["update", "evaluation"] * 3], "ended"]


def test_the_plan_says_what_the_report_reads(finished) -> None:
    whole, result, _, _ = finished
    plan = json.loads((result.folder / "suite.json").read_text())
    assert plan["hash"] == whole.hash and plan["compare"]["to"] == ["grpo"]
    assert [cell["name"] for cell in plan["cells"]] == NAMES
    assert plan["cells"][0]["settings"]["objective"] == {"member": "grpo"}


def test_the_journal_tells_each_attempt_and_its_end(finished) -> None:
    whole, _, _, root = finished
    entries = SuiteFolder(whole, root / "out").journal()
    for name in NAMES:
        for seed in (100, 101):
            own = [e for e in entries if (e["cell"], e["seed"]) == (name, seed)]
            assert [entry["event"] for entry in own] == ["started", "ended"]
            assert own[1]["status"] == "finished"


def test_outcomes_do_not_depend_on_how_many_run_at_once_nor_on_the_order(finished) -> None:
    whole, result, _, root = finished
    runs = list(reversed(chosen_runs(whole.cells, {100})))
    other = run_suite(whole, runs=runs, out=root / "other", maker=in_process)
    before, after = outcomes(result.folder), outcomes(other.folder)
    assert after == {name: outcome for name, outcome in before.items() if name[-3:] == "100"}


def test_what_has_an_outcome_is_not_made_again(finished) -> None:
    whole, _, _, root = finished
    noted = Noted()
    runs = chosen_runs(whole.cells, None)
    assert runs_left(whole, runs, root / "out") == []
    result = run_suite(whole, runs=runs, out=root / "out", watcher=noted)
    assert result.finished == 8 and noted.told == []


def test_an_outcome_that_cannot_be_read_is_made_again_with_the_same_numbers(tmp_path) -> None:
    folder = run(tmp_path).folder
    before = outcomes(folder)
    path = folder / "runs" / "high" / "100" / "outcome.json"
    path.write_text("{")
    run(tmp_path)
    assert outcomes(folder) == before


def test_an_outcome_nobody_was_told_of_counts_once(tmp_path) -> None:
    """A worker may die between writing it and saying so; the run is not begun anew."""
    folder = run(tmp_path).folder
    path = folder / "runs" / "high" / "100"
    log = path / "telemetry.jsonl"
    before = (log.read_bytes(), (path / "outcome.json").read_bytes())
    whole = suite(tmp_path, factors=HIGH, compare={}, run=QUICK)
    place = SuiteFolder(whole, tmp_path / "out")
    from hmpo.lab.suite.execute import execute
    from hmpo.lab.suite.job import job_of

    told: list[Any] = []
    job = job_of("small", whole.cells[0], 100, place.cell_folder("high"), whole.keep)
    ended = execute(job, told.append)
    assert ended["status"] == "finished" and told == []
    assert before == (log.read_bytes(), (path / "outcome.json").read_bytes())


def test_keep_says_what_stays_of_a_finished_run(tmp_path) -> None:
    folder = run(tmp_path, keep=["checkpoints"]).folder / "runs" / "high" / "100"
    assert (folder / "checkpoints").is_dir()
    assert not (folder / "policy").exists() and not (folder / "completions.jsonl").exists()


# --- failures -------------------------------------------------------------------------------------


def test_a_run_that_raises_is_an_outcome_and_the_suite_goes_on(tmp_path) -> None:
    cell = {"name": "mad", "settings": MAD}
    result = run(tmp_path, cells=[cell], seeds=[100])
    assert result.finished == 1
    ((name, seed, reason),) = result.failed
    assert (name, seed) == ("mad", 100) and "finite" in reason
    found = read_outcome(result.folder / "runs" / "mad" / "100")
    assert found is not None and found.status == "failed" and found.reason == reason
    assert run(tmp_path, cells=[cell], seeds=[100]).failed == result.failed


def test_a_run_that_cannot_begin_is_an_outcome_too(tmp_path) -> None:
    cell = {"name": "none", "settings": {"policy": {"path": "nowhere"}}}
    result = run(tmp_path, cells=[cell], seeds=[100])
    assert result.finished == 1 and "nowhere" in result.failed[0][2]
    assert run(tmp_path, cells=[cell], seeds=[100]).failed == result.failed


def test_a_process_that_always_dies_is_an_outcome_after_three_deaths(tmp_path) -> None:
    (tmp_path / "deadly.py").write_text(
        "import os\ndef kills(completions, **_):\n    os.kill(os.getpid(), 9)\n"
    )
    cell = {
        "name": "deadly",
        "settings": {"rewards": {"functions": ["deadly.py:kills"]}, "trainer": {"group_size": 2}},
    }
    result = run(tmp_path, None, cells=[cell], seeds=[100])
    reason = "its process died 3 times before its first update"
    assert result.finished == 1 and result.failed == [("deadly", 100, reason)]
    whole = suite(tmp_path, factors=HIGH, compare={}, cells=[cell], seeds=[100])
    entries = SuiteFolder(whole, tmp_path / "out").journal()
    died = [e for e in entries if e["event"] == "died"]
    assert [e["how"] for e in died] == ["SIGKILL"] * 3
    assert {e["cell"] for e in died} == {"deadly"}


def test_deaths_that_come_further_each_time_are_no_outcome() -> None:
    died = Deaths()
    for step in (-1, 0, 4, 4):
        died = died.then(step)
    assert died == Deaths(count=2, step=4)
    assert died.then(2).count == 3


def test_a_full_disk_is_no_outcome_but_ends_the_suite(tmp_path, monkeypatch) -> None:
    from hmpo.errors import StorageError
    from hmpo.lab.suite.execute import execute
    from hmpo.lab.suite.job import job_of

    def full(*_: Any, **__: Any) -> None:
        raise StorageError("there: cannot write")

    monkeypatch.setattr("hmpo.run.loop.train", full)
    whole = suite(tmp_path)
    job = job_of("small", whole.cells[0], 100, tmp_path / "runs", ())
    assert execute(job, print)["status"] == "impossible"
    assert read_outcome(tmp_path / "runs" / "100") is None


def test_a_folder_in_which_nothing_can_be_made_ends_the_suite(tmp_path) -> None:
    (tmp_path / "out" / "small" / "runs" / "high").mkdir(parents=True)
    (tmp_path / "out" / "small" / "runs" / "high" / "100").write_text("in the way")
    result = run(tmp_path, None)
    assert result.problem.startswith("cell high, seed 100: ") and result.left == 2


# --- changes --------------------------------------------------------------------------------------


def test_a_cell_with_runs_may_not_change_but_others_may_come(tmp_path) -> None:
    run(tmp_path)
    for path, value, line in (
        ("optimizer", {"lr": 0.02}, "optimizer.lr was 0.01, now 0.02"),
        ("updates", 4, "updates was 2, now 4"),
    ):
        level = HIGH["rate"]["high"] | {path: value}
        with pytest.raises(ConfigError, match=rf"cell high: has runs .*{line}"):
            run(tmp_path, factors={"rate": {"high": level}})
    more = run(tmp_path, factors={"rate": HIGH["rate"] | {"low": FACTORS["rate"]["low"]}})
    assert more.finished == 4


def test_a_folder_of_another_suite_is_refused(tmp_path) -> None:
    folder = tmp_path / "out" / "small"
    folder.mkdir(parents=True)
    (folder / "suite.json").write_text('{"schema": 1, "name": "other", "cells": []}')
    with pytest.raises(RunFolderError, match="is of another suite; choose another --out"):
        run(tmp_path)


def test_two_parents_on_one_folder_the_second_is_refused(tmp_path) -> None:
    whole = suite(tmp_path, factors=HIGH, compare={})
    place, other = (SuiteFolder(whole, tmp_path / "out") for _ in range(2))
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from hmpo.checkpoint import RunLock\n"
        f"lock = RunLock(Path({str(place.path)!r})); lock.acquire(); print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(RunFolderError, match="which is alive") as caught, other.opened():
            raise AssertionError("taken twice")
        assert len(str(caught.value).splitlines()) == 1
    finally:
        holder.kill()
        holder.communicate()
    with other.opened():
        pass


# --- committed outcomes ---------------------------------------------------------------------------


def test_committed_outcomes_are_not_made_again_unless_asked_for(tmp_path) -> None:
    first = run(tmp_path)
    found = collect(first.folder)
    save_outcomes(tmp_path / "kept.jsonl.gz", found[:1])
    shutil.rmtree(first.folder)
    whole = suite(tmp_path, factors=HIGH, compare={}, run=QUICK, outcomes="kept.jsonl.gz")
    runs = chosen_runs(whole.cells, None)
    result = run_suite(whole, runs=runs, out=tmp_path / "out", maker=in_process)
    assert (result.finished, result.committed) == (1, 1)
    result = run_suite(whole, runs=runs, out=tmp_path / "out", again=True, maker=in_process)
    assert (result.finished, result.committed) == (2, 0)
    assert result.compared == ["final success equal to the committed one: 1 of 1"]
    wrong = dataclasses.replace(found[0], evals=found[0].evals | {"sampled": [0.0, 0.5]})
    save_outcomes(tmp_path / "kept.jsonl.gz", [wrong])
    compared = run_suite(whole, runs=runs, out=tmp_path / "out", again=True).compared
    assert compared[0].endswith("0 of 1") and "0.5 is committed, now " in compared[1]
    stale = dataclasses.replace(found[0], config_hash="0" * 64)
    save_outcomes(tmp_path / "kept.jsonl.gz", [stale])
    with pytest.raises(ConfigError, match="cell high, seed 100 was made under other settings"):
        run_suite(whole, runs=runs, out=tmp_path / "out")


# --- the protocol ---------------------------------------------------------------------------------


def test_runs_that_begin_after_the_protocol_changed_are_exploratory(tmp_path) -> None:
    tuning = {"name": "tune", "role": "tuning", "seeds": [1]}
    extra = {"cells": [tuning], "protocol": "p.toml", "factors": HIGH, "compare": {}, "run": QUICK}
    (tmp_path / "p.toml").write_text("title = 'one'\n")

    def go(**chosen: Any) -> dict[str, Any]:
        whole = suite(tmp_path, **extra)
        runs = [r for r in chosen_runs(whole.cells, None) if (r[0].name, r[1]) in chosen["runs"]]
        run_suite(whole, runs=runs, out=tmp_path / "out", maker=in_process)
        return json.loads((tmp_path / "out" / "small" / "suite.json").read_text())

    plan = go(runs=[("tune", 1)])
    assert plan["first_protocol_hash"] is None
    (tmp_path / "p.toml").write_text("title = 'tuned'\n")
    plan = go(runs=[("high", 100)])
    first = plan["first_protocol_hash"]
    assert first == plan["protocol_hash"] and plan["exploratory"] == {}
    (tmp_path / "p.toml").write_text("title = 'changed'\n")
    plan = go(runs=[("high", 101), ("high", 100)])
    assert plan["first_protocol_hash"] == first != plan["protocol_hash"]
    assert plan["exploratory"] == {"high": [101]}
    (tmp_path / "p.toml").write_text("title = 'tuned'\n")
    extra["seeds"] = [100, 101, 102]
    plan = go(runs=[("high", 102)])
    assert plan["exploratory"] == {"high": [101, 102]}, "a seed that was added is exploratory too"


# --- ends -----------------------------------------------------------------------------------------


def endless(root: Path) -> subprocess.Popen[str]:
    """A suite whose runs take minutes, started from the command line."""
    settings = data()["run"] | {"updates": 100_000}
    source = write(root / "plan", run=settings | {"eval": {"prompts": 2, "final_prompts": 3}})
    words = ["experiment", "run", str(source), "--jobs", "1", "--out", str(root / "out")]
    return subprocess.Popen(
        [sys.executable, "-m", "hmpo", *words, "--only", "grpo+low"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def until_updates(root: Path, count: int = 3) -> Path:
    """Wait until the suite's first run has done some updates."""
    log = root / "out" / "small" / "runs" / "grpo+low" / "100" / "telemetry.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if log.exists() and log.read_bytes().count(b'"type":"step"') >= count:
            return log.parent
        time.sleep(0.02)
    raise AssertionError("no updates")


def test_ctrl_c_saves_the_runs_and_says_how_to_go_on() -> None:
    with fast_folder() as root:
        parent = endless(root)
        folder = until_updates(root)
        (worker,) = workers(parent.pid)
        os.kill(parent.pid, signal.SIGINT)
        text, _ = parent.communicate(timeout=60)
        assert parent.returncode == 128 + signal.SIGINT
        assert "2 left" in text and "Go on with: hmpo experiment run" in text
        assert not Path(f"/proc/{worker}").exists() or not workers(parent.pid)
        end = json.loads((folder / "telemetry.jsonl").read_text().splitlines()[-1])
        assert (end["type"], end["status"]) == ("end", "interrupted")
        saved = sorted(path.name for path in (folder / "checkpoints").iterdir())[-1]
        assert int(saved.removeprefix("step-")) == end["step"] > 0
        assert not (folder / "outcome.json").exists()


def test_a_worker_dies_with_its_parent() -> None:
    with fast_folder() as root:
        parent = endless(root)
        until_updates(root, 1)
        (worker,) = workers(parent.pid)
        parent.kill()
        parent.communicate()
        end = time.monotonic() + 10
        while Path(f"/proc/{worker}/cwd").exists() and time.monotonic() < end:
            time.sleep(0.005)
        assert not Path(f"/proc/{worker}/cwd").exists()


def test_cores_are_shared_by_the_threads_of_the_runs(tmp_path) -> None:
    whole = suite(tmp_path)
    assert default_jobs(whole.cells) == usable_cores() <= (os.cpu_count() or 1)
    wide = suite(tmp_path, run=data()["run"] | {"threads": 1000})
    assert default_jobs(wide.cells) == 1


def test_a_refusal_to_go_on_with_a_run_is_no_outcome(tmp_path, monkeypatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise ConfigError("the task's file has changed; put it back")

    place = tmp_path / "out" / "small" / "runs" / "high" / "100"
    place.mkdir(parents=True)
    (place / "telemetry.jsonl").write_text("")
    monkeypatch.setattr("hmpo.run.loop.train", refuse)
    result = run(tmp_path, seeds=[100])
    assert "has changed" in result.problem and (result.left, result.failed) == (1, [])
    assert not (place / "outcome.json").exists()


@pytest.mark.parametrize("error", [MemoryError(), OSError(24, "Too many open files")])
def test_what_the_machine_lacks_is_no_outcome(tmp_path, monkeypatch, error: Exception) -> None:
    def lack(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("hmpo.run.loop.train", lack)
    result = run(tmp_path, seeds=[100])
    assert result.problem and (result.left, result.failed) == (1, [])
