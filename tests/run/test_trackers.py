"""What trackers get of a run: numbers, events and the clock, under the project and name set."""

import sys
import types

import pytest

from hmpo.config.identity import config_hash
from hmpo.config.reading import run_config
from hmpo.errors import ConfigError
from hmpo.run import loop as run
from hmpo.telemetry.records import config_hash as log_hash
from tests.faults.micro import micro_config, micro_policy, records


@pytest.fixture
def tracked(monkeypatch):
    """Calls of a package in the form of W&B."""
    calls = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **told: calls.append(("init", told)) or object()
    fake.log = lambda values, step: calls.append(("log", values))
    fake.finish = lambda: calls.append(("finish", None))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return calls


def test_events_and_timing_reach_the_tracker_under_its_project_and_name(tmp_path, tracked):
    config = micro_config(
        micro_policy(tmp_path / "policy"), tmp_path, updates=3, sinks=["wandb"],
        tracker={"project": "digits", "name": "first try"}, optimizer__lr=1e37,
        trainer__qk_clip=False, trainer__max_nonfinite=9,
    )  # fmt: skip
    folder = run.train(config).folder
    told = tracked[0][1]
    assert (told["project"], told["name"]) == ("digits", "first try")
    assert told["id"] == records(folder, "step")[0]["run_id"]
    logged = [values for kind, values in tracked if kind == "log"]
    names = {name for values in logged for name in values}
    assert {"loss", "eval/sampled", "time/step_s", "tokens_per_s"} <= names
    events = records(folder, "event")
    assert events, "nothing is finite at this learning rate"
    for name in {event["name"] for event in events}:
        counts = [v[f"event/{name}"] for v in logged if f"event/{name}" in v]
        assert counts == [1.0 + i for i in range(sum(e["name"] == name for e in events))]
    assert tracked[-1] == ("finish", None)


def test_how_a_tracker_calls_a_run_is_no_part_of_what_the_run_is():
    named = {"sinks": ["wandb"], "tracker": {"project": "other", "name": "x"}}
    assert config_hash(run_config({})) == config_hash(run_config(named))
    assert log_hash({"a": 1}) == log_hash({"a": 1, "tracker": {"project": "p"}})


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".", "x" * 101])
def test_a_name_that_is_no_name_is_refused(name):
    with pytest.raises(ConfigError, match=r"tracker\.name"):
        run_config({"sinks": ["tensorboard"], "tracker": {"name": name}})
