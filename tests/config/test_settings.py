"""Configurations: read strictly, round trips, hashed by what decides numbers, fuzzed."""

import contextlib
import dataclasses
import datetime
import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmpo import members
from hmpo.config import GSPOConfig, PowerMeanConfig, RunConfig, to_dict
from hmpo.config.identity import changed_settings, config_hash
from hmpo.config.reading import from_dict, load_run_config, run_config
from hmpo.errors import ConfigError, HmpoError
from hmpo.run.build import trainer_config

EXAMPLES = sorted(
    path
    for path in (Path(__file__).parents[2] / "examples").glob("*.toml")
    if path.name not in ("suite.toml", "protocol.toml")  # no runs; tests/lab/suite reads them
)


def refused(match: str, data, overrides=()) -> str:
    with pytest.raises(ConfigError, match=match) as caught:
        run_config(data, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_those_of_the_dataclasses() -> None:
    assert run_config({}) == RunConfig()


def test_overrides_set_nested_values_and_leave_the_given_data_alone() -> None:
    data = {"task": {"options": {"path": "a"}}, "trainer": {"group_size": 8}}
    before = json.dumps(data)
    config = run_config(
        data,
        [
            "updates=7",
            "objective.p=-0.5",
            "task.options.path=b/c.jsonl",
            "optimizer.betas=[0.8, 0.9]",
            "sinks=['tensorboard']",
            "name = run-2",
        ],
    )
    assert json.dumps(data) == before
    assert (config.updates, config.objective.p, config.name) == (7, -0.5, "run-2")
    assert config.task.options == {"path": "b/c.jsonl"}
    assert config.optimizer.betas == (0.8, 0.9) and config.sinks == ("tensorboard",)
    assert config.trainer.group_size == 8


@pytest.mark.parametrize("name", members.BY_NAME)
def test_a_member_is_its_preset_and_further_keys_refine_it(name) -> None:
    assert run_config({"objective": {"member": name}}).objective == members.BY_NAME[name]()
    refined = run_config({"objective": {"member": name, "clip_low": 0.1}}).objective
    assert refined == dataclasses.replace(members.BY_NAME[name](), clip_low=0.1)
    assert run_config({}, [f"objective.member={name}"]).objective == members.BY_NAME[name]()


def test_a_member_set_on_the_command_line_starts_the_objective_afresh() -> None:
    """Else bounds in nats would become bounds in ratio space, or nothing would change at all."""
    data = {"objective": {"member": "hmpo", "clip_low": 0.3}}
    assert run_config(data, ["objective.member=gspo"]).objective == members.gspo()
    resolved = to_dict(RunConfig(objective=members.hmpo()))
    assert run_config(resolved, ["objective.member=grpo"]).objective == members.grpo()
    later = run_config(data, ["objective.member=gspo", "objective.clip_low=0.01"]).objective
    assert later == dataclasses.replace(members.gspo(), clip_low=0.01)


MISTAKES = [
    ({"objective": {"cliplow": 1}}, r"objective\.cliplow: unknown; did you mean clip_low\?"),
    ({"update": 1}, r"update: unknown; did you mean updates\?"),
    ({"zzz": 1}, r"zzz: unknown; one of name, out, seed"),
    ({"objective": {"member": "gpso"}}, r"objective\.member: got 'gpso'; did you mean gspo\?"),
    ({"objective": {"member": ["gspo"]}}, r"objective\.member: got \['gspo'\]; one of|did you"),
    ({"objective": {"member": 3}}, r"objective\.member: got 3"),
    ({"updates": "many"}, r"updates: got 'many', expected an integer"),
    ({"updates": 1.5}, r"updates: got 1\.5, expected an integer"),
    ({"updates": True}, r"updates: got True, expected an integer"),
    ({"updates": 0}, r"updates: got 0, expected an integer >= 1"),
    ({"updates": 2**70}, r"updates: .* expected an integer of 64 bits"),
    ({"optimizer": {"lr": float("nan")}}, r"optimizer\.lr: got nan, expected a finite number"),
    ({"optimizer": {"lr": float("inf")}}, r"optimizer\.lr: got inf"),
    ({"optimizer": {"lr": 10**400}}, r"optimizer\.lr: .* 64 bits"),
    ({"optimizer": {"lr": True}}, r"optimizer\.lr: got True, expected a number"),
    ({"optimizer": {"betas": [0.9]}}, r"optimizer\.betas: got \[0\.9\], expected a list of 2"),
    ({"optimizer": {"betas": [0.9, 2]}}, r"optimizer\.betas: got .*expected two numbers in \[0"),
    ({"optimizer": 3}, r"optimizer: got 3, expected a table"),
    ({"trainer": {"group_size": 1}}, r"trainer\.group_size: got 1, expected an integer >= 2"),
    ({"trainer": {"eos_token": "a"}}, r"trainer\.eos_token: got 'a', expected an integer or a li"),
    ({"trainer": {"minibatches": 999}}, r"trainer\.minibatches: got 999, expected at most the 64"),
    ({"sinks": ["mlflow"]}, r"sinks\[0\]: got 'mlflow', expected one of 'tensorboard'"),
    ({"algorithm": "ppo"}, r"algorithm: got 'ppo', expected one of 'power_mean', 'gspo'"),
    ({"name": "../up"}, r"name: got '\.\./up'"),
    ({"name": "con"}, r"name: got 'con'"),
    ({"out": "a\0b"}, r"out: got .* without NUL"),
    ({"out": "\ud800"}, r"out: got .* lone surrogates"),
    ({"task": {"options": {"day": datetime.date(2020, 1, 1)}}}, r"task\.options\.day: got dat"),
    ({"task": {"options": {"x": [1, float("inf")]}}}, r"task\.options\.x\[1\]: got inf"),
    ({"task": {"options": 3}}, r"task\.options: got 3, expected a table"),
    ({"objective": {"kl_coef": 0.1}}, r"reference: got 'none', expected \"start\" with"),
    ([], r"config: got list, expected a table of settings"),
    (None, r"config: got NoneType"),
]


@pytest.mark.parametrize(("data", "match"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_gives_one_line_that_names_the_field(data, match) -> None:
    message = refused(match, data)
    assert message == message.encode("ascii", "backslashreplace").decode()


@pytest.mark.parametrize(
    ("item", "match"),
    [
        ("updates", "--set: got 'updates', expected dotted.key=value"),
        ("=3", "--set: got '=3'"),
        ("updates.x=3", "^updates: got {'x': 3}, expected an integer$"),
        ("out.x.y=3", "out: got"),
        ("objective.p.q=1", "objective.p: got"),
        ("objective.member=hpmo", "did you mean hmpo"),
    ],
)
def test_a_wrong_override_gives_one_line(item, match) -> None:
    refused(match, {}, [item])


def test_an_override_inside_something_that_is_no_table_gives_one_line() -> None:
    for item in ("updates.x=3", "out.x.y=3", "objective.p.q=1"):
        table = item.split(".")[-2]
        given = {"updates": 3, "out": "x", "objective": {"p": 1.0}}
        first = table if table != "x" else "out"  # the first that is no table is the one named
        refused(rf"^--set: got '{item}', expected {first} to be a table", given, [item])


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """What other tests left to the collector does not end at the bottom of a deep recursion."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_files_that_are_no_configuration_give_one_line_with_their_name(tmp_path) -> None:
    cases = {
        "missing.toml": (None, "cannot be read .*give a TOML file"),
        "bad.toml": (b"updates = = 3", "bad.toml: not valid TOML: Invalid value"),
        "binary.toml": (b"\xff\xfe\x00", "not UTF-8 text"),
        "long.toml": (b"updates = " + b"9" * 5000, "Exceeds the limit"),
        "deep.toml": (b"x = " + b"[" * 5000 + b"]" * 5000, "nested too deeply"),
        "deep.json": (b"[" * 200_000, "nested too deeply"),
        "list.json": (b"[]", "config: got list, expected a table"),
        "half.json": (b'{"updates": 3', "not valid JSON: Expecting"),
        "nan.json": (b'{"optimizer": {"lr": NaN}}', "optimizer.lr: got nan"),
        "key.toml": (b"[optimiser]\nlr = 1", "optimiser: unknown; did you mean optimizer"),
    }
    for name, (content, match) in cases.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with uncollected(), pytest.raises(ConfigError, match=match) as caught:
            load_run_config(path)
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run_config(tmp_path)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_load_and_round_trip_through_json(path) -> None:
    config = load_run_config(path)
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_the_hash_covers_what_decides_the_numbers_and_nothing_else() -> None:
    base = RunConfig()
    same = {"name": "b", "out": "x", "sinks": ["tensorboard"], "samples": 0, "updates": 9}
    same |= {"relative_to": ["a"], "distributed": {"timeout": 9.0}}
    for key, value in (same | {"checkpoint": {"every": 3, "keep": 1}}).items():
        changed = run_config({key: value})
        assert config_hash(changed) == config_hash(base), key
        assert changed_settings(base, changed) == []
    other = {
        "seed": 1,
        "prompts_per_rollout": 8,
        "algorithm": "gspo",
        "reference": "start",
        "threads": 1,
        "device": "cpu",
        "policy": {"path": "x"},
        "task": {"options": {"a": 1}},
        "rewards": {"functions": ["a:b"]},
        "rollout": {"lag": 2},
        "objective": {"p": 0.5},
        "trainer": {"seed": 3},
        "mismatch": {"recompute": True},
        "advantages": {"estimator": "rloo"},
        "optimizer": {"lr": 0.5},
        "eval": {"every": 3},
        "agm": {"mode": "advise"},
        "batch": {"filter_groups": True},
    }
    kept = {"name", "out", "sinks", "samples", "updates", "checkpoint", "relative_to"}
    kept |= {"tracker", "distributed"}
    assert {*other, *kept} == {f.name for f in dataclasses.fields(RunConfig)}, "all are covered"
    hashes = {config_hash(run_config({key: value})) for key, value in other.items()}
    assert len(hashes | {config_hash(base)}) == len(other) + 1
    (line,) = changed_settings(base, run_config({"objective": {"p": 0.5}}))
    assert line == "objective.p was -1.0, got 0.5"
    assert changed_settings(base, run_config({"task": {"options": {"a": 1}}})) == [
        "task.options was {}, got None",
        "task.options.a was None, got 1",
    ]


def test_the_hash_covers_updates_where_the_learning_rate_depends_on_them() -> None:
    def hashed(**changes) -> str:
        return config_hash(run_config({"trainer": {"lr_schedule": "linear"}} | changes))

    assert hashed(updates=5) != hashed(updates=6)
    fixed = {"lr_schedule": "linear", "total_updates": 6}
    assert hashed(updates=5, trainer=fixed) == hashed(updates=6, trainer=fixed)


def test_the_trainer_gets_its_own_settings() -> None:
    config = run_config({"trainer": {"lr_schedule": "cosine", "group_size": 6}, "updates": 30})
    made = trainer_config(config, eos_token=(5,))
    assert type(made) is PowerMeanConfig and made.objective == config.objective
    assert (made.total_updates, made.group_size, made.eos_token) == (30, 6, (5,))
    gspo = run_config({"algorithm": "gspo", "objective": {"member": "gspo", "clip_low": 0.01}})
    made = trainer_config(gspo)
    assert type(made) is GSPOConfig
    assert (made.epsilon_low, made.epsilon_high) == (0.01, 4e-4)
    with pytest.raises(ConfigError, match='expected member = "gspo" with algorithm = "gspo"'):
        trainer_config(run_config({"algorithm": "gspo"}))
    made = trainer_config(run_config({"mismatch": {"correction": "mask", "high": 3.0}}))
    assert made.mismatch.high == 3.0


# --- fuzz ----------------------------------------------------------------------------------

DEFAULTS = json.dumps(to_dict(RunConfig()))
KEYS = sorted({f.name for f in dataclasses.fields(RunConfig)} | {"member", "lr", "p", "", "a.b"})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.integers(),
    st.integers(min_value=2**62, max_value=10**400),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["sort", "gspo", "start", "linear", "\0", "\ud800", "../x", "nul"]),
    st.dates(),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


@st.composite
def mutated(draw) -> dict:
    """A resolved configuration with up to four values or keys replaced, anywhere."""
    data = json.loads(DEFAULTS)
    for _ in range(draw(st.integers(1, 4))):
        table = data
        while True:
            key = draw(st.sampled_from(sorted(table))) if table else "x"
            deeper = isinstance(table.get(key), dict) and draw(st.booleans())
            if not deeper:
                break
            table = table[key]
        if draw(st.integers(0, 4)) == 0:
            key = draw(st.sampled_from(KEYS) | st.text(max_size=6))
        table[key] = draw(VALUES)
    return data


def try_out(data, overrides=()) -> RunConfig | None:
    """The configuration, used as a run would use it, or None where it was refused in one line."""
    try:
        config = run_config(data, overrides)
    except HmpoError as error:
        assert isinstance(error, ConfigError) and "\n" not in str(error)
        return None
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert len(config_hash(config)) == 64
    Path(config.out, config.name).is_file()
    return config


@settings(max_examples=300)
@given(data=mutated())
def test_no_mutated_configuration_gives_anything_but_a_config_error(data) -> None:
    config = try_out(data)
    if config is not None:
        try:
            trainer_config(config).lr_factor(0)
        except ConfigError as error:
            assert "\n" not in str(error)


@settings(max_examples=200)
@given(
    items=st.lists(
        st.text(max_size=12)
        | st.builds(
            "{}={}".format,
            st.sampled_from(["updates", "objective.p", "objective.member", "task.options.a", "x"]),
            st.text(max_size=8) | st.sampled_from(["nan", "1e999", "[1", "{a=1}", "1_0", "0x1f"]),
        ),
        max_size=3,
    )
)
def test_no_override_gives_anything_but_a_config_error(items) -> None:
    try_out({}, items)


@pytest.mark.parametrize("timeout", [0.0, 0.5, -1.0, 1e9])
def test_a_wait_of_no_length_or_of_weeks_is_refused(timeout: float) -> None:
    line = rf"distributed\.timeout: got {timeout}, expected seconds, from 1 to 604800"
    refused(line, {"distributed": {"timeout": timeout}})
