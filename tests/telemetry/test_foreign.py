"""Logs of others under our names: what is read, what is estimated, what is counted as malformed."""

import gzip
import json
import math

import pytest

from hmpo.errors import ConfigError, TelemetryError
from hmpo.telemetry.csvlog import csv_header, to_csv
from hmpo.telemetry.fields import FIELDS
from hmpo.telemetry.foreign import read_log
from hmpo.telemetry.ingest import read_run
from hmpo.telemetry.records import encode, eval_record, run_record, step_record

LEGACY = {"loss": 0.1, "mean_reward": 0.5, "mean_advantage": 0.0, "mean_importance_ratio": 1.01}
LEGACY |= {"clipped_fraction": 0.2, "mean_response_length": 11.0, "power_parameter": -1.0}
AHM = {"agm_arithmetic": 1.02, "agm_harmonic": 0.99, "agm_geometric": 1.004}
PAYLOAD = {
    "step": 7,
    "agm": {"arithmetic_history": [1.5, 1.02], "harmonic_history": [0.99]},
    "rl": {"td": {"mean": 1.0, "var": 0.5}, "reward": {"train_mean": 0.25, "eval_mean": 0.75}},
    "muon_clip": {"active": True, "clip_rate": 0.125},
}
FLAT = {
    "global_step": 7,
    "arithmetic_history": [1.02],
    "harmonic_history": [0.99],
    "train_reward_mean": 0.25,
    "eval_reward": 0.75,
    "muon_clip_rate": 0.125,
}
TRL = {"step": 5, "loss": 0.0, "grad_norm": 0.3, "learning_rate": 1e-6, "reward": 0.4}
TRL |= {"reward_std": 0.2, "frac_reward_zero_std": 0.25, "kl": 0.01, "entropy": 1.5}
TRL |= {"completions/mean_length": 90.0, "clip_ratio/region_mean": 0.02}
TRL |= {"rewards/exact/mean": 0.4, "epoch": 0.1}
VERL = {"critic/score/mean": 0.4, "actor/ppo_kl": 0.002, "actor/pg_clipfrac": 0.01}
VERL |= {"actor/grad_norm": 0.3, "actor/entropy": 1.5, "response_length/mean": 90.0}
VERL |= {"val-core/gsm8k/reward/mean@1": 0.5, "perf/mfu/actor": 0.3}


