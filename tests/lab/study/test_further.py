"""What stands beside a difference: pairs won, equal KL, times, collapses, fits foretold."""

import csv
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hmpo.lab.statistics.curves import fit_sigmoid
from hmpo.lab.statistics.intervals import rate_difference
from hmpo.lab.study import further
from hmpo.lab.study.analysis import Study
from hmpo.lab.study.further_tables import foretold_table, further_table
from hmpo.lab.study.main_table import time_table
from hmpo.lab.study.outcomes import Outcome
from hmpo.lab.study.overall_table import overall_table
from hmpo.lab.study.page import findings
from hmpo.lab.study.plan import Cell, Plan
from tests.lab.study.suites import make_outcome, make_suite, study_of


def two(*sides: list[Outcome]) -> Study:
    """A baseline and a method of as many runs each."""
    cells = [
        Cell(name=name, levels={"member": name}, seeds=tuple(o.seed for o in side))
        for name, side in zip("ab", sides)
    ]
    plan = Plan(name="s", cells=tuple(cells), factor="member", to=("a",))
    return Study.of(plan, [o for side in sides for o in side])


def runs(name: str, rates: list[list[float]], kl: list[float] | None = None) -> list[Outcome]:
    """Runs evaluated before and after each of the updates 10, 20, ..., by seed."""
    made = []
    for seed, row in enumerate(rates):
        steps = [10 * i for i in range(len(row))]
        evals = {"step": steps, "tokens": [9 * s for s in steps], "sampled": row}
        curves = {"step": steps[1:], "kl3": kl} if kl else {}
        outcome = make_outcome(name, seed, 0.5, levels={"member": name}, updates=steps[-1])
        made.append(replace(outcome, evals=evals, curves=curves))
    return made


def test_wins_are_the_share_of_all_pairs_of_runs_with_ties_as_halves(study: Study) -> None:
    for contrast in (*study.contrasts, *study.others):
        a = [study.runs[contrast.cell][s].score.success for s in contrast.seeds]
        b = [study.runs[contrast.against][s].score.success for s in contrast.seeds]
        a, b = a or study.successes(contrast.cell), b or study.successes(contrast.against)
        expected = np.mean([(np.sign(x - y) + 1) / 2 for x in a for y in b])
        found = further.wins(study, contrast)
        assert found is not None and found.low is not None and found.high is not None
        assert found.value == pytest.approx(expected)
        assert found.low <= found.value <= found.high


def test_wins_over_blocks_are_the_mean_of_the_blocks(study: Study) -> None:
    own = [c for c in study.contrasts if c.cell.startswith("gspo")]
    alone = [e.value for e in (further.wins(study, c) for c in own) if e is not None]
    whole = further.wins_over_blocks(study, own)
    assert len(alone) == 2
    assert whole is not None and whole.value == pytest.approx(np.mean(alone))
    table = overall_table(study)
    assert table is not None
    by_level = {row["member"].text: row for row in table.rows}
    assert by_level["gspo"]["wins"].raw[""] == pytest.approx(whole.value)
    assert by_level["gspo"]["wins"].range and not by_level["grpo"]["wins"].text
    assert by_level["gspo"]["collapsed"].text == "0/8"


def test_success_at_equal_kl_is_read_off_at_the_same_sum_of_kl() -> None:
    # a gains .1 for each .1 nat and b .2, which spends half of it: 10 updates of .01 or of .005.
    a = [[0.2 + d, 0.3 + d, 0.4 + d, 0.5 + d] for d in (0.0, 0.01, 0.02)]
    study = two(runs("a", a, [0.01] * 3), runs("b", a, [0.005] * 3))
    found = further.equal_kl(study, study.contrasts[0])
    assert found is not None
    assert found.kl == pytest.approx(0.15 * np.arange(1, 11) / 10)
    # at KL x: b has .2 + 2 x, a .2 + x; x is .0825 in the mean.
    assert found.mean.value == pytest.approx(0.0825) and found.mean.n == 3
    assert found.mean.low == pytest.approx(0.0825)


def test_runs_that_went_nowhere_or_failed_are_not_compared_at_equal_kl() -> None:
    rates = [[0.2, 0.3], [0.2, 0.4], [0.2, 0.35]]
    still = two(runs("a", rates, [1e-13]), runs("b", rates, [2e-13]))
    assert further.equal_kl(still, still.contrasts[0]) is None
    assert further.equal_kl(two(*(runs(n, rates) for n in "ab")), still.contrasts[0]) is None
    b = runs("b", rates, [0.01])
    b[1] = replace(b[1], status="failed")
    study = two(runs("a", rates, [0.01]), b)
    found = further.equal_kl(study, study.contrasts[0])
    assert found is not None and found.mean.n == 2


def test_times_are_tested_by_scipys_log_rank_with_holm_in_the_block(study: Study) -> None:
    found = further.log_ranks(study)
    block = [c for c in study.contrasts if ("regime", "stale") in c.block]
    raw = []
    for contrast in block:
        base = study.plan.cell(contrast.against)
        sides = []
        for name in (contrast.cell, contrast.against):
            cell = study.plan.cell(name)
            assert cell is not None and base is not None
            times, _, hit = time_table(study, cell, study.target(base) or 0.0)
            sides.append(
                stats.CensoredData(
                    uncensored=[t for t, h in zip(times, hit) if h],
                    right=[t for t, h in zip(times, hit) if not h],
                )
            )
        raw.append(stats.logrank(*sides).pvalue)
    small = int(np.argmin(raw))
    expected = [0.0, 0.0]  # Holm of two tests by hand
    expected[small] = min(1.0, 2 * raw[small])
    expected[1 - small] = max(expected[small], raw[1 - small])
    assert [found[c.cell, c.against] for c in block] == pytest.approx(expected, rel=1e-6)


