"""A suite's folder: journal lines that were cut off, links, what is left of a run."""

from pathlib import Path
from typing import Any

import pytest

from hmpo.errors import ConfigError
from hmpo.lab.suite.folder import Deaths, SuiteFolder, tidy
from tests.lab.suite.small import data, suite


@pytest.fixture
def place(tmp_path: Path) -> SuiteFolder:
    found = SuiteFolder(suite(tmp_path / "plan"), tmp_path / "out")
    found.path.mkdir(parents=True)
    return found


def test_a_line_that_was_cut_off_costs_that_line_alone(place: SuiteFolder) -> None:
    assert place.journal() == []
    place.note("started", "grpo+low", 100, pid=1)
    with (place.path / "journal.jsonl").open("a") as file:
        file.write('{"event": "died", "cel')
    place.note("ended", "grpo+low", 100, status="finished")
    assert [entry["event"] for entry in place.journal()] == ["started", "ended"]


def test_deaths_are_counted_from_the_journal_by_run(place: SuiteFolder) -> None:
    for seed, step in ((100, -1), (100, -1), (101, 2), (101, 3)):
        place.note("died", "grpo+low", seed, step=step, how="SIGKILL")
    assert place.deaths() == {
        ("grpo+low", 100): Deaths(count=2, step=-1),
        ("grpo+low", 101): Deaths(count=1, step=3),
    }


def test_deaths_before_an_outcome_do_not_count_against_a_run_that_is_made_again(
    place: SuiteFolder,
) -> None:
    for _ in range(3):
        place.note("died", "grpo+low", 100, step=-1, how="SIGKILL")
    place.note("ended", "grpo+low", 100, status="failed", reason="its process died 3 times")
    assert place.deaths() == {}


def test_a_cell_that_left_the_suite_keeps_its_settings_while_its_runs_are_there(
    tmp_path: Path,
) -> None:
    def opened(**changes: Any) -> None:
        with SuiteFolder(suite(tmp_path / "plan", **changes), tmp_path / "out").opened():
            pass

    opened()
    (tmp_path / "out/small/runs/hmpo+low").mkdir(parents=True)
    opened(exclude=[{"member": "hmpo"}])
    other = data()["run"] | {"updates": 5}
    with pytest.raises(ConfigError, match=r"hmpo\+low: has runs under other settings .*updates"):
        opened(run=other)


def test_the_journal_is_never_written_through_a_link(place: SuiteFolder, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("")
    (place.path / "journal.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="not followed"):
        place.note("started", "grpo+low", 100)
    assert (tmp_path / "elsewhere").read_text() == ""


def test_what_is_not_kept_goes_and_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    run = tmp_path / "run"
    (run / "policy").mkdir(parents=True)
    (run / "checkpoints").symlink_to(tmp_path / "precious")
    for name in ("completions.jsonl", "telemetry.jsonl"):
        (run / name).write_text("")
    tidy(run, ["completions"])
    left = sorted(path.name for path in run.iterdir())
    assert left == ["completions.jsonl", "telemetry.jsonl"]
    assert (tmp_path / "precious").is_dir()
