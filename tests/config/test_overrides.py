"""Settings from the command line: all of them hold, in any order; what is absurd is refused."""

import dataclasses
import itertools
import os
from pathlib import Path

import pytest

from hmpo import members
from hmpo.config import (
    ControlConfig,
    ExponentConfig,
    MismatchConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PowerMeanConfig,
    RunConfig,
    TrainerConfig,
)
from hmpo.config.formats import KINDS
from hmpo.config.hints import NOT_MEMBERS, OTHER_NAMES, leaves
from hmpo.config.reading import load_run_config, run_config
from hmpo.errors import ConfigError, byte_size


@pytest.mark.parametrize(
    "items",
    list(
        itertools.permutations(
            ["objective.member=gspo", "objective.p=0.3", "objective.clip_low=0.01"]
        )
    ),
)
def test_a_member_comes_first_whatever_the_order(items) -> None:
    for data in ({}, {"objective": {"member": "hmpo", "clip_high": 0.3}}):
        expected = dataclasses.replace(members.gspo(), p=0.3, clip_low=0.01)
        assert run_config(data, items).objective == expected


def test_a_whole_table_comes_before_what_is_inside_it() -> None:
    items = [
        "task.options.path=a",
        "task={name='jsonl', shots=1}",
        "task.options={prompt_field='q'}",
    ]
    for order in itertools.permutations(items):
        task = run_config({}, order).task
        assert (task.name, task.shots) == ("jsonl", 1)
        assert task.options == {"prompt_field": "q", "path": "a"}


def test_of_one_key_given_twice_the_later_holds() -> None:
    assert run_config({}, ["updates=3", "updates=4"]).updates == 4
    twice = ["objective.member=gspo", "objective.clip_low=0.1", "objective.member=hmpo"]
    assert run_config({}, twice).objective == dataclasses.replace(members.hmpo(), clip_low=0.1)


@pytest.mark.parametrize(
    "item",
    [
        "x=" + "[" * 3000,
        "task.options.x=" + "[" * 200 + "]" * 200,
        ".".join(["a"] * 2000) + "=1",
        "task.options." + ".".join(["a"] * 40) + "=1",
        "name=" + "a" * 5000,
        'updates=3\nname="two"',
    ],
    ids=["open", "closed", "dotted", "options", "long", "two values"],
)
def test_what_is_nested_or_long_beyond_reason_is_one_short_line(item) -> None:
    with pytest.raises(ConfigError) as caught:
        run_config({}, [item])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 6000


@pytest.mark.parametrize("text", [".".join(["a"] * 2000) + " = 1", "[" + ".".join("a" * 500) + "]"])
def test_a_file_of_deep_tables_is_one_line(text, tmp_path: Path) -> None:
    path = tmp_path / "deep.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="nested too deeply"):
        load_run_config(path)


NUMBERS = [
    (cls, field.name, field.default)
    for cls in (ObjectiveConfig, ExponentConfig, MismatchConfig, TrainerConfig, OptimizerConfig)
    for field in dataclasses.fields(cls)
    if "float" in str(field.type) and "Literal" not in str(field.type)
]


@pytest.mark.parametrize(("cls", "name", "default"), NUMBERS, ids=lambda v: str(v)[:30])
@pytest.mark.parametrize("value", [1e308, -1e308, float("nan"), float("inf")])
def test_no_number_is_so_large_that_arithmetic_overflows(cls, name, default, value) -> None:
    value = (value, value) if isinstance(default, tuple) else value
    with pytest.raises(ConfigError, match=rf"^{name}: got "):
        cls(**{name: value})


@pytest.mark.parametrize(
    "data",
    [
        {"objective": {"p": 1e308}},
        {"objective": {"clip_high": 1e308}},
        {"objective": {"clip_high": 1e5, "dual_clip": 3.0}},
        {"policy": {"lora_alpha": 1e308}},
        {"rewards": {"functions": ["a:b"], "weights": [1e308]}},
        {"eval": {"success": 1e308}},
        {"agm": {"adapter": {"p_high": 1e308}}},
        {"agm": {"regime": {"z_hi": 1e308}}},
        {"trainer": {"temperature": 1e-300}},
        {"trainer": {"reward_timeout": 1e300}},
    ],
)
def test_an_absurd_number_in_a_file_is_one_line(data) -> None:
    with pytest.raises(ConfigError, match=r"got .*, expected"):
        run_config(data)


def test_what_switches_something_off_by_a_large_number_still_does() -> None:
    loose = ObjectiveConfig(p=1e6, clip_low=1e6, clip_high=1e6)
    assert loose.log_bounds == (-1e6, 1e6)
    assert PowerMeanConfig(max_qk_score=1e30, max_grad_norm=1e30).max_qk_score == 1e30
    assert ControlConfig().mode == "off"


@pytest.mark.parametrize(
    ("data", "meant"),
    [
        ({"trainer": {"learning_rate": 1}}, "optimizer.lr"),
        ({"learning_rate": 1}, "optimizer.lr"),
        ({"trainer": {"lr": 1}}, "optimizer.lr"),
        ({"trainer": {"betas": [0.9, 0.9]}}, "optimizer.betas"),
        ({"optimizer": {"group_size": 4}}, "trainer.group_size"),
        ({"p": 1}, "objective.p"),
        ({"trainer": {"num_generations": 4}}, "trainer.group_size"),
        ({"task": {"dataset": "x"}}, "task.options.dataset"),
        ({"model": "x"}, "policy.path"),
        ({"objective": {"cliplow": 1}}, "clip_low"),
        ({"trainer": {"Learning-Rate": 1}}, "optimizer.lr"),
    ],
)
def test_a_setting_of_another_table_or_trainer_is_named(data, meant) -> None:
    with pytest.raises(ConfigError, match=rf"unknown; did you mean {meant}\b"):
        run_config(data)


def test_every_name_that_a_hint_gives_exists() -> None:
    options = {
        f"task.options.{name}" for name in ("train", "held_out", "dataset", "max_prompt_length")
    }
    known = {*leaves(RunConfig), *options, "objective.member"}
    assert set(OTHER_NAMES.values()) <= known


@pytest.mark.parametrize("name", NOT_MEMBERS)
def test_a_method_that_is_no_member_is_not_taken_for_one_that_is_spelled_like_it(name) -> None:
    with pytest.raises(ConfigError, match="not a member, ") as caught:
        run_config({"objective": {"member": name}})
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("begin", [begin for begin in KINDS if len(begin) > 2])
def test_a_file_of_another_format_is_named(begin: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(begin + b"\0" * 50)
    with pytest.raises(ConfigError) as caught:
        load_run_config(path)
    assert KINDS[begin] in str(caught.value) and "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbfupdates = 7\n")
    assert load_run_config(path).updates == 7


def test_bytes_are_told_as_they_are_read() -> None:
    sizes = (0, 9_999, 10_000, 1_500_000, 14_900_000_000, 2 * 10**12)
    told = ["0 bytes", "9999 bytes", "10.0 kB", "1.5 MB", "14.9 GB", "2.0 TB"]
    assert [byte_size(size) for size in sizes] == told


def test_what_is_no_regular_file_or_far_too_large_is_never_read(tmp_path: Path) -> None:
    """A pipe would wait for ever, and a device never end."""
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "link.toml").symlink_to("/dev/zero")
    with (tmp_path / "large.toml").open("wb") as file:
        file.truncate(10**12)
    for name, words in (("pipe", "regular"), ("link", "regular"), ("large", "larger than 16 MB")):
        with pytest.raises(ConfigError, match=words):
            load_run_config(tmp_path / f"{name}.toml")