def test_collapses_of_both_sides_stand_beside_the_verdict() -> None:
    fine, lost = [0.3, 0.5, 0.6, 0.6], [0.3, 0.6, 0.5, 0.2]
    study = two(runs("a", [fine] * 4), runs("b", [lost, lost, lost, fine]))
    contrast = study.contrasts[0]
    found = further.collapses(study, contrast)
    assert (found.count, found.total, found.base, found.base_total) == (3, 4, 0, 4)
    assert found.difference == rate_difference(3, 4, 0, 4)
    told = findings(study)[0]["sentences"][0]["text"]
    assert contrast.verdict is not None and told.startswith(contrast.verdict.sentence)
    assert told.endswith("collapsed: 3 of 4 against 0 of 4 (+75 points, 95 % interval +9 to +95)")
    table = further_table(study)
    assert table is not None
    row = table.rows[0]
    assert (row["collapsed"].text, row["base_collapsed"].text) == ("3/4", "0/4")
    assert row["collapse_difference"].range == "+8.5, +95.4"
    healthy = two(runs("a", [fine] * 2), runs("b", [fine] * 2))
    assert "collapsed" not in findings(healthy)[0]["sentences"][0]["text"]


def test_every_estimate_of_t1b_has_an_interval_or_says_that_it_has_none(
    study: Study, tmp_path: Path
) -> None:
    for each in (study, study_of(make_suite(tmp_path, seeds=(2,)))):
        table = further_table(each)
        assert table is not None
        assert len(table.rows) == len(each.contrasts) + len(each.others)
        for row in table.rows:
            for item in row.values():
                assert item.range or "_low" not in item.raw
    rows = list(csv.DictReader(io.StringIO(table.csv())))
    assert {row["verdict"] for row in rows} == {"one seed", ""}
    assert {row["wins"] for row in rows} == {""}


def sigmoid(steps: np.ndarray) -> np.ndarray:
    return 0.2 + 0.5 / (1 + (60 / steps) ** 2)


def learned(lift: float = 0.0, seeds: int = 6, noise: float = 0.004) -> Study:
    """Runs on a sigmoid, the second half of which is `lift` above it."""
    rng = np.random.default_rng(0)
    steps = np.arange(5, 205, 5)
    sides = []
    for name in "ab":
        side = []
        for seed in range(seeds):
            means = sigmoid(steps) + rng.normal(0, noise, steps.size) + lift * (steps > 100)
            reward = {"step": steps.tolist(), "mean": means.tolist()}
            made = make_outcome(name, seed, 0.5, levels={"member": name})
            side.append(replace(made, reward=reward))
        sides.append(side)
    return two(*sides)


@pytest.mark.parametrize(
    ("lift", "word"), [(0.0, "as foretold"), (0.1, "went further"), (-0.1, "fell short")]
)
def test_a_fit_of_the_first_half_is_held_against_the_second(lift: float, word: str) -> None:
    study = learned(lift)
    found = further.foretold(study, study.plan.cells[0])
    assert found is not None and found.missed.low is not None and found.missed.high is not None
    assert (found.curve, found.seeds, found.points) == ("reward", 6, 40)
    assert found.word(0.05) == word
    assert found.missed.low <= lift <= found.missed.high
    table = foretold_table(study)
    assert table is not None and len(table.rows) == 2


def test_the_interval_of_the_forecast_moves_with_the_fit() -> None:
    # What one seed does to the forecast, against a fit of the mean curve that it moved.
    steps = np.arange(5.0, 205.0, 5.0)
    rng = np.random.default_rng(1)
    table = sigmoid(steps) + rng.normal(0, 0.02, (4, steps.size))
    half = 20
    fit = fit_sigmoid(steps[:half], table[:, :half].mean(0))
    found = further._promised(fit, steps, table)
    size = 1e-3
    for seed in range(4):
        moved = table[:, :half].mean(0) + size * (table[seed] - table.mean(0))[:half]
        change = fit_sigmoid(steps[:half], moved).at(steps[half:]) - fit.at(steps[half:])
        expected = float(change.mean()) / size
        assert found[seed] - float(fit.at(steps[half:]).mean()) == pytest.approx(
            expected, rel=0.25, abs=2e-3
        )


def test_a_curve_of_one_seed_is_fitted_without_an_interval_and_a_short_one_not_at_all() -> None:
    study = learned(seeds=1)
    found = further.foretold(study, study.plan.cells[0])
    assert found is not None and found.missed.low is None and found.word(0.02) == ""
    short = two(*(runs(name, [[0.2, 0.3]]) for name in "ab"))
    for cell in short.runs.values():
        cell[0] = replace(cell[0], outcome=replace(cell[0].outcome, reward={}))  # pyrefly: ignore
    assert further.foretold(short, short.plan.cells[0]) is None
    assert foretold_table(short) is None


def test_ten_evaluations_are_preferred_to_the_reward_in_training() -> None:
    rates = [[0.2 + 0.03 * i for i in range(11)]] * 2
    study = two(*(runs(name, rates) for name in "ab"))
    found = further.foretold(study, study.plan.cells[0])
    assert found is not None and (found.curve, found.points) == ("success", 10)
