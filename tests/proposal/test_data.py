"""Data are read as the task reads them, and what was guessed of them is said."""

import json

import pytest

from hmpo.errors import TaskError
from hmpo.proposal.data import look_at_data
from tests.proposal.kinds import sums


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("source", "options", "chat", "answer"),
    [
        ("train.jsonl", {"columns": {"prompt": "question"}}, False, "answer"),
        ("worked.json", {"columns": {"prompt": "question"}}, False, "answer"),
        ("letters.csv.gz", {"columns": {"prompt": "problem", "answer": "label"}}, False, "label"),
        ("v-train.parquet", {"held_out": "v-test.parquet"}, True, "reward_model.ground_truth"),
    ],
)
def test_each_layout_is_found(here, source, options, chat, answer):
    data = look_at_data(source, {})
    assert data.options == {"train": source, **options}
    assert (data.chat, data.answer, data.rows + data.held) == (chat, answer, 60)
    assert data.examples[0].columns["answer"] is not None


def test_what_is_given_is_not_guessed(here):
    given = {"columns": {"prompt": "answer", "answer": "question"}, "limit": 5}
    data = look_at_data("train.jsonl", given)
    assert data.prompt == "answer" and data.rows == 5 and data.options["limit"] == 5


def test_training_prompts_that_are_held_out_too_are_dropped_and_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = sums()
    lines(tmp_path / "train.jsonl", rows)
    lines(tmp_path / "test.jsonl", rows[:7])
    data = look_at_data("train.jsonl", {})
    assert data.options["overlap"] == "drop" and data.notes["overlap"].startswith("7 training")
    assert (data.rows, data.held) == (53, 7)


def test_a_saved_data_set_has_its_splits(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    rows = datasets.Dataset.from_list(sums())
    parts = {"train": rows.select(range(40)), "validation": rows.select(range(40, 60))}
    datasets.DatasetDict(parts).save_to_disk("saved")
    data = look_at_data("saved", {})
    assert data.options["dataset"] == "saved" and data.options["held_out"] == "validation"
    assert (data.rows, data.held) == (40, 20) and "validation" in data.notes["held_out"]
    rows.save_to_disk("one")
    assert "held_out" not in look_at_data("one", {}).options


def test_a_folder_of_files_is_a_data_set(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    lines(tmp_path / "data" / "train.jsonl", sums()[:40])
    lines(tmp_path / "data" / "test.jsonl", sums()[40:])
    data = look_at_data("data", {})
    assert data.options == {
        "dataset": "data", "held_out": "test", "columns": {"prompt": "question"},
    }  # fmt: skip


REFUSED = {
    "no such file": ("trian.jsonl", "no such file; did you mean train.jsonl"),
    "no such folder": ("nowhere", "nowhere: no such file"),
    "empty": ("empty.jsonl", "empty.jsonl is empty"),
    "no rows": ("none.json", "has no rows"),
    "answered": ("sft.jsonl", "end with the assistant's turn"),
    "too few to hold any out": ("few.jsonl", "add prompts, or give task.options.held_out by --set"),
    "no prompt": ("odd.jsonl", "which of its columns a, b is the prompt cannot be told"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_data_are_refused_in_a_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "train.jsonl", sums())
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "none.json").write_text("[]")
    turns = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    lines(tmp_path / "sft.jsonl", [{"messages": turns}])
    lines(tmp_path / "odd.jsonl", [{"a": "x", "b": "y"}])
    lines(tmp_path / "few.jsonl", [{"prompt": "say 0"}])
    source, said = REFUSED[name]
    with pytest.raises(TaskError) as caught:
        look_at_data(source, {})
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_data_set_of_several_subsets_is_asked_which(monkeypatch):
    monkeypatch.setattr("hmpo.proposal.data.subset_names", lambda *_, **__: ["de", "fr"])
    with pytest.raises(TaskError, match=r"subsets de, fr; choose one: --set task.options.subset"):
        look_at_data("someone/many", {})
