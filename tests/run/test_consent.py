"""A run's folder may be a stranger's: its code runs with consent, its secrets are not made up."""

import json
import shutil
from pathlib import Path

import pytest

from hmpo import cli
from hmpo.config import to_dict
from hmpo.config.reading import load_run_config, run_config
from hmpo.errors import ConfigError
from hmpo.run import loop as run
from hmpo.run.consent import code_of
from hmpo.run.masked import as_stored, refuse_masked, with_masks
from tests.cli.test_cli import refusal, written
from tests.faults.micro import micro_config
from tests.run.test_run import assert_same, everything

NOTING = """
from pathlib import Path
Path({mark!r}).write_text("ran")

def reward(prompts, completions, completion_ids, **columns):
    return [1.0 for _ in prompts]

def task(config, seed):
    raise RuntimeError
"""


def strangers(out: Path, policy: Path, changes: dict) -> Path:
    """A run's folder whose settings somebody else has written."""
    run.train(micro_config(policy, out, name="theirs", updates=2, rewards__functions=[]))
    path = out / "theirs" / "config.json"
    data = json.loads(path.read_text())
    for table, values in changes.items():
        data[table] |= values
    path.write_text(json.dumps(data))
    return path.parent


def measure(capsys, *arguments: str) -> tuple[int, str]:
    capsys.readouterr()
    code = cli.main(["eval", *arguments, "--prompts", "2"])
    return code, capsys.readouterr().err


@pytest.mark.parametrize("kind", ["file", "module", "task"])
def test_code_that_a_folder_names_does_not_run_without_consent(
    kind, out, policy, capsys, monkeypatch
):
    mark = out / "mark"
    (out / "evil.py").write_text(NOTING.format(mark=str(mark)))
    monkeypatch.chdir(out)
    changes = {
        "file": {"rewards": {"functions": [f"{out}/evil.py:reward"]}},
        "module": {"rewards": {"functions": ["evil:reward"]}},
        "task": {"task": {"name": f"{out}/evil.py:task"}},
    }[kind]
    folder = strangers(out, policy, changes)
    before = everything(folder)
    for arguments in (["--resume", str(folder)], ["--from", str(folder)]):
        line = refusal(capsys, *arguments)
        assert "name code that would run with your rights: " in line and "--allow-code" in line
    code, said = measure(capsys, str(folder))
    assert code == 2 and "--allow-code" in said and len(said.splitlines()) == 1
    assert not mark.exists()
    assert_same(everything(folder), before)
    if kind == "file":
        assert measure(capsys, str(folder), "--allow-code")[0] == 0
        assert mark.read_text() == "ran"


def test_any_attribute_of_any_module_needs_consent():
    """Also of ours: a command line of hmpo can name further code."""
    for spec in ("subprocess:Popen", "os:system", "hmpo.cli.commands:main", "hmpo:train"):
        config = run_config({"rewards": {"functions": [spec]}})
        assert code_of(config) == [spec]
        assert code_of(config, ["rewards.functions"]) == []
        assert code_of(config, ["task.name", "rewards.weights"]) == [spec]
    assert code_of(run_config({"task": {"name": "subprocess:Popen"}})) == ["subprocess:Popen"]
    talks = run_config({"task": {"environment": "a.py:Game"}})
    assert code_of(talks) == ["a.py:Game"] and code_of(talks, ["task.environment"]) == []
    for own in ("sort", "reasoning-gym:chain_sum", "hmpo.tasks.digits:sort_task"):
        assert code_of(run_config({"task": {"name": own}})) == []


def test_ones_own_file_and_command_line_are_consent(out, policy, capsys):
    path = written(out, policy, updates=2)
    assert cli.main(["train", path, "--no-report", "--quiet"]) == 0
    folder = str(out / "run")
    assert "--allow-code" in measure(capsys, folder)[1]
    own = "rewards.functions=['tests.faults.rewards:low_digits']"
    assert measure(capsys, folder, "--set", own)[0] == 0
    more = ["--set", "updates=3", "--no-report", "--quiet"]
    assert cli.main(["train", "--resume", folder, *more]) == 2
    assert cli.main(["train", "--resume", folder, "--allow-code", *more]) == 0
    other = written(out, policy, name="other", updates=2)
    assert cli.main(["train", other, "--from", folder, "--no-report", "--quiet"]) == 0


