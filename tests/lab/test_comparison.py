"""Any run folders side by side: all of each is seen, and what was set differently is listed."""

import dataclasses
import json

import pytest
from matplotlib.figure import Figure

from hmpo.lab import plots, report
from hmpo.lab.comparison import UNKNOWN, differing_settings
from hmpo.lab.folder import load_run
from hmpo.lab.panels import PLOTS
from hmpo.lab.summary import summarize
from tests.lab.payloads import PageReader
from tests.lab.synthetic import make_run

BY_NAME = {plot.name: plot for plot in PLOTS}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run, a longer one with larger numbers, one without an update, and one of TRL."""
    root = tmp_path_factory.mktemp("several")
    made = [
        make_run(root / "short", name="short", updates=8),
        make_run(root / "long", name="long", updates=120, p=0.0, seed=3),
        make_run(root / "none", name="none", crash_at=0),
        root / "trl",
    ]
    made[3].mkdir()
    head, *lines = (made[0] / "telemetry.jsonl").read_text().splitlines()
    lines = [line for line in lines if '"type":"step"' in line or '"type":"end"' in line]
    head = json.dumps({**json.loads(head), "objective": "gspo (p = -0.5)", "seed": 7})
    (made[3] / "telemetry.jsonl").write_text("\n".join((head, *lines)) + "\n")
    return made


def drawn(monkeypatch, plot, runs, **options):
    """The figure of a plot, with all limits settled."""
    figures = []

    def keep(figure, form):
        figure.canvas.draw()
        figures.append(figure)
        return b"image"

    monkeypatch.setattr(plots, "save", keep)
    plots.render(plot, runs, labels=[run.label for run in runs], **options)
    assert isinstance(figures[0], Figure)
    return figures[0]


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", ["kl", "gradient", "length", "breakdown", "clip"])
def test_every_run_lies_within_the_axes_that_all_share(folders, monkeypatch, name, narrow):
    runs = [load_run(folder) for folder in folders]
    figure = drawn(monkeypatch, BY_NAME[name], runs, narrow=narrow)
    for axes in figure.axes:
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        assert right >= 119, "the longest run"
        for line in axes.lines:
            values = [v for v in line.get_ydata() if v == v]
            assert all(low <= v <= high for v in values) and all(
                left <= x for x in line.get_xdata()
            )
        for patch in axes.collections:
            for path in patch.get_paths():
                assert low <= path.get_extents().y0 and path.get_extents().y1 <= high


def test_more_runs_than_fit_beside_each_other_go_below(folders, monkeypatch):
    runs = [load_run(folder) for folder in folders[:2] * 3]
    figure = drawn(monkeypatch, BY_NAME["kl"], runs)
    assert len(figure.axes) == 12 and figure.get_size_inches()[0] <= 4 * 3.6
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert sum(map(bool, titles)) == 6


def test_runs_without_an_update_and_of_a_host_are_compared(folders, tmp_path):
    page = report.write_report(folders, tmp_path / "all.html").read_text()
    text = PageReader(page).words
    for expected in ("short", "long", "none", "trl", "gspo (p = -0.5)", "Settings that differ"):
        assert expected in text


def test_settings_that_differ_are_listed_and_unknown_ones_named(folders):
    runs = [load_run(folder) for folder in folders]
    rows = dict(differing_settings(runs))
    assert rows["updates"] == ["8", "120", "80", UNKNOWN]
    assert rows["objective.p"] == ["-1", "0", "-1", "-1"]
    assert rows["seed"] == ["0", "3", "0", "7"]
    assert rows["objective.name"][3] == "gspo"
    assert not {"name", "out", "task.level", "trainer.group_size"} & set(rows)
    assert differing_settings(runs[:1] * 2) == []


def test_mean_reward_stands_beside_success_and_the_threshold_decides_what_is_green(tmp_path):
    samples = [
        {
            "step": 0,
            "rollout": 0,
            "prompt": "p",
            "completion": str(r),
            "reward": r,
            "finished": True,
        }
        for r in (0.015, 0.6, 1.0)
    ]
    run = make_run(tmp_path / "run", updates=8, samples=samples)
    view = summarize(load_run(run), "run")
    row = view["rates"][-1]
    assert (row["name"], row["before"]["text"], row["after"]["text"]) == (
        "mean reward",
        "0.240",
        "0.840",
    )
    assert row["change"] == "+0.600"
    assert [row["good"] for row in view["samples"][0]["rows"]] == [True, False, False]
    config = json.loads((run / "config.json").read_text())
    config["eval"]["success"] = 0.5
    (run / "config.json").write_text(json.dumps(config))
    view = summarize(load_run(run), "run")
    assert [row["good"] for row in view["samples"][0]["rows"]] == [True, True, False]
    assert view["threshold"] == "0.5"
    text = PageReader(report.write_report([run]).read_text()).words
    assert "A success is a total reward of 0.5 or more" in text and "mean reward" in text


@pytest.mark.parametrize("updates", [1, 4])
def test_one_rollout_leaves_no_chart_empty(tmp_path, monkeypatch, updates):
    run = load_run(make_run(tmp_path / "run", updates=updates))
    for plot in PLOTS:
        if not plots.available(plot, [run]):
            continue
        for axes in drawn(monkeypatch, plot, [run]).axes:
            seen = [line for line in axes.lines if line.get_marker() != "None"]
            wide = [path.get_extents() for part in axes.collections for path in part.get_paths()]
            assert seen or any(extent.width > 0 and extent.height > 0 for extent in wide), plot.name


def test_a_moving_average_is_not_longer_than_half_of_its_series(tmp_path):
    config = {"trainer": {"minibatches": 40, "epochs": 1}}
    run = load_run(make_run(tmp_path / "run", updates=8, config=config))
    assert plots.smoothing(40, run) == 1 and plots.smoothing(400, run) == 40


def test_a_phone_gets_figures_of_its_own_and_rows_instead_of_columns(tmp_path, folders):
    page = report.write_report(folders[:1], tmp_path / "page.html").read_text()
    assert page.count('media="(max-width: 640px)"') == page.count("<img ")
    narrow = plots.render(BY_NAME["clip"], [load_run(folders[0])], narrow=True).decode()
    width = float(narrow.split('width="')[1].split("pt")[0])
    assert width * 96 / 72 <= 375, "drawn at its own size: text of 9 points is 12 pixels"
    assert ".stacked tr, .stacked td, .stacked th { display: block; }" in page


def test_where_runs_lie_is_no_setting_in_which_they_differ(folders):
    runs = [load_run(path) for path in folders[:2]]
    moved = dataclasses.replace(runs[1], config={**runs[1].config, "relative_to": ["/elsewhere"]})
    names = [name for name, _ in differing_settings([runs[0], moved])]
    assert not {"relative_to", "out", "name"} & {*names}
