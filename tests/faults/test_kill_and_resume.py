"""kill -9 at any instant of a run, also inside a save: the resumed run leaves the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = int(os.environ.get("HMPO_KILLS", "200"))
ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
def test_a_run_killed_at_random_instants_resumes_to_the_same_bytes() -> None:
    """In a process without beartype, which would treble the time."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.kill_runs", str(KILLS), "1"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    tally = json.loads(done.stdout)
    assert tally["failures"] == []
    assert tally["kills"] >= KILLS
    assert tally["resumed"] == tally["kills"]
    assert tally["identical"] == tally["runs"]
    assert tally["inside_saves"] >= tally["kills"] / 3
    assert tally["before_first_checkpoint"] > 0, "also before there is anything to resume from"
    assert tally["after_last_checkpoint"] > 0, "also between the last save and the end"
