"""A suite survives SIGKILL of its parent and its workers; benchmarks/kill_suite.py kills more."""

import json
from pathlib import Path

import pytest

from tests.faults.storage import fast_folder
from tests.lab.suite.kills import campaign

RESULT = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "kill_suite.json"


@pytest.mark.slow
def test_a_suite_that_is_killed_and_started_again_comes_to_the_same() -> None:
    with fast_folder() as root:
        tally = campaign(root, kills=3, seed=4)
    assert not tally.failures
    assert tally.kills == 3 and tally.identical == tally.suites
    assert tally.runs == 8 * tally.suites


def test_the_recorded_campaign_lost_nothing_and_counted_nothing_twice() -> None:
    found = json.loads(RESULT.read_text())
    assert found["kills"] >= 50 and found["of_parents"] and found["of_workers"]
    assert found["failures"] == [] and found["identical"] == found["suites"]
    assert found["runs"] == 8 * found["suites"] and found["taken_up"] > 0
