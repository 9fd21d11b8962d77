"""Relative paths of a file are found from any folder, and change no hash."""

import json
import shutil
from pathlib import Path

import pytest

from hmpo import cli
from hmpo.config.identity import config_hash
from hmpo.config.places import located
from hmpo.config.reading import load_run_config, run_config
from hmpo.models import resolve_policy_path

TOML = """
name = "a"
updates = 2
prompts_per_rollout = 2
[policy]
path = "model"
[task]
name = "jsonl"
options = { path = "data/prompts.jsonl", prompt_field = "prompt" }
[rewards]
functions = ["data/mine.py:reward", "json:loads"]
[trainer]
group_size = 2
max_length = 4
minibatches = 2
[eval]
final_prompts = 2
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a file, and what it names."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    (folder / "run.toml").write_text(TOML)
    rows = "".join(json.dumps({"prompt": f"{i}>"}) + "\n" for i in range(40))
    (folder / "data/prompts.jsonl").write_text(rows)
    code = "def reward(prompts, completions, completion_ids, **columns):\n"
    (folder / "data/mine.py").write_text(code + "    return [float(len(t)) for t in completions]\n")
    shutil.copytree(resolve_policy_path("tiny-sort"), folder / "model")
    return folder


def test_paths_count_from_the_file_and_stay_as_they_are_written(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_run_config(project / "run.toml")
    assert config.task.options["path"] == "data/prompts.jsonl", "what the hash covers"
    found = located(config)
    assert found.policy.path == str(project / "model")
    assert found.task.options == {
        "path": str(project / "data/prompts.jsonl"),
        "prompt_field": "prompt",
    }
    assert found.rewards.functions == (f"{project}/data/mine.py:reward", "json:loads")


def test_the_current_folder_serves_where_the_files_own_has_nothing(project, tmp_path, monkeypatch):
    inner = project / "configs"
    inner.mkdir()
    (project / "run.toml").rename(inner / "run.toml")
    monkeypatch.chdir(project)
    config = load_run_config(Path("configs/run.toml"))
    monkeypatch.chdir(tmp_path)
    assert located(config).task.options["path"] == str(project / "data/prompts.jsonl")
    (inner / "data").mkdir()
    shutil.copy(project / "data/prompts.jsonl", inner / "data/prompts.jsonl")
    assert located(config).task.options["path"] == str(inner / "data/prompts.jsonl")
    assert located(config).policy.path == str(project / "model")


def test_no_folder_changes_the_hash(project):
    config = load_run_config(project / "run.toml")
    plain = run_config({})
    assert config.relative_to and not plain.relative_to
    moved = run_config({"relative_to": ["/elsewhere"]})
    assert config_hash(moved) == config_hash(plain)


@pytest.mark.parametrize(
    ("path", "kept"),
    [("/abs/x", "/abs/x"), ("~/x", "~/x"), ("tiny-sort", "tiny-sort"), ("nosuch", "nosuch")],
)
def test_what_is_no_relative_path_stays(path, kept, tmp_path):
    (tmp_path / "tiny-sort").mkdir()
    data = {"policy": {"path": path}, "relative_to": [str(tmp_path)]}
    assert located(run_config(data)).policy.path == kept


def test_a_place_to_start_from_is_found_with_its_step(tmp_path):
    (tmp_path / "runs/a").mkdir(parents=True)
    for text in ("runs/a", "runs/a@7"):
        data = {"policy": {"start": text}, "relative_to": [str(tmp_path)]}
        assert located(run_config(data)).policy.start == f"{tmp_path}/{text}"


def test_a_run_is_resumed_and_measured_from_another_folder(project, tmp_path, monkeypatch, capsys):
    text = (project / "run.toml").read_text().replace(', "json:loads"', "")
    (project / "run.toml").write_text(text)
    quiet = ["--no-report", "--quiet"]
    monkeypatch.chdir(project)
    assert cli.main(["train", "run.toml", *quiet]) == 0
    run = str(project / "runs/a")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    more = ["--resume", run, "--allow-code", "--set", "updates=3"]
    assert cli.main(["train", *more, *quiet]) == 0
    assert cli.main(["eval", run, "--allow-code", "--prompts", "2"]) == 0
    assert cli.main(["train", "--from", run, "--allow-code", *quiet]) == 0
    assert (project / "runs/a-2/policy").is_dir() and list(elsewhere.iterdir()) == []
    capsys.readouterr()


def test_files_of_the_task_data_are_found_one_by_one_and_splits_are_no_files(project: Path) -> None:
    folders = [str(project), str(project.parent)]
    data = project / "data"
    for name in ("a", "b", "train"):
        (data / name).write_text("")
    options = {"train": ["data/a", "data/b"], "held_out": "data/a", "columns": {"prompt": "train"}}
    found = located(run_config({"task": {"options": options}, "relative_to": folders}))
    assert found.task.options == options | {
        "train": [str(data / "a"), str(data / "b")],
        "held_out": str(data / "a"),
    }
    splits = {"dataset": "data", "train": "train", "held_out": "test"}
    found = located(run_config({"task": {"options": splits}, "relative_to": [str(data), *folders]}))
    assert found.task.options == splits | {"dataset": str(data)}