# --- secrets -----------------------------------------------------------------------------------


def test_paths_are_stored_as_they_are_whatever_they_look_like():
    odd = "/data/sk-" + "aB3dE6gH9jK2mN5pQ8rS1tU4" + "/key=3/hf_" + "AbCdEfGhIjKl"
    config = run_config(
        {
            "out": odd,
            "policy": {"path": odd, "start": f"{odd}@3"},
            "task": {"name": f"{odd}/t.py:task", "options": {"path": odd, "token_file": odd}},
            "rewards": {"functions": [f"{odd}/r.py:f"]},
        }
    )
    assert as_stored(config) == config


def test_a_masked_setting_is_asked_for_and_never_used(out, policy, capsys):
    """Else the task would be handed `***` and give other rewards."""
    changes = {"task": {"options": {"api_key": "***"}}}
    folder = strangers(out, policy, changes)
    for arguments in (["train", "--resume"], ["train", "--from"], ["eval"]):
        capsys.readouterr()
        assert cli.main([*arguments, str(folder)]) == 2
        said = capsys.readouterr().err
        assert "task.options.api_key is masked in its config.json" in said
        assert "--set task.options.api_key=..." in said and len(said.splitlines()) == 1


def test_a_masked_setting_that_is_given_again_resumes_as_what_it_was():
    config = run_config({"task": {"options": {"api_key": "hf_" + "AbCd" * 8, "note": "a"}}})
    stored = as_stored(config)
    assert stored.task.options == {"api_key": "***", "note": "a"}
    with pytest.raises(ConfigError, match="api_key is masked"):
        refuse_masked(stored, Path("runs/x"))
    refuse_masked(config, Path("runs/x"))
    assert with_masks(config, stored) == stored
    assert with_masks(as_stored(config), stored) == stored


def test_a_path_that_an_older_run_masked_is_given_again(out, policy):
    """Its config.json, and the hash in its checkpoints, hold the mask."""
    odd = out / "key=3"
    shutil.copytree(policy, odd)
    masked = f"{out}/key=***"
    stored = to_dict(micro_config(policy, out))
    stored["policy"]["path"] = masked
    before = run_config(stored)
    config = micro_config(odd, out)
    assert with_masks(as_stored(config), before).policy.path == masked


def test_a_stop_string_of_stars_is_no_mask():
    assert refuse_masked(run_config({"task": {"stop": ["***"]}}), Path("runs/x")) is None


# --- evaluations -------------------------------------------------------------------------------


@pytest.mark.parametrize("resumed", [1, 3])
def test_evaluating_more_often_from_a_resume_on_changes_no_weight(resumed, out, policy):
    whole = micro_config(policy, out, name="whole")
    run.train(whole)
    run.train(micro_config(policy, out, updates=resumed))
    for every, updates in ((1, 5), (2, 7), (0, 8)):
        config = micro_config(policy, out, updates=updates, eval__every=every)
        run.train(config, resume=True)
        assert load_run_config(out / "run/config.json").eval.every == every
    path = Path("policy/model.safetensors")
    assert (out / "run" / path).read_bytes() == (out / "whole" / path).read_bytes()


def test_evaluating_more_often_is_refused_where_controllers_see_it(out, policy):
    steered = {"agm__mode": "apply", "agm__controls": ["lr"]}
    run.train(micro_config(policy, out, updates=2, **steered))
    with pytest.raises(ConfigError, match=r"eval\.every was 0, got 1"):
        run.train(micro_config(policy, out, updates=2, eval__every=1, **steered), resume=True)


def test_fewer_updates_than_are_done_are_refused(out, policy, capsys):
    run.train(micro_config(policy, out))
    before = everything(out / "run")
    with pytest.raises(ConfigError, match="updates: got 3, expected at least the 8 that are done"):
        run.train(micro_config(policy, out, updates=3), resume=True)
    assert_same(everything(out / "run"), before)
