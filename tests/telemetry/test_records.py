import importlib.util
import json
import math
import operator
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hmpo.config import RunConfig, to_dict
from hmpo.errors import TelemetryError
from hmpo.telemetry import records
from hmpo.telemetry.fields import FIELDS
from hmpo.telemetry.lookup import lookup, with_trl_names

ROOT = Path(__file__).resolve().parents[2]
NAME = operator.attrgetter("name")


def run_record(**changes):
    values = {"name": "demo", "config": to_dict(RunConfig()), "algo": "power_mean", "seed": 0}
    values |= {"code_version": "0.1.0", "group_size": 4, "world_size": 1}
    values |= {"base": {"lr": 1e-4, "eps": 0.4, "batch": 64, "p": -1.0}}
    return records.run_record(**(values | changes))


def valid_value(row):
    return {"int": 1, "float": 0.5, "bool": True, "str": "x", "floats": [0.5], "object": {}}.get(
        row.kind, "any"
    )


def test_table_has_every_name_once_and_a_definition_for_each():
    names = [row.name for row in FIELDS]
    assert len(names) == len(set(names))
    assert all(row.definition.endswith(".") and row.records for row in FIELDS)
    trl = [row.trl for row in FIELDS if row.trl]
    assert len(trl) == len(set(trl))


def test_trl_names_are_those_that_trl_logs():
    ours = ["reward/mean", "reward/std", "adv/zero_frac", "lr", "len/mean", "len/max"]
    ours += ["len/trunc_frac", "clip/frac_neg", "clip/frac_pos", "clip/frac", "kl/ref"]
    theirs = ["reward", "reward_std", "frac_reward_zero_std", "learning_rate"]
    theirs += ["completions/mean_length", "completions/max_length", "completions/clipped_ratio"]
    theirs += ["clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "kl"]
    both = with_trl_names({name: float(i) for i, name in enumerate(ours)})
    assert [both[name] for name in theirs] == [both[name] for name in ours]
    assert len(both) == 2 * len(ours)


def test_trl_name_of_a_reward_function_carries_the_functions_name():
    assert with_trl_names({"reward/sort_ok/mean": 0.5}) == {
        "reward/sort_ok/mean": 0.5,
        "rewards/sort_ok/mean": 0.5,
    }


def test_step_record_carries_both_names_and_the_tables_types():
    record = records.step_record(
        "r", {"step": 3.0, "update_skipped": 0.0, "lr": 1, "loss": None, "n_seq": np.int64(8)}
    )
    assert record == {
        "type": "step",
        "run_id": "r",
        "step": 3,
        "update_skipped": False,
        "lr": 1.0,
        "learning_rate": 1.0,
        "n_seq": 8,
    }
    assert type(record["step"]) is int and type(record["lr"]) is float


def test_float32_rounding_of_a_fraction_is_accepted_and_a_real_excess_refused():
    records.step_record("r", {"step": 1, "clip/frac": 1.0000001})
    with pytest.raises(TelemetryError, match=r"clip/frac: got 1.1, expected a number in \[0, 1\]"):
        records.step_record("r", {"step": 1, "clip/frac": 1.1})


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"step": 1, "clip/fraq": 0.1}, "clip/fraq: not allowed here"),
        ({"step": 1, "time/train_s": 0.1}, "time/train_s in time records"),
        ({"loss": 0.1}, "step: missing, expected an integer >= 0"),
        ({"step": 1.5}, "step: got 1.5, expected an integer >= 0"),
        ({"step": -1}, "step: got -1"),
        ({"step": True}, "step: got True"),
        ({"step": math.nan}, "step: got nan"),
        ({"step": 1, "loss": "low"}, "loss: got 'low', expected a number"),
        ({"step": 1, "kl/k3": -0.1}, "kl/k3: got -0.1, expected a number >= 0"),
        ({"step": 1, "update_skipped": 2.0}, "update_skipped: got 2.0, expected true or false"),
        ({"step": 1, "qk/max_by_layer": 3.0}, "expected a list of numbers"),
    ],
)
def test_step_record_names_field_value_and_expectation(metrics, message):
    with pytest.raises(TelemetryError, match=r"step record: .*") as caught:
        records.step_record("r", metrics)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lenient_validation_ignores_unknown_names_but_not_wrong_values():
    record = {"type": "step", "run_id": "r", "step": 1, "future/metric": "x"}
    records.validate(record, strict=False)
    with pytest.raises(TelemetryError, match="kl/k3"):
        records.validate({**record, "kl/k3": -1.0}, strict=False)


@pytest.mark.parametrize("row", [row for row in FIELDS if row.pattern is None], ids=NAME)
def test_every_field_accepts_its_type_and_refuses_another(row):
    assert records.fits(row, valid_value(row))
    assert not records.fits(row, None)
    if row.low is not None:
        assert not records.fits(row, row.low - 1)
    if row.high is not None:
        assert not records.fits(row, row.high + 1)


def test_nan_and_infinities_survive_a_strict_json_round_trip():
    record = records.step_record(
        "r",
        {"step": 1, "loss": math.nan, "grad_norm": math.inf, "ratio/d_min": -math.inf},
    )
    line = records.encode(record)
    plain = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (plain["loss"], plain["grad_norm"], plain["ratio/d_min"]) == ("nan", "inf", "-inf")
    back = records.decode(line)
    assert math.isnan(back["loss"]) and back["ratio/d_min"] == -math.inf
    records.validate(back)
    assert records.encode(back) == line


