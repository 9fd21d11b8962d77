import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hmpo.lab.study.analysis import Study
from hmpo.lab.study.outcomes import LATE, collect, read_outcomes, save_outcomes
from hmpo.lab.study.plan import Cell, Plan, read_plan
from tests.lab.study.suites import make_outcome, make_suite, study_of


def test_pairs_are_runs_of_one_seed_and_the_interval_is_that_of_scipy(study: Study) -> None:
    contrast = study.contrast("gspo+dense+stale", "grpo+dense+stale")
    assert contrast is not None and contrast.estimate is not None
    assert contrast.seeds == (1, 2, 3, 4) and contrast.left_out == 0
    one, other = (
        [run.score.success for run in study.runs[name].values()]
        for name in ("gspo+dense+stale", "grpo+dense+stale")
    )
    expected = stats.ttest_rel(one, other)
    low, high = expected.confidence_interval(0.95)
    e = contrast.estimate
    assert (e.low, e.high) == pytest.approx((low, high), rel=1e-9)
    assert e.p_value == pytest.approx(expected.pvalue, rel=1e-9)


def test_holm_corrects_within_a_block_and_not_across(study: Study) -> None:
    for regime in ("fresh", "stale"):
        block = [c for c in study.contrasts if ("regime", regime) in c.block]
        assert len(block) == 2
        raw = np.array([c.estimate.p_value for c in block if c.estimate])
        smaller = int(raw.argmin())
        doubled = min(1.0, 2 * raw[smaller])
        assert block[smaller].adjusted == pytest.approx(doubled, rel=1e-9)
        assert block[1 - smaller].adjusted == pytest.approx(max(doubled, raw[1 - smaller]))


def test_equivalence_is_corrected_within_a_block_too() -> None:
    spread = [-0.012649, -0.006325, 0.0, 0.006325, 0.012649]  # sd .01; t = 2.68, p = .0275

    def words(*members: str) -> list[str]:
        cells = [Cell(name=m, levels={"member": m}, seeds=(1, 2, 3, 4, 5)) for m in members]
        plan = Plan(name="s", cells=tuple(cells), factor="member", to=("grpo",))
        outcomes = [
            make_outcome(m, seed, 0.5 + (0.008 + spread[seed - 1]) * (m != "grpo"))
            for m in members
            for seed in range(1, 6)
        ]
        found = Study.of(plan, outcomes).contrasts
        return [c.verdict.word for c in found if c.verdict is not None]

    assert words("grpo", "gspo") == ["no difference"]
    assert words("grpo", "gspo", "hmpo") == ["undecided", "undecided"]


@pytest.mark.parametrize("against", ["grpo", ""])
def test_a_cell_beside_a_block_is_no_baseline_and_no_test_of_it(against: str) -> None:
    """One that is held against another, and one with the levels of an earlier one."""
    cells = [Cell(name=m, levels={"member": m}, seeds=(1, 2, 3)) for m in ("grpo", "gspo")]
    beside = Cell(
        name="sgd", role="null", levels={"member": "grpo"}, seeds=(1, 2, 3), against=against
    )
    ends = {"grpo": 0.5, "gspo": 0.6, "sgd": 0.1}

    def study(*cells: Cell) -> Study:
        plan = Plan(name="s", cells=cells, factor="member", to=("grpo",))
        return Study.of(
            plan,
            [
                make_outcome(c.name, seed, ends[c.name] + 0.01 * seed * (c.name != "grpo"))
                for c in cells
                for seed in c.seeds
            ],
        )

    with_it, without = study(*cells, beside), study(*cells)
    assert with_it.contrasts == without.contrasts
    assert [(c.cell, c.against) for c in with_it.contrasts] == [("gspo", "grpo")]
    assert [(c.cell, c.against) for c in with_it.others] == [("sgd", "grpo")] * bool(against)
    assert with_it.compared == without.compared and with_it.target(cells[0]) == without.target(
        cells[0]
    )


def test_a_run_without_a_partner_is_left_out_and_counted(study: Study) -> None:
    contrast = study.contrast("gspo+dense+fresh", "grpo+dense+fresh")
    assert contrast is not None
    assert contrast.seeds == (2, 3, 4) and contrast.left_out == 1


