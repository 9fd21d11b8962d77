"""A sample of the campaign that kills ranks: `make test-ranks-kills` has a hundred kills."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
CASE = "Muon and a learnable p, 2 ranks"


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs the gloo backend")
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and adopts orphans")
@pytest.mark.timeout(600)
def test_a_rank_killed_at_a_random_instant_ends_all_and_the_run_resumes_to_the_same_bytes() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.faults.rank_kills", "2", "1", CASE],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tally = json.loads(done.stdout.splitlines()[-1])[CASE]
    assert tally["failures"] == []
    assert tally["kills"] == 2
    assert tally["runs"] == tally["identical"] >= 1