def lines(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def test_legacy_records_are_numbered_by_line_and_their_gap_is_estimated(tmp_path):
    log = read_log(lines(tmp_path / "a.jsonl", [LEGACY, LEGACY | AHM]))
    assert log.adapter == "hmpo-legacy" and log.notes and log.run is None
    assert [r["step"] for r in log.steps] == [r["rollout"] for r in log.steps] == [0, 1]
    first, second = log.steps
    assert "ratio/log_gap_mean" not in first and "approx" not in first
    assert second["ratio/log_gap_mean"] == pytest.approx(math.log(1.02 / 0.99), rel=1e-12)
    assert second["approx"] is True and second["reward/mean"] == 0.5
    assert second["ratio/p"] == -1 and second["nonfinite"] == 0


@pytest.mark.parametrize("payload", [PAYLOAD, FLAT])
def test_agm_payload_gives_the_gap_of_the_last_elements_and_an_evaluation(tmp_path, payload):
    log = read_log(lines(tmp_path / "a.jsonl", [payload]))
    assert log.adapter == "agm-payload"
    assert log.steps[0]["ratio/log_gap_mean"] == pytest.approx(math.log(1.02 / 0.99), rel=1e-12)
    assert (log.steps[0]["reward/mean"], log.steps[0]["qk/clip_rate"]) == (0.25, 0.125)
    assert log.evals[0]["eval/mean"] == 0.75 and log.evals[0]["step"] == 7


def test_payload_with_empty_histories_or_a_mean_of_zero_has_no_gap(tmp_path):
    empty = PAYLOAD | {"agm": {"arithmetic_history": [], "harmonic_history": []}}
    zero = PAYLOAD | {"step": 8, "agm": {"arithmetic_history": [1.0], "harmonic_history": [0.0]}}
    log = read_log(lines(tmp_path / "a.jsonl", [empty, zero]), adapter="agm-payload")
    assert len(log.steps) == 2
    assert not any("ratio/log_gap_mean" in record for record in log.steps)


@pytest.mark.parametrize("form", ["jsonl", "trainer_state", "prefixed"])
def test_trl_has_our_names_and_no_gap_made_of_the_kl_to_the_reference(tmp_path, form):
    if form == "trainer_state":
        path = tmp_path / "trainer_state.json"
        path.write_text(json.dumps({"log_history": [TRL, {"step": 5, "eval_reward": 0.5}]}))
    else:
        prefix = "train/" if form == "prefixed" else ""
        row = {prefix + ("global_step" if k == "step" else k): v for k, v in TRL.items()}
        path = lines(tmp_path / "a.jsonl", [row if prefix else TRL])
    log = read_log(path)
    record = log.steps[0]
    assert log.adapter == "trl" and "no log gap" in log.notes[0]
    assert (record["step"], record["lr"], record["reward/mean"]) == (5, 1e-6, 0.4)
    assert (record["adv/zero_frac"], record["kl/ref"], record["len/mean"]) == (0.25, 0.01, 90.0)
    assert record["reward/exact/mean"] == 0.4
    assert "ratio/log_gap_mean" not in record and "approx" not in record
    assert len(log.evals) == (form == "trainer_state")


@pytest.mark.parametrize("nested", [False, True])
def test_verl_has_our_names_and_twice_its_kl_as_the_gap(tmp_path, nested):
    row = {"step": 3, "data": VERL} if nested else VERL | {"training/global_step": 3}
    log = read_log(lines(tmp_path / "a.jsonl", [row]))
    record = log.steps[0]
    assert log.adapter == "verl" and record["approx"] is True and record["step"] == 3
    assert record["ratio/log_gap_mean"] == pytest.approx(0.004)
    assert (record["reward/mean"], record["clip/frac"], record["grad_norm"]) == (0.4, 0.01, 0.3)
    assert log.evals[0]["eval/mean"] == 0.5


def test_verl_under_our_loss_has_the_exact_gap(tmp_path):
    row = VERL | {"training/global_step": 3, "actor/ratio/log_gap_mean": 0.0031}
    record = read_log(lines(tmp_path / "a.jsonl", [row])).steps[0]
    assert record["ratio/log_gap_mean"] == 0.0031 and "approx" not in record


def test_malformed_lines_are_named_and_too_many_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    good = [json.dumps(TRL | {"step": i}) for i in range(150)]
    path.write_text("\n".join([*good[:100], '{"reward": ', *good[100:]]) + "\n")
    log = read_log(path)
    assert [(p.line, p.kind) for p in log.problems] == [(101, "malformed")]
    assert len(log.steps) == 150
    with pytest.raises(TelemetryError, match="line 101"):
        read_log(path, strict=True)
    path.write_text("\n".join([*good[:50], '{"reward": ', json.dumps({"reward": 1})]) + "\n")
    with pytest.raises(TelemetryError, match=r"2 of 52 lines .* line 51"):
        read_log(path)


def test_a_step_that_comes_again_counts_in_its_last_form(tmp_path):
    rows = [TRL | {"step": 1}, TRL | {"step": 2}, TRL | {"step": 2, "reward": 0.9}]
    log = read_log(lines(tmp_path / "a.jsonl", rows))
    assert [r["reward/mean"] for r in log.steps] == [0.4, 0.9] and log.count("duplicate") == 1


def test_unknown_logs_and_adapters_are_refused_with_the_choices(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"step": 1, "foo": 2}])
    with pytest.raises(TelemetryError, match="--adapter, one of hmpo, hmpo-legacy"):
        read_log(path)
    with pytest.raises(ConfigError, match="got 'rllib', expected one of hmpo"):
        read_log(path, adapter="rllib")


@pytest.fixture
def ours():
    base = {"lr": 1e-4, "eps": 0.4, "batch": 64, "p": -1.0}
    head = run_record(
        name="r", config={}, algo="power_mean", seed=0, code_version="0", group_size=4, base=base
    )
    metrics = {"loss": math.nan, "update_skipped": True, "reward/own, odd/mean": 0.5}
    metrics |= {"qk/max_by_layer": [1.5, math.inf], "n_tokens": 12, "lr": 1e-4}
    return [
        head,
        eval_record(head["run_id"], 0, {"eval/name": "before", "eval/mean": 1 / 3}),
        step_record(head["run_id"], {"step": 0, **metrics}),
        step_record(head["run_id"], {"step": 1, "loss": 0.1, "update_skipped": False}),
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_csv_round_trip(tmp_path, ours, packed):
    path = tmp_path / ("log.csv.gz" if packed else "log.csv")
    data = to_csv(ours).encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    log = read_run(path, strict=True)
    assert repr(read_log(path).steps) == repr(log.steps)
    names = csv_header(ours)
    expected = [{k: v for k, v in record.items() if k in names} for record in ours]
    found = [log.run, *log.evals, *log.steps]
    assert [encode(record) for record in found] == [encode(record) for record in expected]


def test_the_csv_header_has_the_order_of_the_table(ours):
    header = csv_header(ours)
    order = [row.name for row in FIELDS]
    assert header.index("type") == 0 and "reward/own, odd/mean" in header
    plain = [name for name in header if name in order]
    assert plain == [name for name in order if name in plain] and "learning_rate" not in header


def test_csv_of_others_and_faulty_rows(tmp_path):
    path = tmp_path / "trl.csv"
    rows = [f"{i},{i / 10},1e-6,12.0," for i in range(120)]
    path.write_text("\n".join(["step,reward,learning_rate,completions/mean_length,note", *rows]))
    log = read_log(path)
    assert len(log.steps) == 120 and log.steps[3]["reward/mean"] == 0.3
    rows[7] = "7,0.7"
    path.write_text("\n".join(["step,reward,learning_rate,completions/mean_length,note", *rows]))
    log = read_log(path)
    assert [(p.line, p.message) for p in log.problems] == [
        (9, "2 cells, expected 5 as in the header")
    ]
