import json
from pathlib import Path

import pytest

from hmpo.errors import RunFolderError, TelemetryError
from hmpo.lab.study.outcomes import collect, outcome_of, save_outcomes
from hmpo.lab.study.plan import read_plan
from tests.lab.study.suites import cell, make_outcome, place, write_plan
from tests.lab.synthetic import make_run


def test_a_plan_tells_cells_blocks_and_protocol(tmp_path: Path) -> None:
    levels = {"member": "grpo", "task": "dense"}
    plan = read_plan(write_plan(tmp_path, [cell("grpo+dense", [1, 2], levels=levels)]))
    assert plan.cells[0].seeds == (1, 2) and plan.cells[0].levels == levels
    assert (plan.factor, plan.to, plan.within) == ("member", ("grpo",), ("task", "regime"))
    assert (plan.smallest, plan.alpha, plan.last) == (0.02, 0.05, 3)
    assert plan.unchanged and plan.crash_is_zero and plan.confirmatory("grpo+dense", [1, 2])


def test_a_protocol_that_changed_after_its_first_run_is_exploratory(tmp_path: Path) -> None:
    changed = {"first_protocol_hash": "ef" * 32, "exploratory": {"a": [3]}}
    plan = read_plan(write_plan(tmp_path, [cell("a", [1, 2, 3])], **changed))
    assert not plan.unchanged
    assert plan.confirmatory("a", [1, 2]) and not plan.confirmatory("a", [2, 3])
    plan = read_plan(write_plan(tmp_path, [cell("a", [1])], protocol=None, protocol_hash=""))
    assert not plan.confirmatory("a", [1])


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"name": 3},
        {"cells": [cell("..", [1])]},
        {"cells": [cell("a/b", [1])]},
        {"cells": [cell("a", [1]), cell("a", [2])]},
        {"cells": [{"name": "a"}]},
        {"cells": [cell("a", ["1"])]},
        {"cells": [1]},
        {"protocol": {"alpha": 2}},
        {"protocol": {"smallest": "wide"}},
        {"compare": ["a"]},
        {"compare": {"to": 3}},
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(tmp_path: Path, change: dict) -> None:
    with pytest.raises(TelemetryError, match=r"suite\.json"):
        read_plan(write_plan(tmp_path, **{"cells": [], **change}))


def test_a_folder_without_a_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="expected the folder of a suite"):
        read_plan(tmp_path)
    (tmp_path / "suite.json").write_text("{", encoding="utf-8")
    with pytest.raises(TelemetryError, match="cannot be read"):
        read_plan(tmp_path)


def test_outcomes_are_collected_from_records_logs_and_the_committed_file(tmp_path: Path) -> None:
    folder = write_plan(tmp_path / "suite", [cell("a", [1, 2, 3, 4]), cell("b", [1])])
    place(folder, make_outcome("a", 1, 0.5))
    make_run(folder / "runs/a/2", updates=20)
    make_run(folder / "runs/a/3", updates=20, crash_at=10)
    saved = tmp_path / "saved.jsonl.gz"
    save_outcomes(saved, [make_outcome("a", 1, 0.9), make_outcome("b", 1, 0.7)])
    found = collect(folder, saved)
    assert [item.key() for item in found] == [("a", 1), ("a", 2), ("b", 1)]
    assert found[0].evals["sampled"][-1] == 0.5  # the run that is there, not the committed one
    assert found[1].suite == "headline" and found[1].updates == 20
    assert [item.key() for item in collect(folder, summarise=False)] == [("a", 1)]


def test_roles_come_from_the_plan(tmp_path: Path) -> None:
    levels = {"member": "x"}
    folder = write_plan(tmp_path, [cell("a", [1], role="placebo", levels=levels)])
    place(folder, make_outcome("a", 1, 0.5))
    (found,) = collect(folder)
    assert (found.role, found.levels) == ("placebo", levels)


def test_an_outcome_in_the_wrong_place_is_refused(tmp_path: Path) -> None:
    folder = write_plan(tmp_path, [cell("a", [1])])
    run = make_run(folder / "runs/a/1", updates=20)
    outcome = outcome_of(run, "b", {}, "main", 1)
    (run / "outcome.json").write_text(outcome.to_json(), encoding="utf-8")
    with pytest.raises(TelemetryError, match="of cell 'b', seed 1"):
        collect(folder)
    assert json.loads(outcome.to_json())["cell"] == "b"
