"""kill -9 at any instant of a run, also inside a save: the resumed run leaves the same bytes."""

import os

from tests.faults.kill_runs import kill_and_resume
from tests.faults.storage import fast_folder

KILLS = int(os.environ.get("HMPO_KILLS", "200"))


def test_a_run_killed_at_random_instants_resumes_to_the_same_bytes() -> None:
    with fast_folder() as root:
        tally = kill_and_resume(root, kills=KILLS, seed=1)
    assert tally.failures == []
    assert tally.kills >= KILLS
    assert tally.resumed == tally.kills
    assert tally.identical == tally.runs
    assert tally.inside_saves >= tally.kills / 3
    assert tally.before_first_checkpoint > 0, "also before there is anything to resume from"