def test_text_fields_that_say_nan_stay_texts():
    record = records.decode('{"type":"end","run_id":"nan","step":1,"status":"inf"}')
    assert record["run_id"] == "nan" and record["status"] == "inf"
    assert records.decode('{"completion":"nan"}', non_finite=False) == {"completion": "nan"}


def test_encoding_does_not_depend_on_the_order_of_keys():
    values = {"step": 1, "loss": 0.1, "kl/k3": 0.2, "lr": 1e-4}
    backwards = dict(reversed(values.items()))
    one, two = (records.encode(records.step_record("r", v)) for v in (values, backwards))
    assert one == two and one.isascii()


@pytest.mark.parametrize("line", ["[1]", "{", "3", '{"loss": NaN}', "[" * 100_000, "\ud800"])
def test_decode_refuses_what_is_not_a_strict_json_object(line):
    with pytest.raises(TelemetryError, match="not a JSON record"):
        records.decode(line)


def test_encode_refuses_what_json_cannot_hold():
    with pytest.raises(TelemetryError, match="cannot be written as JSON"):
        records.encode({"data": object()})


def test_run_id_is_a_function_of_name_and_config_but_not_of_the_folder():
    config = to_dict(RunConfig())
    first = run_record()
    assert first["run_id"] == f"demo-{first['config_hash'][:12]}" and first["segment"] == 0
    assert run_record(config={**config, "out": "elsewhere"}) == first
    assert run_record(config={**config, "seed": 1})["config_hash"] != first["config_hash"]


def test_every_builder_gives_a_valid_record():
    built = [
        run_record(),
        records.eval_record("r", 0, {"eval/sampled": 0.5, "eval/name": "before"}),
        records.event_record("r", 1, "checkpoint_saved", {"bytes": 10}),
        records.end_record("r", 9, "completed"),
        records.segment_record("r", 1, started_s=1.5, pid=4, resumed_from_step=8),
        records.time_record("r", 1, {"time/train_s": 0.5, "tokens_per_s": 100}),
        records.decision_record(
            "r",
            1,
            {"decision/regime": "stable", "decision/p_target": -0.5},
            source="agm",
            mode="apply",
            applied=True,
            reason="gap small",
            inputs={"gap": 0.1},
        ),
    ]
    for record in built:
        records.validate(records.decode(records.encode(record)))
    assert {record["type"] for record in built} | {"step"} == set(records.RECORD_TYPES)


def test_event_names_and_other_majors_are_checked():
    with pytest.raises(TelemetryError, match="name: got 'Hello World'"):
        records.event_record("r", 1, "Hello World", {})
    with pytest.raises(TelemetryError, match=r"expected hmpo\.telemetry/1"):
        records.validate({**run_record(), "schema": "hmpo.telemetry/2"})
    records.validate({**run_record(), "schema": "hmpo.telemetry/1.3"})


def test_split_timing_keeps_the_clock_out_of_step_records():
    step, clock = records.split_timing({"loss": 1.0, "time/train_s": 2.0, "tokens_per_s": 3.0})
    assert step == {"loss": 1.0}
    assert clock == {"time/train_s": 2.0, "tokens_per_s": 3.0}


def test_schema_has_every_field_with_its_bounds_and_every_record_type():
    schema = records.schema_json()
    json.dumps(schema, allow_nan=False)
    assert set(schema["$defs"]) == set(records.RECORD_TYPES)
    for row in FIELDS:
        for kind in row.records:
            part = schema["$defs"][kind]
            assert row.name in {**part["properties"], **part.get("patternProperties", {})} or (
                row.pattern is not None
            )
    step = schema["$defs"]["step"]
    assert step["properties"]["clip/frac"]["anyOf"][0]["maximum"] == pytest.approx(1.0, abs=1e-5)
    assert step["required"] == ["type", "run_id", "step"]
    assert "clip_ratio/region_mean" in step["properties"]
    assert set(schema["$defs"]["run"]["required"]) == {"type", *records.required_names("run")}


def test_metrics_page_is_up_to_date():
    path = ROOT / "scripts" / "make_metrics_page.py"
    spec = importlib.util.spec_from_file_location("make_metrics_page", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.PAGE.read_text(encoding="utf-8")
    assert page == module.page(), "run: python scripts/make_metrics_page.py"
    assert all(f"`{row.name}`" in page for row in FIELDS)


def test_importing_telemetry_costs_no_torch_numpy_or_matplotlib():
    code = "import sys, hmpo.telemetry.sinks, hmpo.telemetry.ingest; "
    code += "assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_lookup_knows_families_and_nothing_else():
    assert lookup("reward/exact/mean").name == "reward/<function>/mean"
    assert lookup("reward/mean").name == "reward/mean"
    assert lookup("reward//mean") is None and lookup("reward/exact/max") is None


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_schema_rejects_nan(constant):
    line = f'{{"type":"step","run_id":"r","step":0,"loss":{constant}}}'
    with pytest.raises(TelemetryError, match="is not JSON; write it as a text"):
        records.decode(line)
