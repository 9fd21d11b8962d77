"""Every probe is red where its fault is planted, and says what it found in hmpo.

A sample runs with the other tests; HMPO_ALL_PROBES=1 (`make test-probes`) runs all.
"""

import importlib.util
import json
import os
from pathlib import Path

import pytest

from benchmarks.fault_probes.every import PROBES, of_advantages, of_objective
from benchmarks.fault_probes.faults_of_runs import FAULTS
from benchmarks.fault_probes.protocol import NotApplicable, Refused, Subject, judge
from benchmarks.fault_probes.subject_hmpo import Hmpo

ROOT = Path(__file__).parents[2]
SUBJECTS = ("hmpo", "trl", "verl")
QUICK = (of_objective, of_advantages)
SLOWER = {"left_padding_absolute", "tied_gradient", "several_end_tokens", "doubled_bos"}
SAMPLE = [
    name
    for name, probe in PROBES.items()
    if probe.ask.__module__ in [module.__name__ for module in QUICK] or name in SLOWER
]
ASKED = list(PROBES) if os.environ.get("HMPO_ALL_PROBES") else SAMPLE


def results(subject: str) -> dict:
    path = ROOT / "benchmarks" / "results" / f"fault_probes-{subject}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def test_there_is_a_planted_fault_for_every_probe() -> None:
    assert len(PROBES) >= 40
    assert FAULTS.keys() == PROBES.keys()


@pytest.mark.parametrize("name", ASKED)
def test_the_probe_finds_the_planted_fault(name: str) -> None:
    outcome = PROBES[name].of(FAULTS[name]())
    assert outcome.status == "failed", outcome.line


@pytest.mark.parametrize("name", ASKED)
def test_hmpo_passes(name: str) -> None:
    outcome = PROBES[name].of(Hmpo())
    assert outcome.status == "passed", outcome.line
    assert outcome.line and "\n" not in outcome.line


def test_what_a_subject_lacks_or_refuses_is_no_failure() -> None:
    probe = PROBES["group_of_one"]
    assert probe.of(Subject()).status == "not applicable"

    class Refusing(Subject):
        def advantages(self, groups):
            raise Refused("two at least")

    assert probe.of(Refusing()) == judge(True, "refused: two at least")

    class Lacking(Subject):
        def advantages(self, groups):
            raise NotApplicable("no groups")

    assert probe.of(Lacking()).line == "no groups"


@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_committed_results_are_of_these_probes(subject: str) -> None:
    found = results(subject)
    assert list(found["probes"]) == list(PROBES)
    assert found["versions"] and found["seconds"] < 600
    for name, row in found["probes"].items():
        assert (row["title"], row["reports"]) == (PROBES[name].title, PROBES[name].reports)
        assert row["status"] in ("passed", "failed", "not applicable") and row["line"]


def test_the_committed_results_have_hmpo_pass_every_probe() -> None:
    rows = results("hmpo")["probes"]
    assert rows.keys() == PROBES.keys()
    assert [name for name, row in rows.items() if row["status"] != "passed"] == []


def test_the_page_is_made_of_the_results_and_explains_every_failure(monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    source = ROOT / "scripts" / "make_fault_probes.py"
    spec = importlib.util.spec_from_file_location("make_fault_probes", source)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (ROOT / "docs" / "fault-probes.md").read_text(encoding="utf-8")
    assert page == script.page(), "run: python scripts/make_fault_probes.py"
    failed = {
        (subject, name)
        for subject in SUBJECTS
        for name, row in results(subject)["probes"].items()
        if row["status"] == "failed"
    }
    assert failed == script.SENTENCES.keys()
