"""`hmpo agm`: replays of runs and of logs of others, sweeps, differences, and the timeline."""

import csv
import gzip
import json

import pytest

import hmpo.cli
from hmpo.errors import CheckpointError, ConfigError, TelemetryError
from hmpo.lab.decisions import summarize_decisions
from hmpo.lab.replay import grid_of, in_order, load_settings, load_source, replay_file
from hmpo.run import loop as run
from hmpo.telemetry.csvlog import to_csv
from hmpo.telemetry.foreign import read_log
from hmpo.telemetry.ingest import read_run
from tests.faults.micro import micro_config, micro_policy
from tests.lab.synthetic import make_run

AGM = {"mode": "apply", "adapter": {"dwell": 1, "median_window": 2, "gap_target": 5e-4}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with controllers that act."""
    out = tmp_path_factory.mktemp("agm")
    config = micro_config(micro_policy(out / "policy"), out, updates=14, eval__every=5, agm=AGM)
    return run.train(config).folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of 80 updates without controllers."""
    return make_run(tmp_path_factory.mktemp("plain") / "run", updates=80)


def hmpo_agm(*arguments):
    return hmpo.cli.main(["agm", *map(str, arguments)])


def test_replay_compares_equal_with_the_run_and_shows_the_counts(folder, capsys):
    assert hmpo_agm("replay", folder, "--compare") == 0
    assert "equal to the 18 decisions in the log" in capsys.readouterr().out
    assert hmpo_agm("replay", folder) == 0
    text = capsys.readouterr().out
    assert "decisions" in text and "lr_mult" in text and "stop" in text


def test_replay_under_other_settings_differs_and_says_where(folder, tmp_path, capsys):
    (tmp_path / "agm.toml").write_text('[agm]\nmode = "apply"\nadapter.gap_target = 1.0\n')
    arguments = ("--config", tmp_path / "agm.toml", "--compare")
    assert hmpo_agm("replay", folder, *arguments) == 1
    assert "differs at step" in capsys.readouterr().out


def test_replay_idempotent(folder, tmp_path):
    out = tmp_path / "decisions.jsonl"
    assert hmpo_agm("replay", folder, "--out", out) == 0
    first = out.read_bytes()
    assert hmpo_agm("replay", folder, "--out", out) == 0
    assert out.read_bytes() == first
    head, *lines = map(json.loads, first.splitlines())
    assert head["data"]["adapter"] == "hmpo" and head["name"] == "replay"
    assert [line["step"] for line in lines] == [d["step"] for d in read_run(
        folder / "telemetry.jsonl").decisions]  # fmt: skip


def test_prefix_and_suffix_with_the_state_between_are_the_whole(folder, tmp_path):
    whole, head, tail = (tmp_path / f"{name}.jsonl" for name in ("whole", "head", "tail"))
    state = tmp_path / "state.json"
    hmpo_agm("replay", folder, "--out", whole)
    hmpo_agm("replay", folder, "--out", head, "--until", 6, "--state-out", state)
    hmpo_agm("replay", folder, "--out", tail, "--state-in", state)
    lines = [path.read_text().splitlines()[1:] for path in (whole, head, tail)]
    assert lines[1] + lines[2] == lines[0] and lines[1] and lines[2]


@pytest.mark.parametrize("form", ["gz", "csv"])
def test_a_packed_log_and_a_csv_replay_the_same(folder, tmp_path, form):
    log = read_run(folder / "telemetry.jsonl")
    if form == "gz":
        path = tmp_path / "telemetry.jsonl.gz"
        path.write_bytes(gzip.compress((folder / "telemetry.jsonl").read_bytes()))
    else:
        path = tmp_path / "telemetry.csv"
        records = [log.run, *log.evals, *log.steps, *log.decisions]
        path.write_text(to_csv(records))
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    source = load_source(tmp_path)
    assert source.path == path
    assert replay_file(source) == replay_file(load_source(folder))


def test_a_run_without_controllers_is_replayed_for_the_first_time(plain, capsys):
    assert hmpo_agm("summarize", plain) == 0
    assert "no decisions in the log" in capsys.readouterr().out
    with pytest.raises(TelemetryError, match="holds no decisions"):
        from hmpo.lab.replay import first_difference

        first_difference(load_source(plain), [])
    assert hmpo_agm("replay", plain, "--compare") == 2


def test_logs_of_others_replay_and_say_what_is_approximate(tmp_path, capsys):
    rows = [
        {"training/global_step": i, "critic/score/mean": 0.4, "actor/ppo_kl": 0.002}
        for i in range(30)
    ]
    path = tmp_path / "verl.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    assert hmpo_agm("replay", path, "--out", out) == 0
    text = capsys.readouterr().out
    assert "verl, 30 of 30 gaps approximate" in text and "missing fields" in text
    assert json.loads(out.read_text().splitlines()[0])["data"]["approximate"] == 30
    regimes = {json.loads(line).get("decision/regime") for line in out.read_text().splitlines()}
    assert "stable_learning" in regimes
    assert len(read_log(path).steps) == len(in_order(read_log(path)))


def test_malformed_lines_reported(plain, tmp_path, capsys):
    lines = (plain / "telemetry.jsonl").read_text().splitlines()
    more = [json.dumps(json.loads(lines[-2]) | {"step": 200 + i}) for i in range(60)]
    path = tmp_path / "telemetry.jsonl"
    path.write_text("\n".join([*lines[:40], '{"type": "st', *lines[40:], *more]) + "\n")
    assert hmpo_agm("replay", path) == 0
    assert "malformed: line 41" in capsys.readouterr().out
    assert hmpo_agm("replay", path, "--strict") == 2


def test_sweep_parameters_take_effect(plain, tmp_path, capsys):
    out = tmp_path / "sweep.csv"
    grid = ("adapter.gap_target=1e-5,1.0", "regime.z_hi=3.0,4.0")
    assert hmpo_agm("sweep", plain, "--grid", *grid, "--out", out) == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [(r["adapter.gap_target"], r["regime.z_hi"]) for r in rows] == [
        ("1e-05", "3.0"), ("1e-05", "4.0"), ("1.0", "3.0"), ("1.0", "4.0")
    ]  # fmt: skip
    assert [int(row["learning_rate"]) > 0 for row in rows] == [True, True, False, False]
    both = out.read_text()
    again = ("--grid", grid[0], "--grid", grid[1], "--out", out)
    assert hmpo_agm("sweep", plain, *again) == 0
    assert out.read_text() == both, "every --grid holds"
    assert hmpo_agm("sweep", plain, "--grid", "adapter.gap_targt=1") == 2
    assert "did you mean gap_target" in capsys.readouterr().err
    for bad in ("adapter.gap_target", "adapter.gap_target=", "=3"):
        with pytest.raises(ConfigError, match=r"expected table\.key=value"):
            grid_of([bad])


def test_diff_finds_what_differs_and_nothing_where_nothing_does(folder, tmp_path, capsys):
    out = tmp_path / "decisions.jsonl"
    hmpo_agm("replay", folder, "--out", out)
    assert hmpo_agm("diff", folder, out) == 0
    lines = out.read_text().splitlines()
    changed = json.loads(lines[5]) | {"decision/lr_mult": 0.125}
    out.write_text("\n".join([*lines[:5], json.dumps(changed), *lines[6:-1]]) + "\n")
    capsys.readouterr()
    assert hmpo_agm("diff", folder, out) == 1
    text = capsys.readouterr().out
    assert f"step {changed['step']}: decision/lr_mult" in text and "was 0.125" in text
    assert "only in the first" in text and "2 decisions differ: decision/lr_mult 1" in text


@pytest.mark.parametrize("which", ["folder", "plain"])
def test_plot_is_a_png_and_the_same_each_time(which, request, tmp_path):
    path, images = request.getfixturevalue(which), []
    for name in ("a.png", "b.png"):
        assert hmpo_agm("plot", path, "--out", tmp_path / name) == 0
        images.append((tmp_path / name).read_bytes())
    assert images[0] == images[1] and images[0].startswith(b"\x89PNG") and len(images[0]) > 20_000


def test_states_and_settings_that_are_none_are_refused(folder, tmp_path):
    other = tmp_path / "other.json"
    other.write_text('{"a": 1}')
    with pytest.raises(CheckpointError, match="expected a state that --state-out wrote"):
        replay_file(load_source(folder), state_in=other)
    with pytest.raises(ConfigError, match=r"agm\.a: unknown"):
        load_settings(other)
    with pytest.raises(TelemetryError, match="no telemetry in it"):
        load_source(tmp_path)
    assert hmpo_agm("replay", folder, "--compare", "--until", 3) == 2


def test_summary_counts_states_and_their_length():
    def decision(step, **values):
        named = {f"decision/{name}": value for name, value in values.items()}
        return {"step": step, "applied": step == 1, **named}

    rows = dict(summarize_decisions([
        decision(0, regime="stable_learning", lr_mult=1.0, stop="continue_training"),
        decision(1, regime="stable_learning", lr_mult=0.5, stop="continue_training"),
        decision(2, regime="unstable", lr_mult=0.25, stop="plateau", insufficient_data="a,b"),
    ]))  # fmt: skip
    assert rows["decisions"] == "3" and rows["applied"] == "1"
    assert rows["regime"].startswith("stable_learning 2, unstable 1; 1.5 records in a row")
    assert rows["lr_mult"] == "min 0.25, mean 0.5833, max 1, last 0.25"
    assert (
        rows["stop"] == "plateau at step 2, last at 2" and rows["missing fields"] == "a (1), b (1)"
    )
