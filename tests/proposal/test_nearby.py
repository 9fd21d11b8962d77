"""What lies in the folder is found, and nothing is made up."""

import shutil

from hmpo.proposal.nearby import data_here, model_here


def test_nothing_is_found_where_nothing_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HMPO_CACHE", str(tmp_path / "cache"))
    assert model_here() == "" and data_here() == ""


def test_a_model_right_here_or_one_folder_deeper(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    shutil.copytree(here / "llama", tmp_path / "models" / "llama")
    assert model_here() == "./models/llama"
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    assert model_here() == "./models/llama"


def test_a_file_of_training_prompts_comes_before_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "a.csv").touch()
    assert data_here() == "a.csv"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl.gz").touch()
    assert data_here() == "data/train.jsonl.gz"
