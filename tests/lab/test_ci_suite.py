"""studies/ci.toml, run: predictions that must hold, and controls that can fail."""

from pathlib import Path

import pytest

from hmpo.lab.study.analysis import Study
from hmpo.lab.study.controls import controls
from hmpo.lab.study.outcomes import Outcome, collect
from hmpo.lab.study.plan import read_plan
from hmpo.lab.suite.reading import read_suite
from hmpo.lab.suite.run import run_suite
from hmpo.lab.suite.selection import chosen_runs
from tests.ranks.processes import made_once

SUITE = Path(__file__).parents[2] / "studies" / "ci.toml"
TRAINED = ("evals", "passed", "metrics", "curves", "tokens")
"""What two runs that trained alike have in common."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    suite = read_suite(str(SUITE))

    def make(root: Path) -> None:
        result = run_suite(suite, runs=chosen_runs(suite.cells, None), out=root)
        assert result.failed == [] and result.left == 0

    return made_once(tmp_path_factory, "ci-suite", make) / suite.name


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Outcome]:
    """The outcome of seed 1, by cell."""
    return {o.cell: o for o in collect(folder) if o.seed == 1}


pytestmark = pytest.mark.slow


def test_p1_with_one_update_a_rollout_all_exponents_are_the_same_method(
    one: dict[str, Outcome],
) -> None:
    base = one["one-update-p1"]
    for name in ("one-update-p0", "one-update-pm1"):
        for here, there in zip(one[name].passed, base.passed, strict=True):
            apart = (int(here, 16) ^ int(there, 16)).bit_count()
            assert apart <= 1, "of 128 prompts: rounding may turn a drawn token"


def test_p3_a_sequence_clip_around_one_clips_negative_advantages_most(
    one: dict[str, Outcome],
) -> None:
    centred, following = one["centre-one"].metrics, one["centre-drift"].metrics
    apart = [float(m["clip_frac_neg"]) - float(m["clip_frac_pos"]) for m in (centred, following)]
    assert apart[0] > 0.4
    assert apart[0] > 2 * apart[1], "a centre that follows the drift takes most of it away"


def test_p8_controllers_leave_a_healthy_run_alone(one: dict[str, Outcome]) -> None:
    off, advise, apply = (one[f"agm-{mode}"] for mode in ("off", "advise", "apply"))
    assert [getattr(off, name) for name in TRAINED] == [getattr(advise, name) for name in TRAINED]
    assert (apply.status, apply.updates) == ("finished", off.updates)


def test_every_control_passes_and_each_kind_is_there(folder: Path) -> None:
    found = controls(Study.of(read_plan(folder), collect(folder)))
    assert {c.kind for c in found} == {"again", "negative", "positive", "placebo"}
    assert [(c.cell, c.detail) for c in found if c.passed is not True] == []
