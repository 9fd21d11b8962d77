"""`verifiers:ID`: the data of an installed environment, its options, and runs that talk with it."""

import importlib
import json
import signal
import sys

import pytest

from hmpo.cli.evaluate import measure
from hmpo.config import TaskConfig
from hmpo.config.places import located
from hmpo.config.reading import run_config
from hmpo.environments.verifiers import from_verifiers
from hmpo.errors import ConfigError, MissingDependencyError, TaskError
from hmpo.run.consent import code_of
from hmpo.run.inputs import describe_inputs
from hmpo.run.loop import train
from hmpo.tasks import check_name, make_task
from hmpo.tasks.verifiers import import_verifiers
from tests.environments.vf_games import ROWS, data, exact, library, single
from tests.faults.micro import left_by, records
from tests.models.chat_tokenizers import qwen
from tests.run.test_conversations import policy

MODULE = """
import verifiers as vf
from tests.environments.vf_games import ROWS, data

def share(completion, goal):
    said = "".join(m["content"] for m in completion if m["role"] == "assistant")
    return sum(c == goal for c in said) / (1 + len(said))

class More(vf.MultiTurnEnv):
    async def env_response(self, messages, state, **kwargs):
        return [{"role": "user", "content": f"more {state['input']['goal']}"}]

def load_environment(goal="e", held=4, turns=2):
    if goal == "?":
        raise ValueError("no such\\ngoal")
    rows = [{**row, "goal": goal} for row in ROWS]
    rubric = vf.Rubric(funcs=[share])
    held_out = data(vf, rows[:held]) if held else None
    return More(dataset=data(vf, rows[2:]), eval_dataset=held_out, rubric=rubric, max_turns=turns)
"""


@pytest.fixture(params=["verifiers", "stand-in"])
def vf(request, monkeypatch):
    yield from library(request.param, monkeypatch)


@pytest.fixture
def installed(vf, tmp_path, monkeypatch):
    """An environment that can be loaded by its id."""
    (tmp_path / "more_of_it.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "more_of_it", raising=False)
    yield tmp_path
    sys.modules.pop("more_of_it", None)


def made(**options):
    return make_task(TaskConfig(name="verifiers:owner/more-of-it", options=options))


def test_prompts_are_the_environments_own_and_the_rest_are_columns(vf):
    task = from_verifiers(single(vf)).task
    rows = [task.train(i) for i in range(len(task._train))]
    assert {row.columns["answer"] for row in rows} | {
        task.heldout(i).columns["answer"] for i in range(task.heldout_size)
    } == {row["answer"] for row in ROWS}
    for row in rows:
        assert row.prompt == [
            {"role": "system", "content": "Add."},
            {"role": "user", "content": row.columns["question"]},
        ]
    assert len(rows) + task.heldout_size == 40 and task.heldout_size > 1, "held out by its hash"
    again = from_verifiers(single(vf), seed=1).task
    assert [again.heldout(i) for i in range(3)] == [task.heldout(i) for i in range(3)]
    assert [again.train(i).prompt for i in range(9)] != [task.train(i).prompt for i in range(9)]


def test_evaluation_data_are_held_out_and_not_trained_on(installed):
    task = made()
    assert task.heldout_size == 4 and len(task._train) == 36
    assert task.told == {"overlap": 2}, "two rows are in both"
    held = {json.dumps(task.heldout(i).prompt) for i in range(4)}
    assert not held & {json.dumps(task.train(i).prompt) for i in range(36)}
    assert task.train(0).columns["goal"] == "e"
    assert made(goal="x", held=0).train(0).columns["goal"] == "x"


def test_what_cannot_be_loaded_is_one_line(installed):
    for options, name, line in (
        ({"goal": "?"}, "more-of-it", "no such goal"),
        ({"gaol": "x"}, "more-of-it", "gaol"),
        ({}, "no-such-environment-at-all", "no_such_environment_at_all|no-such-environment"),
        ({}, "", "expected verifiers:ID"),
        ({"held": 40}, "more-of-it", "has no training prompts that are not held out too"),
    ):
        with pytest.raises(TaskError, match=line) as info:
            make_task(TaskConfig(name=f"verifiers:{name}", options=options))
        assert "\n" not in str(info.value)
    with pytest.raises(TaskError, match=r"task\.shots: got 2, expected none"):
        make_task(TaskConfig(name="verifiers:more-of-it", shots=2))
    with pytest.raises(TaskError, match=r"task\.system: got 'x', expected none"):
        make_task(TaskConfig(name="verifiers:more-of-it", system="x"))


def test_rows_that_cannot_be_prompts_are_refused_by_their_place(vf):
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    for row, line in (
        ({"prompt": picture}, "dataset row 0, message 0: .* pictures are not read"),
        ({"question": "a", "environment_reward": 1}, "the column 'environment_reward' is taken"),
    ):
        source = vf.SingleTurnEnv(dataset=data(vf, [row]), rubric=vf.Rubric(funcs=[exact]))
        with pytest.raises(TaskError, match=line):
            from_verifiers(source)


def test_loading_one_keeps_the_handlers_of_signals(installed):
    def mine(*_):
        raise AssertionError("not called")

    before = signal.signal(signal.SIGINT, mine)
    try:
        made()
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_library_that_is_missing_or_too_new_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "verifiers", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'hmpo\[verifiers\]'"):
        import_verifiers()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="verifiers is not installed"):
        check_name(TaskConfig(name="verifiers:x"))
    newer = type(sys)("verifiers")
    newer.__version__ = "0.4.0"
    monkeypatch.setitem(sys.modules, "verifiers", newer)
    with pytest.raises(MissingDependencyError, match=r"verifiers 0\.4\.0: has no MultiTurnEnv"):
        import_verifiers()


