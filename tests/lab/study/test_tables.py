"""Tables as data: T1 to T7, their CSV, and that no number stands without its interval."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hmpo.errors import TelemetryError
from hmpo.lab.statistics.intervals import Estimate
from hmpo.lab.statistics.survival import kaplan_meier
from hmpo.lab.study.analysis import Study
from hmpo.lab.study.grid_tables import peers_table, staleness_table
from hmpo.lab.study.main_table import _median, main_table, time_table
from hmpo.lab.study.outcomes import collect
from hmpo.lab.study.overall_table import overall_table
from hmpo.lab.study.plan import read_plan
from hmpo.lab.study.side_tables import controller_table, cost_table, risk_table, stability_table
from hmpo.lab.study.tabular import EMPTY, Column, Table, digits, estimate, word
from tests.lab.study.suites import cell, make_outcome, make_suite, place, study_of, write_plan

PEERS = Path(__file__).parents[3] / "benchmarks" / "results"


def read(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table.csv())))


def row(table: Table, cell: str) -> dict[str, str]:
    return next(row for row in read(table) if row["cell"] == cell)


def test_t1_has_a_row_for_each_cell_with_what_it_came_to(study: Study) -> None:
    table = main_table(study)
    assert len(table.rows) == 10
    found = row(table, "gspo+dense+stale")
    runs = study.runs["gspo+dense+stale"].values()
    values = sorted(run.score.success for run in runs if run.score.success is not None)
    assert float(found["iqm"]) == pytest.approx(np.mean(values[1:3]))
    assert float(found["iqm_low"]) < float(found["iqm"]) < float(found["iqm_high"])
    assert found["verdict"] == "better" and found["against"] == "grpo+dense+stale"
    assert float(found["detectable"]) > 0 and found["reached"] == "4"
    assert found["failed"] == "0" and found["pass_at_k_n"] == "4"


def test_every_difference_in_t1_tells_what_could_have_been_seen(study: Study) -> None:
    for found in main_table(study).rows:
        if found["verdict"].text not in ("", "not paired"):
            assert found["detectable"].text and found["difference"].range


def test_shown_numbers_of_runs_have_an_interval_or_say_that_they_have_none(
    study: Study, tmp_path: Path
) -> None:
    single = study_of(make_suite(tmp_path, seeds=(2,)))
    for each in (study, single):
        for table in (main_table(each), risk_table(each), stability_table(each), cost_table(each)):
            assert table is not None
            for found in table.rows:
                for key, item in found.items():
                    if "_low" in item.raw:
                        assert item.range, (table.name, key)
    assert row(main_table(single), "gspo+dense+stale")["difference_low"] == ""
    assert main_table(single).rows[1]["iqm"].range == "no interval"


def test_a_crash_before_the_target_is_censored_at_the_end(suite: Path) -> None:
    outcomes = [
        replace(o, status="failed", evals={name: column[:3] for name, column in o.evals.items()})
        if o.key() == ("gspo+dense+stale", 2)
        else o
        for o in collect(suite)
    ]
    study = Study.of(read_plan(suite), outcomes)
    found = study.plan.cell("gspo+dense+stale")
    assert found is not None
    times, tokens, reached = time_table(study, found, study.target(found) or 0.0)
    place = list(study.runs[found.name]).index(2)
    assert (times[place], tokens[place], reached[place]) == (320.0, 128000.0, False)
    assert sum(reached) == 3 and row(main_table(study), found.name)["failed"] == "1"


def test_over_all_blocks_the_words_count_blocks(study: Study) -> None:
    table = overall_table(study)
    assert table is not None
    found = {line["member"]: line for line in read(table)}
    assert found["gspo"]["blocks"] == "2" and found["gspo"]["better"] == "1"
    assert found["grpo"]["better"] == ""
    assert float(found["reinforce"]["worst"]) < 0.5


def test_risk_and_stability_are_means_and_shares_over_seeds(study: Study) -> None:
    risk = risk_table(study)
    assert risk is not None
    assert float(row(risk, "grpo+dense+stale")["kl3_mean"]) == pytest.approx(0.004)
    stable = row(stability_table(study), "grpo+dense+stale")
    assert (stable["diverged"], stable["diverged_n"]) == ("0", "4")
    assert float(stable["diverged_high"]) == pytest.approx(0.4899, abs=1e-4)  # Wilson, 0 of 4
    assert stable["max_qk_all"] == "110.0"


def test_t4_is_made_where_exponent_and_staleness_vary(study: Study, tmp_path: Path) -> None:
    table = staleness_table(study)
    assert table is not None
    found = row(table, "gspo+dense+stale")
    assert (found["p"], found["stale"], found["verdict"]) == ("0.0", "stale", "better")
    write_plan(tmp_path, [cell("a", [1])])
    place(tmp_path, make_outcome("a", 1, 0.5))
    assert staleness_table(study_of(tmp_path)) is None


def test_t4_takes_the_exponent_that_a_cell_resolved_to(tmp_path: Path) -> None:
    power = {"mean": "power", "gate": "clip", "exponent": {"kind": "fixed"}}
    signed = {"p_positive": -1.0, "p_negative": 1.0}
    objectives = {
        "grpo": power | {"p": 1.0},
        "gmpo": power | {"p": 0.0},
        "hmpo": power | {"p": -1.0, "p_positive": -1.0, "p_negative": None},
        "signed": power | {"p": -1.0} | signed,
        "cispo": power | {"p": 1.0, "gate": "detached"},
        "ahm": power | {"p": -1.0, "mean": "ahm"},
        "learned": power | {"p": -1.0, "exponent": {"kind": "learned"}},
    }
    cells = []
    for name, objective in objectives.items():
        for lag in (0, 8):
            own = cell(f"{name}{lag}", [1], settings={"objective": {"member": name}})
            cells.append(own | {"resolved": {"objective": objective, "rollout": {"lag": lag}}})
            place(tmp_path, make_outcome(f"{name}{lag}", 1, 0.5))
    write_plan(tmp_path, cells)
    table = staleness_table(study_of(tmp_path))
    assert table is not None
    found = {line["cell"]: (line["p"], line["stale"]) for line in read(table)}
    assert found == {
        f"{name}{lag}": (p, f"lag {lag}, 1 x 1")
        for name, p in (("grpo", "1.0"), ("gmpo", "0.0"), ("hmpo", "-1.0"))
        for lag in (0, 8)
    }


def test_a_row_says_how_many_of_its_runs_are_exploratory(tmp_path: Path) -> None:
    late = {"gspo+dense+stale": [3, 4], "again": [101]}
    study = study_of(make_suite(tmp_path, exploratory=late))
    roles = {found["cell"].text: found["role"].text for found in main_table(study).rows}
    assert roles["gspo+dense+stale"] == "exploratory: 2 of 4"
    assert roles["again"] == "again, exploratory: 1 of 4"
    assert roles["gspo+dense+fresh"] == ""
    contrast = study.contrast("gspo+dense+stale", "grpo+dense+stale")
    assert contrast is not None and (contrast.confirmatory, contrast.late) == (False, "2 of 8")


def test_times_are_shown_without_an_interval_where_seeds_are_few(suite: Path) -> None:
    few = row(main_table(study_of(suite)), "grpo+dense+stale")
    assert (few["updates_low"], few["updates_high"], few["updates_n"]) == ("", "", "4")
    texts = {found["cell"].text: found["updates"] for found in main_table(study_of(suite)).rows}
    assert texts["grpo+dense+stale"].range.startswith("no interval; seeds ")


@pytest.mark.parametrize(
    ("times", "reached", "text", "range"),
    [
        ([10, 20, 30], [1, 1, 1], "20", "no interval; seeds 10 to 30"),
        ([10, 20, 30], [1, 1, 0], "20", "no interval; seeds 10 to 20 or never"),
        ([5], [1], "5", "no interval"),
        ([10, 20, 30, 30], [1, 0, 0, 0], "fewer than half reach it", ""),
        ([30, 30], [0, 0], "not reached", ""),
        ([10] * 8, [1] * 8, "10", "10, 10"),
        ([10, 10, 20, 20, 30, 30, 40, 40], [1] * 5 + [0] * 3, "25", "10, open"),
    ],
)
def test_a_time_to_target_says_what_its_seeds_allow(times, reached, text, range) -> None:
    item = _median([float(time) for time in times], [bool(hit) for hit in reached], "{:.0f}".format)
    assert (item.text, item.range) == (text, range)


def test_times_of_many_seeds_have_the_interval_of_kaplan_and_meier(tmp_path: Path) -> None:
    study = study_of(make_suite(tmp_path, seeds=range(1, 11)))
    found = study.plan.cell("gspo+dense+stale")
    assert found is not None
    times, tokens, reached = time_table(study, found, study.target(found) or 0.0)
    line = row(main_table(study), found.name)
    for name, of in (("updates", times), ("tokens", tokens)):
        expected = kaplan_meier(of, reached).median
        assert expected is not None and expected.low
        assert float(line[f"{name}_low"]) == pytest.approx(expected.low)
    heads = {column.key: column.label for column in main_table(study).columns}
    item = next(r for r in main_table(study).rows if r["cell"].text == found.name)["tokens"]
    assert heads["tokens"] == "tokens to target, thousands"
    assert item.text == digits(float(line["tokens"]) / 1000)


def test_one_seed_gives_no_word(tmp_path: Path) -> None:
    study = study_of(make_suite(tmp_path, seeds=(2,)))
    words = {found["cell"].text: found["verdict"].text for found in main_table(study).rows}
    assert words["negative"] == words["gspo+dense+stale"] == "one seed"


def test_t5_counts_runs_that_advice_left_untouched(tmp_path: Path) -> None:
    cells = [
        cell(mode, [1, 2], levels={"member": mode}, settings={"agm": {"mode": mode}})
        for mode in ("off", "advise", "apply")
    ]
    compare = {"factor": "member", "to": ["off"], "within": []}
    write_plan(tmp_path, cells, compare=compare)
    for seed in (1, 2):
        off = make_outcome("off", seed, 0.5, levels={"member": "off"})
        place(tmp_path, off)
        place(tmp_path, replace(off, cell="advise", levels={"member": "advise"}))
        place(tmp_path, make_outcome("apply", seed, 0.6, levels={"member": "apply"}))
    write_plan(tmp_path, [*cells, cell("aside", [1], settings={"x": 1})], compare=compare)
    place(tmp_path, make_outcome("aside", 1, 0.5))
    table = controller_table(study_of(tmp_path))
    assert table is not None  # without the cell that has no counterpart
    texts = {found["cell"].text: found["identical"].text for found in table.rows}
    assert texts == {"off": "", "advise": "2/2", "apply": "0/2"}


def test_there_is_no_t5_where_controllers_do_not_differ(study: Study) -> None:
    assert controller_table(study) is None


def test_cost_is_compared_by_seed(study: Study) -> None:
    found = row(cost_table(study), "gspo+dense+stale")
    pairs = [
        run.outcome.cost["cpu_s"] / study.runs["grpo+dense+stale"][seed].outcome.cost["cpu_s"]
        for seed, run in study.runs["gspo+dense+stale"].items()
    ]
    assert float(found["relative"]) == pytest.approx(np.mean(pairs))


def test_t7_shows_the_committed_comparisons() -> None:
    table = peers_table(PEERS)
    assert table is not None
    peers = {found["peer"].text for found in table.rows}
    assert {"TRL", "verl", "OpenRLHF"} <= peers
    assert {found["within"].text for found in table.rows} == {"yes"}
    assert peers_table(None) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"peer": "x", "version": "1", "comparisons": [1]}'])
def test_a_result_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    assert peers_table(tmp_path) is None
    (tmp_path / "equivalence-x.json").write_text(text, encoding="utf-8")
    with pytest.raises(TelemetryError, match="no result of a comparison"):
        peers_table(tmp_path)


def test_csv_has_a_column_for_each_end_and_is_no_formula(tmp_path: Path) -> None:
    columns = (Column("x", "x"), Column("y", "y", numeric=False))
    rows = (
        {"x": EMPTY, "y": word("=1+1")},
        {"x": estimate(Estimate(1.0, 0.5, None, 0.95, 3)), "y": EMPTY},
    )
    lines = Table("T", "", "", columns, rows).csv().splitlines()
    assert lines[0] == "x,x_low,x_high,x_n,y"
    assert lines[1].endswith("=1+1") and not lines[1].endswith(",=1+1")
    assert lines[2] == "1.0,0.5,,3,"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.12345, "0.123"), (1234.5, "1234"), (1e-7, "1.00e-07"), (-0.5, "-0.5")],
)
def test_numbers_are_shown_in_three_digits(value: float, text: str) -> None:
    assert digits(value) == text


def test_a_table_drops_columns_that_hold_nothing(study: Study) -> None:
    table = main_table(study)
    keys = {column.key for column in table.shown().columns}
    assert "new_prompts" not in keys and "difference" in keys
    assert json.loads(json.dumps(sorted(keys)))
