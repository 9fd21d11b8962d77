"""No setting is accepted and not read: another value changes a run, or one line refuses it."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hmpo.config import RunConfig, TaskConfig
from hmpo.errors import TaskError
from hmpo.tasks import BUILT_IN, make_task
from tests.config.walk_cases import ALSO, CASES, THE_SAME, UNREAD

ROOT = Path(__file__).parents[2]
REFUSED = {
    "rollout.engine": "rollout.engine: got 'http://127.0.0.1:1', where no server is ready",
    "rollout.python": "rollout.python: got 'nowhere/python', which is no program",
    "rollout.arguments": "rollout.arguments: got '--port', expected others than",
    "distributed.offload": "distributed.offload: got True, expected False without",
    "rollout.timeout": "rollout.timeout: got 0.0, expected a finite number > 0",
    "device": "device: got 'cuda:77', but there are ",
    "objective.name": "objective: got 'mine', expected member = \"gspo\"",
    "trainer.eos_token": "trainer.eos_token: got 7, expected nothing: the run decides it",
    "trainer.pad_token": "trainer.pad_token: got 3, expected nothing: the run decides it",
    "trainer.seed": "trainer.seed: got 3, expected nothing: the run decides it",
    "trainer.on_nonfinite": "update 1: not finite at site ",
    "policy.revision": "policy.revision: got 'v1', expected nothing",
    "policy.base_revision": "policy.base_revision: got 'v1', expected nothing",
    "policy.quantize": "policy.quantize: got '4bit' on cpu, expected 'none'",
    "trainer.max_nonfinite": "update 3: not finite at site ",
}
"""Settings whose other value ends the run, with the beginning of the line."""


def walked() -> dict[str, dict[str, list[str]]]:
    """What each setting changes, in a process without beartype, which would treble the time."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.config.walk"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def fields(cls: type, prefix: str = "") -> set[str]:
    """Dotted names of all settings, those of tables inside included."""
    found = set()
    for field in dataclasses.fields(cls):
        default = field.default_factory
        inner = type(default()) if default is not dataclasses.MISSING else None
        if inner is not None and dataclasses.is_dataclass(inner):
            found |= fields(inner, f"{prefix}{field.name}.")
        else:
            found.add(f"{prefix}{field.name}")
    return found


def test_the_walk_covers_every_setting_of_a_run() -> None:
    controllers = {name for name in fields(RunConfig) if name.startswith("agm.")}
    assert CASES.keys() == fields(RunConfig) - controllers, "tests/agm walks over the controllers'"
    assert UNREAD.keys() <= fields(RunConfig)


@pytest.mark.timeout(900)
def test_every_setting_changes_a_run_or_is_refused_by_name() -> None:
    found = walked()
    assert found.pop("nothing") == {"": []}, "two equal runs differ in nothing"
    unread = found.pop("unread")
    for way, settings in found.items():
        for path, changed in settings.items():
            if path in THE_SAME.get(way, {}):
                assert changed == [], f"{way} {path}: take it from the list"
                continue
            assert changed, f"{way} {path}: nothing reads it"
            if changed[0].startswith("refused: "):
                begin = f"refused: {REFUSED.get(path, f'{path}: got ')}"
                assert changed[0].startswith(begin), (way, path, changed[0])
    refused = {path for path, changed in found[""].items() if changed[0].startswith("refused: ")}
    assert found[""].keys() == CASES.keys() and refused == REFUSED.keys()
    assert found.keys() == {"", *ALSO}
    assert unread.keys() == UNREAD.keys()
    for path, changed in unread.items():
        assert changed[0].startswith(f"refused: {path}: got ") and "\n" not in changed[0]
        assert "base refused" not in changed[1], "the same run without it goes through"


# --- tasks -----------------------------------------------------------------------------------

OPTIONS = {
    "countdown": {"max_number": 9, "max_target": 30},
    "largest": {"low": 50, "high": 60},
    "carry": {"digits": 3, "partial": True},
    "jsonl": {"path": "b.jsonl", "heldout_path": "b.jsonl", "prompt_field": "b",
              "answer_field": "c"},
    "data": {"train": "b.jsonl", "held_out": "b.jsonl", "dataset": "saved", "subset": "x",
             "revision": "x", "columns": {"prompt": "b"}, "limit": 3, "shuffle": False,
             "max_prompt_length": 2, "overlong": "error", "overlap": "drop"},
}  # fmt: skip
"""Every option that `test_every_option_of_a_task` finds, with another value."""


@pytest.fixture
def here(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, first in (("a.jsonl", 0), ("b.jsonl", 500)):
        lines = [{"prompt": f"{i}>", "answer": "a", "b": f"b{i}", "c": "c"} for i in range(99)]
        shifted = [line | {"prompt": f"{first + i}>"} for i, line in enumerate(lines)]
        Path(name).write_text("".join(json.dumps(line) + "\n" for line in shifted))
    pytest.importorskip("datasets").Dataset.from_list(shifted).save_to_disk("saved")


def drawn(config: TaskConfig, seed: int = 0) -> list:
    """What a task asks, takes for right and gives to a half, how it ends; or why it is refused."""
    try:
        task = make_task(config, seed)
        if hasattr(task, "fit"):
            task.fit(lambda prompts: list(map(len, prompts)))
    except TaskError as error:
        return [str(error)]
    row = task.train(0).columns
    half = str(row["answer"])[: len(str(row["answer"])) // 2] if "answer" in row else ""
    return [
        task.reward(["p"], [half], [[]], **{"answer": [""], **{k: [row[k]] for k in row}}),
        *(task.train(i) for i in range(4)),
        *(task.heldout(i) for i in range(4)),
        task.stop,
        task.max_new_tokens,
    ]


def plain(name: str) -> TaskConfig:
    named = {"jsonl": {"path": "a.jsonl"}, "data": {"train": "a.jsonl"}}
    return TaskConfig(name=name, options=named.get(name, {}))


def test_every_option_of_a_task_has_a_value_here() -> None:
    for name in BUILT_IN:
        (line,) = drawn(TaskConfig(name=name, options={"?": 1}))
        listed = line.rpartition("expected ")[2].removeprefix("one of ")
        known = set() if listed == "none" else set(listed.split(", "))
        assert known == OPTIONS.get(name, {}).keys(), name


@pytest.mark.parametrize("name", [*BUILT_IN, "reasoning-gym:chain_sum"])
def test_every_setting_changes_each_task_or_is_refused(here, name: str) -> None:
    if ":" in name:
        pytest.importorskip("reasoning_gym")
    before = drawn(plain(name))
    changes = [{"shots": 1}, {"stop": ("x",)}, {"chat": True}, {"system": "x"}]
    changes += [{"template_options": {"x": 1}}, *([] if name == "data" else [{"stop": ()}])]
    changes += [
        {"options": plain(name).options | {option: value}}
        for option, value in OPTIONS.get(name, {}).items()
    ]
    for change in changes:
        assert drawn(dataclasses.replace(plain(name), **change)) != before, change
    assert any(drawn(dataclasses.replace(plain(name), level=level)) != before for level in (1, 2))
    assert drawn(plain(name), seed=1) != before
    (line,) = drawn(dataclasses.replace(plain(name), level=99))
    assert line.startswith("task.level: got 99, expected ")