def test_words_follow_the_differences(study: Study) -> None:
    words = {c.cell: c.verdict.word for c in study.contrasts if c.verdict}
    assert words["gspo+dense+stale"] == "better"
    assert words["reinforce+dense+stale"] == "worse"
    assert words["gspo+dense+fresh"] in ("no difference", "undecided")


def test_cells_of_other_seeds_are_compared_unpaired_and_without_a_word(study: Study) -> None:
    contrast = study.contrast("again", "grpo+dense+stale")
    assert contrast is not None and contrast.estimate is not None
    assert (contrast.seeds, contrast.verdict) == ((), None)
    one, other = study.successes("again"), study.successes("grpo+dense+stale")
    expected = stats.ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    e = contrast.estimate
    assert (e.low, e.high) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_contrasts_with_a_late_run_are_exploratory(tmp_path: Path) -> None:
    study = study_of(make_suite(tmp_path, exploratory={"gspo+dense+stale": [3]}))
    marks = {c.cell: c.confirmatory for c in study.contrasts}
    assert not marks["gspo+dense+stale"] and marks["gspo+dense+fresh"]
    late = make_suite(tmp_path / "b", protocol=None, protocol_hash="")
    assert not any(c.confirmatory for c in study_of(late).contrasts)


def test_the_target_is_half_way_to_where_the_baseline_ended(study: Study) -> None:
    cell = study.plan.cell("reinforce+dense+stale")
    assert cell is not None
    end = np.mean(study.successes("grpo+dense+stale"))
    assert study.target(cell) == pytest.approx((0.2 + end) / 2)


def test_one_seed_gives_a_difference_without_an_interval(tmp_path: Path) -> None:
    study = study_of(make_suite(tmp_path, seeds=(2,)))
    contrast = study.contrast("gspo+dense+stale", "grpo+dense+stale")
    assert contrast is not None and contrast.estimate is not None and contrast.verdict is not None
    assert contrast.estimate.low is None and contrast.verdict.word == "undecided"


def test_bits_of_prompts_widen_the_interval_to_new_prompts(suite: Path) -> None:
    plan, outcomes = read_plan(suite), collect(suite)
    rng = np.random.default_rng(0)

    def with_bits(outcome):
        passed = []
        for rate in outcome.evals["sampled"]:
            bits = rng.random(256) < rate
            passed.append(np.packbits(bits).tobytes().hex())
        return replace(outcome, passed=passed, heldout="ab" * 32)

    contrasts = Study.of(plan, [with_bits(o) for o in outcomes]).contrasts
    found = next(c for c in contrasts if c.cell == "gspo+dense+stale").resampled
    assert found is not None and found.low is not None
    assert found.low < found.value < (found.high or 0.0)
    assert Study.of(plan, outcomes).contrasts[0].resampled is None


def test_a_saved_outcome_stays_confirmatory_under_its_protocol_and_no_other(tmp_path: Path) -> None:
    hashes = {"protocol_hash": "cd" * 32, "first_protocol_hash": "cd" * 32}
    folder = make_suite(tmp_path / "first", exploratory={"gspo+dense+stale": [4]}, **hashes)
    saved = tmp_path / "outcomes.jsonl.gz"
    save_outcomes(saved, collect(folder))
    told = {o.seed: o.registered for o in read_outcomes(saved) if o.cell == "gspo+dense+stale"}
    assert told == {1: "cd" * 32, 2: "cd" * 32, 3: "cd" * 32, 4: LATE}

    def confirmed(**changes: str) -> list[bool]:
        fresh = tmp_path / changes["protocol_hash"][:2]
        fresh.mkdir()
        plan = json.loads((folder / "suite.json").read_text())
        plan |= {"exploratory": {}, "first_protocol_hash": ""} | changes
        (fresh / "suite.json").write_text(json.dumps(plan))
        study = Study.of(read_plan(fresh), collect(fresh, saved))
        return [study.plan.confirmatory("gspo+dense+stale", [seed]) for seed in (1, 2, 3, 4)]

    assert confirmed(protocol_hash="cd" * 32) == [True, True, True, False]
    assert confirmed(protocol_hash="ef" * 32) == [False] * 4
