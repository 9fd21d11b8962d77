import json
from dataclasses import replace
from pathlib import Path

import pytest

from hmpo.lab.study.analysis import Study
from hmpo.lab.study.controls import controls
from hmpo.lab.study.outcomes import collect
from hmpo.lab.study.plan import read_plan
from tests.lab.study.suites import cell, make_outcome, make_suite, place, study_of, write_plan


def state(study: Study, kind: str) -> tuple[bool | None, str]:
    found = [c for c in controls(study) if c.kind == kind]
    assert len(found) == 1
    return found[0].passed, found[0].detail


def moved(suite: Path, role: str, by: float) -> Study:
    """The suite, its cell of this role ending elsewhere."""
    outcomes = [
        replace(make_outcome(o.cell, o.seed, o.evals["sampled"][-1] + by), role=role)
        if o.role == role
        else o
        for o in collect(suite)
    ]
    return Study.of(read_plan(suite), outcomes)


@pytest.mark.parametrize("kind", ["again", "negative", "positive", "placebo"])
def test_controls_that_do_what_they_should_pass(study: Study, kind: str) -> None:
    assert state(study, kind)[0] is True


@pytest.mark.parametrize(
    ("kind", "by"), [("again", 0.2), ("negative", 0.1), ("positive", 0.3), ("placebo", 0.3)]
)
def test_each_control_fails_when_its_cell_does_what_it_should_not(
    suite: Path, kind: str, by: float
) -> None:
    assert state(moved(suite, kind, by), kind)[0] is False


def test_one_prompt_apart_is_rounding_and_more_is_not(suite: Path) -> None:
    passed, detail = state(moved(suite, "negative", 1 / 256), "negative")
    assert passed and "one prompt" in detail
    passed, detail = state(moved(suite, "negative", 4 / 256), "negative")
    assert passed and "no difference in the end" in detail


def test_controls_that_a_suite_lacks_are_told(tmp_path: Path) -> None:
    write_plan(tmp_path, [cell("a", [1])])
    place(tmp_path, make_outcome("a", 1, 0.5))
    found = controls(study_of(tmp_path))
    assert [c.kind for c in found] == ["again", "negative", "positive", "placebo"]
    assert all(c.passed is None and c.detail == "not in this suite" for c in found)


def test_a_control_that_has_not_run_is_open(tmp_path: Path) -> None:
    folder = make_suite(tmp_path)
    plan = json.loads((folder / "suite.json").read_text(encoding="utf-8"))
    for entry in plan["cells"]:
        if entry["role"] == "placebo":
            entry["seeds"] = [77]
    (folder / "suite.json").write_text(json.dumps(plan), encoding="utf-8")
    assert state(study_of(folder), "placebo") == (None, "no run of it has ended")


@pytest.mark.parametrize("kind", ["again", "negative"])
def test_runs_that_crashed_do_not_pass_a_control(suite: Path, kind: str) -> None:
    outcomes = [
        replace(o, status="failed", evals={}, passed=[], after={}) if o.role == kind else o
        for o in collect(suite)
    ]
    passed, detail = state(Study.of(read_plan(suite), outcomes), kind)
    assert passed is None and "failed" in detail


def test_without_a_number_of_prompts_no_difference_passes_for_rounding(suite: Path) -> None:
    outcomes = [
        replace(make_outcome(o.cell, o.seed, o.evals["sampled"][-1] + 0.2), role=o.role, after={})
        if o.role == "negative"
        else o
        for o in collect(suite)
    ]
    assert state(Study.of(read_plan(suite), outcomes), "negative")[0] is False
