"""kill -9 at any instant of a run, also inside a save: the resumed run leaves the same bytes.

A sample; `make test-kills` kills the runs of every configuration of `kill_cases`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hmpo.run import loop as run
from hmpo.run.place import found_place, saved_steps
from tests.faults import kill_runs
from tests.faults.kill_cases import CASES, case_config
from tests.faults.micro import micro_policy, records, saved_state
from tests.faults.storage import fast_folder

ROOT = Path(__file__).parents[2]
KILLS = 2
SAMPLE = [
    "Muon and QK-clip",
    "controllers with a curriculum",
    "rewards that draw in a worker",
    "LoRA",
]


@pytest.mark.timeout(900)
def test_runs_killed_at_random_instants_resume_to_the_same_bytes() -> None:
    """In a process without beartype, which would treble the time."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.kill_runs", str(KILLS), "1", *SAMPLE],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    tallies = json.loads(done.stdout)
    assert [*tallies] == SAMPLE
    for name, tally in tallies.items():
        assert tally["failures"] == [], name
        assert tally["kills"] >= KILLS
        assert tally["resumed"] == tally["kills"]
        assert tally["identical"] == tally["runs"]


def test_the_committed_campaign_is_of_every_configuration_and_without_failure() -> None:
    result = json.loads((ROOT / "benchmarks/results/kill_and_resume.json").read_text())
    rows = {row["case"]: row for row in result["rows"]}
    assert rows.keys() == CASES.keys() and result["failures"] == []
    for row in [*rows.values(), result["total"]]:
        assert row["kills"] >= 25 and row["resumed"] == row["kills"]
        assert row["identical"] == row["runs"]
    total = result["total"]
    assert len(rows) >= 17 and total["kills"] >= 500
    assert total["inside_saves"] >= total["kills"] / 3
    assert total["before_first_checkpoint"] > 0, "also before there is anything to resume from"
    assert total["after_last_checkpoint"] > 0, "also between the last save and the end"


def test_a_campaign_goes_on_from_its_journal_and_past_a_line_that_was_cut(tmp_path) -> None:
    journal, name = tmp_path / "journal.jsonl", SAMPLE[0]
    chain = vars(kill_runs.Tally(kills=3, runs=1, identical=1, orphans_s=0.5))
    lines = [{"campaign": "x"}, {"case": name, **chain}, {"case": name, **chain, "kills": 2}]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"case": "Lo')
    tally = kill_runs.read_journal(journal, [name])[name]
    assert (tally.kills, tally.runs, tally.identical, tally.orphans_s) == (5, 2, 2, 0.5)
    assert kill_runs.campaign(tmp_path, kills=5, seed=0, journal=journal, cases=[name]) == {
        name: tally
    }


WHAT_HAPPENS = {
    "controllers with a curriculum": ("curriculum/level", lambda seen: len(seen) > 1),
    "gradient accumulation with idle rows": ("update/idle_frac", lambda seen: max(seen) > 0),
    "two weighted rewards, one that fails": ("reward/dropped", lambda seen: max(seen) > 0),
    "calibrated clip": ("clip/hi", lambda seen: len(seen) > 1),
    "p by a schedule": ("ratio/p", lambda seen: len(seen) > 1),
    "learnable p": ("ratio/p", lambda seen: len(seen) > 1),
    "Muon and QK-clip": ("qk/clipped_heads", lambda seen: max(seen) > 0),
    "stale rollouts": ("staleness/rollouts", lambda seen: seen == {0, 1, 2}),
    "early stop by a controller": ("step", lambda seen: max(seen) == 4),
    "conversations": ("turns/mean", lambda seen: max(seen) > 1),
}
"""For cases whose point could be missed by chance: a field of the steps, and what is in it."""


@pytest.fixture(scope="module")
def place():
    with fast_folder() as folder:
        yield micro_policy(folder / "policy"), folder


@pytest.mark.parametrize("name", WHAT_HAPPENS)
def test_a_case_does_what_its_name_says(place, name: str) -> None:
    field, happened = WHAT_HAPPENS[name]
    steps = records(run.train(case_config(name, *place)).folder, "step")
    assert happened({step[field] for step in steps})


def test_cases_whose_point_is_in_no_field_of_the_steps_have_it(place) -> None:
    policy, folder = place
    place = policy, folder / "once more"
    place[1].mkdir()
    talked = records(run.train(case_config("conversations", *place)).folder)
    assert {"environment_error"} <= {r["name"] for r in talked if r["type"] == "event"}
    narrow = run.train(case_config("bfloat16 weights with float32 copies", *place)).folder
    assert saved_state(narrow)["optimizer"]["masters"]
    best = run.train(case_config("the best checkpoint kept", *place)).folder
    assert saved_steps(best) == [found_place(f"{best}@best")[1], 8], "the best is not the last"
