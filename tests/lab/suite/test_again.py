"""Runs made again: drawn so that nobody chose them, and set beside the committed ones."""

import dataclasses
import json

import pytest

from hmpo.errors import ConfigError, TelemetryError
from hmpo.lab.suite.again import (
    again_file,
    drawn,
    read_again,
    refuse_committed_runs,
    refuse_other_suite,
    save_again,
    table_lines,
    table_of,
)
from hmpo.lab.suite.folder import SuiteFolder
from hmpo.lab.suite.selection import chosen_runs
from tests.lab.study.suites import make_outcome
from tests.lab.suite.small import suite


@pytest.fixture
def whole(tmp_path):
    (tmp_path / "kept.jsonl.gz").touch()
    return suite(tmp_path, outcomes="kept.jsonl.gz")


@pytest.fixture
def committed(whole):
    """An outcome for every run of the suite."""
    return {(c.name, s): make_outcome(c.name, s, 0.5) for c in whole.cells for s in c.seeds}


def keys(runs):
    return [(cell.name, seed) for cell, seed in runs]


def test_the_draw_is_the_same_each_time_grows_with_the_count_and_is_of_committed_runs(
    whole, committed, monkeypatch
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    runs = chosen_runs(whole.cells, None)
    few, more = (keys(drawn(whole, runs, committed, n)) for n in (2, 4))
    assert few == more[:2] and len(set(more)) == 4
    assert keys(drawn(whole, runs[::-1], committed, 4)) == more
    left = {key: outcome for key, outcome in committed.items() if key != more[0]}
    assert keys(drawn(whole, runs, left, 3)) == more[1:4]
    changed = dataclasses.replace(whole, name="another")
    assert keys(drawn(changed, runs, committed, len(runs))) != keys(
        drawn(whole, runs, committed, len(runs))
    )
    for count in (0, len(runs) + 1):
        with pytest.raises(ConfigError, match=f"--sample: got {count}, expected 1 to {len(runs)}"):
            drawn(whole, runs, committed, count)


@pytest.mark.parametrize(("value", "threads"), [("3", 3), ("", 1), ("0", 1), ("4,2", 1)])
def test_the_threads_of_the_environment_are_the_runs(whole, committed, monkeypatch, value, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    runs = drawn(whole, chosen_runs(whole.cells, None), committed, 2)
    assert [cell.config.threads for cell, _ in runs] == [threads] * 2


def test_a_folder_that_holds_the_committed_run_itself_is_refused(whole, committed, monkeypatch):
    place = SuiteFolder(whole, whole.outcomes.parent / "out")
    runs = chosen_runs(whole.cells, None)[:1]
    same = committed[keys(runs)[0]]
    other = dataclasses.replace(same, cost={"cpu_s": 1.0})
    for found, refused in ((None, False), (other, False), (same, True)):
        monkeypatch.setattr(place, "outcome", lambda cell, seed, found=found: found)
        if refused:
            with pytest.raises(ConfigError, match="give another --out"):
                refuse_committed_runs(place, runs, committed)
        else:
            refuse_committed_runs(place, runs, committed)


def test_the_table_tells_endpoints_their_difference_and_equality_to_the_bit(whole, committed):
    first, second = sorted(committed)[:2]
    evals = committed[second].evals
    nearly = [*evals["greedy"][:-1], evals["greedy"][-1] + 1e-9]
    changed = dataclasses.replace(
        committed[second],
        evals={**evals, "greedy": nearly},
        environment={"threads": 2, "capability": "DEFAULT", "machine": "Linux"},
    )
    rows = table_of(whole, committed, {second: changed, first: committed[first]})
    assert [(row["cell"], row["seed"]) for row in rows] == [first, second]
    assert [row["equal"] for row in rows] == [True, False]
    assert rows[1]["committed"] == rows[1]["again"] == 0.5 and rows[1]["difference"] == 0
    assert (rows[1]["threads"], rows[1]["capability"]) == (2, "DEFAULT")
    _, one, two = table_lines(rows)
    assert one.endswith("0.5000, 0.5000, 0.0000, yes, 1, unknown")
    assert two.endswith("no, 2, DEFAULT")
    crash = dataclasses.replace(committed[first], status="failed")
    (row,) = table_of(whole, committed, {first: crash})
    assert not row["equal"] and (row["again"], row["difference"]) == (0.0, -0.5)


def test_tables_of_other_threads_are_added_and_of_the_same_ones_replaced(whole, committed):
    path = again_file(whole)
    assert path.name == f"{whole.name}-again.json" and read_again(path) == []
    rows = table_of(whole, committed, committed)
    save_again(path, whole, rows)
    save_again(path, whole, [{**row, "again": 0.25} for row in rows])
    assert [row["again"] for row in read_again(path)] == [0.25] * len(rows)
    save_again(path, whole, [{**row, "threads": 2} for row in rows])
    assert len(read_again(path)) == 2 * len(rows)
    assert json.loads(path.read_text())["hash"] == whole.hash
    before = path.read_bytes()
    other = dataclasses.replace(whole, cells=whole.cells[:1])
    assert other.hash != whole.hash
    for refused in (lambda: save_again(path, other, rows), lambda: refuse_other_suite(path, other)):
        with pytest.raises(TelemetryError, match=f"with hash {whole.hash[:12]}, .*move it away"):
            refused()
    assert path.read_bytes() == before, "rows keep the suite that they are of"
    refuse_other_suite(path, whole)
    path.write_text("[]")
    with pytest.raises(TelemetryError, match="no table of runs made again"):
        read_again(path)
