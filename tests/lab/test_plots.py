import math

import pytest

from hmpo.lab import plots
from hmpo.lab.folder import load_run
from hmpo.lab.panels import PLOTS, STEP_PARTS
from hmpo.stopwatch import PARTS
from hmpo.telemetry.lookup import lookup
from tests.lab.synthetic import make_run

BY_NAME = {plot.name: plot for plot in PLOTS}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return load_run(make_run(tmp_path_factory.mktemp("plots") / "r", updates=40))


def test_every_plotted_metric_has_a_definition_and_every_axis_a_label():
    for plot in PLOTS:
        assert plot.title and plot.caption.endswith(".")
        for panel in plot.panels:
            assert panel.unit
            for line in panel.lines:
                record = {"steps": "step", "evals": "eval", "times": "time"}[line.source]
                assert record in lookup(line.metric).records
            colours = plots.LAYERS if panel.stacked else plots.COLOURS
            assert len(panel.lines) <= len(colours)


@pytest.mark.parametrize(
    ("left_out", "name"),
    [
        (("kl/",), "kl"),
        (("clip/",), "clip"),
        (("ratio/log",), "ratio"),
        (("entropy",), "entropy"),
        (("grad_norm", "lr"), "gradient"),
        (("len/",), "length"),
        (("qk/",), "logits"),
        (("tokens_per_s",), "speed"),
        (("time/",), "breakdown"),
        (("adv/",), "signal"),
    ],
)
def test_a_plot_without_its_series_is_left_out_and_the_others_stay(tmp_path, left_out, name):
    run = load_run(make_run(tmp_path / "r", updates=8, leave_out=left_out))
    shown = [plot.name for plot in PLOTS if plots.available(plot, [run])]
    assert shown == [plot.name for plot in PLOTS if plot.name != name]
    assert plots.render(BY_NAME[name], [run]) is None


def test_one_missing_panel_leaves_the_other(tmp_path):
    run = load_run(make_run(tmp_path / "r", updates=8, leave_out=("kl/ref",)))
    assert b"to reference" not in plots.render(BY_NAME["kl"], [run])
    assert b"old to new" in plots.render(BY_NAME["kl"], [run])


def test_series_that_are_nowhere_finite_count_as_missing(tmp_path):
    run = load_run(make_run(tmp_path / "r", updates=2))
    for record in run.log.steps:
        record["entropy"] = math.nan
    assert run.series("entropy") == ([], [])
    assert plots.render(BY_NAME["entropy"], [run]) is None


def test_fixed_exponent_is_not_plotted_and_a_moving_one_is(tmp_path):
    run = load_run(make_run(tmp_path / "r", updates=4))
    assert b"exponent p" not in plots.render(BY_NAME["exponent"], [run])
    run.log.steps[-1]["ratio/p"] = 0.5
    assert b"exponent p" in plots.render(BY_NAME["exponent"], [run])


def test_images_are_the_same_each_time(run):
    for form in ("svg", "png"):
        first, second = (plots.render(BY_NAME["success"], [run], form=form) for _ in range(2))
        assert first == second and len(first) > 5000


def test_threshold_of_the_configuration_is_drawn(run):
    assert b"threshold" in plots.render(BY_NAME["logits"], [run])


def test_dark_plots_hold_no_colour_of_the_light_page(run):
    light = plots.render(BY_NAME["clip"], [run])
    dark = plots.darken(light)
    for colour in (plots.INK, plots.SOFT, plots.GRID, *plots.COLOURS[:3]):
        assert colour.encode() in light and colour.encode() not in dark
        assert plots.DARK[colour].encode() in dark


def contrast(one, two):
    """Contrast ratio of WCAG 2.1."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(one), luminance(two)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def test_text_and_lines_stand_out_on_both_grounds():
    for ground, palette in (("#ffffff", {c: c for c in plots.DARK}), ("#15191e", plots.DARK)):
        assert contrast(palette[plots.INK], ground) > 7
        assert contrast(palette[plots.SOFT], ground) > 4.5
        assert all(contrast(palette[colour], ground) > 3 for colour in plots.COLOURS)


def test_smoothing_spans_whole_rollouts_and_leaves_short_series_alone(run):
    assert plots.smoothing(20, run) == 1
    assert plots.smoothing(40, run) == 4, "four minibatches a rollout"
    assert plots.smoothing(3000, run) % 4 == 0


def test_interval_is_read_or_made_from_counts():
    record = {"eval/greedy_low": 0.1, "eval/greedy_high": 0.4}
    assert plots.interval(record, "eval/greedy") == (0.1, 0.4)
    low, high = plots.interval({"eval/greedy_k": 8, "eval/greedy_n": 10}, "eval/greedy")
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert plots.interval({"eval/greedy": 0.5}, "eval/greedy") is None
    assert plots.interval({"eval/greedy_k": 11, "eval/greedy_n": 10}, "eval/greedy") is None


def test_the_breakdown_stacks_means_over_whole_rollouts(run, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots.Axes, "stackplot", lambda self, x, y, **more: drawn.append((x, y)))
    plots.render(BY_NAME["breakdown"], [run])
    ((places, layers),) = drawn
    assert places == list(range(3, 40, 4))
    assert layers[0] == pytest.approx([9 / 4] + [2 / 4] * 9), "sampling, once a rollout"
    assert layers[2] == pytest.approx([0.2] * 10), "log-probs, every update"


def test_steps_are_broken_down_into_the_parts_that_the_stopwatch_knows():
    assert [line.metric for line in STEP_PARTS] == [f"time/{name}_s" for name in PARTS]
