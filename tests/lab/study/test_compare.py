import json
from pathlib import Path

import pytest

from hmpo.errors import ConfigError, RunFolderError
from hmpo.lab.study.compare import compare
from tests.lab.study.suites import make_outcome, make_suite, place, study_of
from tests.lab.synthetic import make_run


def test_two_cells_are_paired_by_seed_as_in_the_report(suite: Path) -> None:
    found = compare(suite / "runs/gspo+dense+stale", suite / "runs/grpo+dense+stale")
    contrast = study_of(suite).contrast("gspo+dense+stale", "grpo+dense+stale")
    assert contrast is not None and found.shared == (1, 2, 3, 4)
    assert found.estimate == contrast.estimate
    text = found.text()
    assert "gspo+dense+stale is better than grpo+dense+stale" in text
    assert "detectable with these seeds" in text
    assert "objective.member: gspo | grpo" in text


def test_runs_without_a_partner_are_told(suite: Path) -> None:
    text = compare(suite / "runs/gspo+dense+fresh", suite / "runs/grpo+dense+fresh").text()
    assert "without a partner, left out: gspo+dense+fresh seeds 1" in text


def test_cells_on_other_seeds_get_an_interval_and_no_verdict(suite: Path) -> None:
    found = compare(suite / "runs/again", suite / "runs/grpo+dense+stale")
    assert found.verdict is None and found.estimate is not None
    assert "no seed is shared" in found.text() and "no verdict" in found.text()


def test_two_run_folders_are_read_from_their_logs(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", seed=3, updates=20, p=-1.0, gain=0.6)
    other = make_run(tmp_path / "other", seed=3, updates=20, p=1.0, gain=0.5)
    found = compare(one, other)
    assert found.shared == (3,) and found.verdict is not None
    text = found.text()
    assert "one seed, which gives no interval" in text
    assert found.settings == (("objective.p", "-1", "1"),)


def test_two_runs_of_other_seeds_are_no_pair(tmp_path: Path) -> None:
    found = compare(
        make_run(tmp_path / "a", seed=1, updates=20), make_run(tmp_path / "b", seed=2, updates=20)
    )
    assert found.estimate is None
    assert "too few runs for a difference" in found.text()
    assert ("seed", "1", "2") in (found.settings or ())


def test_a_run_that_has_not_ended_is_left_out_of_its_cell(tmp_path: Path) -> None:
    for cell in ("a", "b"):
        for seed in (1, 2):
            place(tmp_path, make_outcome(cell, seed, 0.5))
    make_run(tmp_path / "runs/a/3", seed=3, crash_at=10)
    assert compare(tmp_path / "runs/a", tmp_path / "runs/b").shared == (1, 2)
    assert "settings: not known" in compare(tmp_path / "runs/a", tmp_path / "runs/b").text()
    with pytest.raises(RunFolderError, match="resume it"):
        compare(tmp_path / "runs/a/3", tmp_path / "runs/b/1")


def test_folders_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunFolderError, match="no such folder"):
        compare(tmp_path / "none", tmp_path / "empty")
    with pytest.raises(ConfigError, match="twice"):
        compare(tmp_path / "empty", tmp_path / "empty")
    with pytest.raises(RunFolderError, match="no finished run in it"):
        compare(tmp_path / "empty", tmp_path)


def test_settings_cannot_steer_the_terminal(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, seed=1, updates=20) for name in ("a", "b")]
    path = folders[1] / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["task"]["name"] = "\x1b[2Jevil\u202e"
    path.write_text(json.dumps(config), encoding="utf-8")
    text = compare(*folders).text()
    assert "\x1b" not in text and "\u202e" not in text and "<U+001B>[2Jevil" in text


def test_smallest_difference_and_endpoint_come_from_the_suite(tmp_path: Path) -> None:
    protocol = {"endpoint": {"last": 1}, "smallest": 0.4, "alpha": 0.05}
    folder = make_suite(tmp_path, protocol=protocol)
    found = compare(folder / "runs/gspo+dense+stale", folder / "runs/grpo+dense+stale")
    assert found.last == 1 and found.verdict is not None
    assert found.verdict.word == "no difference"


def test_cells_of_two_suites_are_judged_by_the_defaults_whichever_comes_first(
    suite: Path, tmp_path: Path
) -> None:
    other = make_suite(tmp_path / "other", protocol={"smallest": 0.9, "endpoint": {"last": 1}})
    one, two = (folder / "runs/gspo+dense+stale" for folder in (suite, other))
    assert compare(one, two).last == compare(two, one).last == 3
