"""Figures: which there are, what they are drawn from, and the same bytes each time."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from hmpo.lab.study import estimate_figures as estimates
from hmpo.lab.study.analysis import Study
from hmpo.lab.study.decision_figure import decision_figure
from hmpo.lab.study.figures import curve_figure, draw, joined, look, signal_figure
from hmpo.lab.study.report import PICTURES
from hmpo.lab.study.series import QUANTITIES, blocks, curves_of
from tests.lab.study.suites import cell, make_outcome, make_suite, place, study_of, write_plan


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """One run of one cell, of which nothing but its success is known."""
    folder = write_plan(tmp_path_factory.mktemp("bare"), [cell("a", [1])])
    metrics = dict.fromkeys(("ess_mean", "sigma", "sigma_sqrt_l"))
    outcome = make_outcome("a", 1, 0.5, metrics=metrics, curves=False)
    place(folder, outcome)
    return study_of(folder)


def lines(study: Study, name: str) -> dict[str, list[float]]:
    figure = curve_figure(name)(study)
    assert figure is not None
    found = {}
    for axes in figure.axes:
        for line in axes.lines:
            if not line.get_label().startswith("_"):
                found[f"{axes.get_title(loc='left')}: {line.get_label()}"] = list(line.get_ydata())
    return found


def test_a_curve_is_the_mean_over_seeds_at_each_evaluation(study: Study) -> None:
    runs = study.runs["gspo+dense+stale"].values()
    expected = np.mean([run.outcome.evals["sampled"] for run in runs], axis=0)
    np.testing.assert_allclose(lines(study, "success")["dense, stale: gspo"], expected)


def test_the_band_is_students_interval_of_the_seeds_that_are_there(study: Study) -> None:
    cells = blocks(study)["dense, stale"]
    curve = next(c for c in curves_of(study, cells, QUANTITIES[0]) if c.label == "grpo")
    values = [run.outcome.evals["sampled"][-1] for run in study.runs[curve.cell].values()]
    half = 3.182446 * np.std(values, ddof=1) / 2  # t of 3 degrees of freedom, 4 seeds
    assert curve.low[-1] == pytest.approx(np.mean(values) - half, rel=1e-6)
    assert curve.high[-1] == pytest.approx(np.mean(values) + half, rel=1e-6)
    assert len(curve.seeds) == 4


def test_seeds_are_one_line_with_gaps(study: Study) -> None:
    curve = curves_of(study, blocks(study)["dense, stale"], QUANTITIES[0])[0]
    steps, values = joined(curve)
    assert len(steps) == len(values) == 4 * 10
    assert np.flatnonzero(np.isnan(values)).tolist() == [9, 19, 29, 39]


def test_blocks_are_those_of_the_plan_and_the_controls(study: Study) -> None:
    found = {name: [c.name for c in cells] for name, cells in blocks(study).items()}
    assert list(found) == ["dense, fresh", "dense, stale", "controls"]
    assert found["controls"] == ["grpo+dense+stale", "again", "negative", "positive", "placebo"]


def test_all_figures_are_drawn_where_there_is_data_and_none_elsewhere(
    study: Study, bare: Study
) -> None:
    drawn = {picture.name for picture in PICTURES if picture.draw(study) is not None}
    assert drawn == {picture.name for picture in PICTURES}
    few = {picture.name for picture in PICTURES if picture.draw(bare) is not None}
    assert few == {"success", "reward", "times"}


def test_the_same_outcomes_give_the_same_bytes_in_both_forms(suite: Path, study: Study) -> None:
    picture = next(p for p in PICTURES if p.name == "forest")
    one, other = draw(picture, study), draw(picture, study_of(suite))
    assert one == other
    assert one["svg"].startswith(b"<?xml") and one["png"].startswith(b"\x89PNG")
    assert not re.search(rb"<(script|foreignObject|a) ", one["svg"])


def test_the_forest_has_every_difference_and_the_band_that_does_not_matter(study: Study) -> None:
    figure = estimates.forest(study)
    assert figure is not None
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    compared = [c for c in (*study.contrasts, *study.others) if c.estimate]
    assert names == [f"{c.cell} - {c.against}" for c in compared]
    band = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    assert (band.x0, band.x1) == pytest.approx((-2, 2))


def test_decisions_are_strips_by_seed_above_what_was_moved(study: Study) -> None:
    figure = decision_figure(study)
    assert figure is not None
    states, rate = figure.axes  # p was the same throughout
    assert [label.get_text() for label in states.get_yticklabels()] == ["4", "3", "2", "1"]
    spans = sorted(
        (path.vertices[:, 0].min(), path.vertices[:, 0].max())
        for bars in states.collections
        for path in bars.get_paths()
        if path.vertices[:, 1].max() < 1  # of the lowest row
    )
    assert spans == [(0, 40), (0, 160), (40, 190), (160, 320), (190, 320)]
    marks = {line.get_marker(): list(line.get_xdata()) for line in states.lines}
    assert marks == {"v": [200], "x": [310]}
    assert rate.get_ylabel() == "learning rate" and len(rate.lines) == 4


def test_exploratory_differences_are_hollow(tmp_path: Path) -> None:
    late = {"gspo+dense+stale": [3]}
    figure = estimates.forest(study_of(make_suite(tmp_path, exploratory=late)))
    assert figure is not None
    dots = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [dot.get_markerfacecolor() == "none" for dot in dots].count(True) == 1


def test_the_heat_map_shows_means_by_exponent_and_staleness(study: Study) -> None:
    figure = estimates.heat_map(study)
    assert figure is not None
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert len(texts) == 6 and all("+-" in text for text in texts)
    mean = np.mean(study.successes("reinforce+dense+stale"))
    assert any(text.startswith(f"{100 * mean:.1f}") for text in texts)


def test_the_threshold_of_qk_clip_is_drawn(study: Study) -> None:
    assert lines(study, "max_qk")["dense, stale: threshold"] == [100.0, 100.0]


def test_signals_stand_in_rows_of_one_scale(study: Study) -> None:
    figure = signal_figure(study)
    assert figure is not None
    assert len(figure.axes) == 4 * 3
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


def test_looks_of_24_cells_differ() -> None:
    assert len({tuple(look(place).items()) for place in range(24)}) == 24


def test_a_title_with_mathematics_in_it_is_a_text(tmp_path: Path) -> None:
    levels = {"member": "grpo", "task": "$\\frac{", "regime": "x_{"}
    folder = write_plan(tmp_path, [cell("a", [1, 2], levels=levels)])
    for seed in (1, 2):
        place(folder, make_outcome("a", seed, 0.5, levels=levels))
    assert draw(PICTURES[0], study_of(folder))["svg"]


def swept(folder: Path, factor: str) -> Study:
    """Two methods in two regimes at three rates; the best rate depends on the method."""
    cells, ends = [], {"p1": (0.2, 0.5, 0.1), "p0": (0.1, 0.3, 0.6)}
    for method, regime, step in itertools.product(ends, ("fresh", "stale"), range(3)):
        rate = (1e-4, 3e-4, 1e-3)[step]
        levels = {"p": method, "regime": regime, factor: f"r{step}"}
        name = "+".join(levels.values())
        settings = {"optimizer": {"lr": rate}}
        cells.append(cell(name, [1, 2], levels=levels, settings=settings))
        for seed in (1, 2):
            end = ends[method][step] + (0.1 if regime == "stale" else 0.0)
            place(folder, make_outcome(name, seed, end, levels=levels))
    compare = {"factor": "p", "to": ["p1"], "within": ["regime", factor]}
    write_plan(folder, cells, compare=compare)
    return study_of(folder)


@pytest.mark.parametrize("factor", ["rate", "lr"])
def test_an_envelope_is_drawn_for_each_block_of_a_factor_of_rates(
    tmp_path: Path, factor: str
) -> None:
    study = swept(tmp_path, factor)
    found = estimates.tuning(study)
    assert {block: list(methods) for block, methods in found.items()} == {
        "fresh": ["p1", "p0"],
        "stale": ["p1", "p0"],
    }
    for methods in found.values():
        assert [rate for rate, _ in methods["p0"]] == [1e-4, 3e-4, 1e-3]
    figure = estimates.envelope(study)
    assert figure is not None
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["fresh", "", "stale", ""]
    last = figure.axes[3].lines
    assert [float(line.get_ydata()[-1]) for line in last] == pytest.approx(
        [max(np.mean(scores) for _, scores in methods) for methods in found["stale"].values()]
    )


def test_a_factor_that_sets_rates_under_another_name_is_no_envelope(tmp_path: Path) -> None:
    assert estimates.envelope(swept(tmp_path, "size")) is None