def configured(root, name="run", updates=4, **task):
    return run_config({
        "name": name, "out": str(root), "updates": updates, "prompts_per_rollout": 3, "threads": 1,
        "device": "cpu", "samples": 8, "policy": {"path": str(root / "policy")},
        "task": {"name": "verifiers:more-of-it", **task},
        "trainer": {"group_size": 4, "max_length": 40, "minibatches": 2},
        "eval": {"prompts": 2, "final_prompts": 3}, "checkpoint": {"every": 1},
    })  # fmt: skip


def test_a_run_trains_evaluates_and_resumes_on_an_installed_environment(installed):
    policy(installed / "policy", qwen())
    given = {"options": {"goal": "x"}, "max_turns": 3}
    result = train(configured(installed, **given))
    steps = [r for r in records(result.folder) if r["type"] == "step"]
    assert len(steps) == 4 and all(step["environment/errors"] == 0 for step in steps)
    assert any(step["turns/mean"] > 1 for step in steps)
    assert any(step["reward/environment/mean"] > 0 for step in steps)
    told = [r for r in records(result.folder) if r.get("name") == "prompts_left_out"]
    assert told and told[0]["data"]["overlap"] == 2
    assert result.after is not None and result.after.sampled.trials == 3
    assert "more x" in (result.folder / "completions.jsonl").read_text(encoding="utf-8")
    config = located(configured(installed, **given))
    found = describe_inputs(config, result.folder, make_task(config.task))
    assert {"task.name: more_of_it.py", "verifiers:more-of-it: rows"} <= found.keys()
    other = make_task(configured(installed, options={"goal": "y"}).task)
    assert found != describe_inputs(config, result.folder, other)
    evaluated, _ = measure(config, result.folder, prompts=3, pass_at=0)
    assert evaluated.sampled.trials == 3
    train(configured(installed, "cut", updates=1, **given))
    again = train(configured(installed, "cut", **given), resume=True)
    whole, cut = left_by(result.folder), left_by(again.folder)
    for name in ("completions.jsonl", "policy/model.safetensors"):
        assert whole[name] == cut[name], name


def test_a_folder_that_names_one_needs_consent_and_the_policy_talks_with_it(installed):
    config = configured(installed)
    assert code_of(config) == ["verifiers:more-of-it"] and code_of(config, ["task.name"]) == []
    assert config.task.talks_with == "verifiers:more-of-it"
    assert TaskConfig(name="sort", environment="a:b").talks_with == "a:b"
    assert not TaskConfig(name="sort").talks_with


def test_a_rubric_of_groups_is_refused_before_a_policy_is_loaded(installed, monkeypatch):
    text = MODULE.replace("def share(completion, goal):", "def share(completions, goal):")
    (installed / "more_of_it.py").write_text(text)
    with pytest.raises(ConfigError, match="scores whole groups"):
        train(configured(installed, options={"goal": "x"}))
