"""Data sets by `datasets`: saved folders, folders of files, ids with subset, split and revision."""

import json
import sys
from pathlib import Path

import datasets
import pytest

from hmpo.config import TaskConfig
from hmpo.errors import MissingDependencyError, TaskError
from hmpo.tasks import hub, make_task
from hmpo.tasks.hub import read_split

ROWS = [{"prompt": [{"role": "user", "content": f"{n}?"}], "answer": n} for n in range(40)]


def task_of(dataset, **options):
    return make_task(TaskConfig(name="data", options={"dataset": str(dataset), **options}))


def asked(task, count: int = 40) -> set[str]:
    return {json.dumps(task.train(i).prompt) for i in range(count)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Two splits, one of them shuffled by indices."""
    train = datasets.Dataset.from_list(ROWS[:30]).shuffle(seed=1)
    parts = {"train": train, "test": datasets.Dataset.from_list(ROWS[30:])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_a_saved_folder_has_its_rows(saved: Path, tmp_path: Path) -> None:
    rows = [row for _, row in read_split(str(saved), "train")]
    assert sorted(rows, key=lambda row: row["answer"]) == ROWS[:30] != rows
    assert read_split(str(saved), "test", limit=3)[2] == (f"{saved} test, row 3", ROWS[32])
    task = task_of(saved, held_out="test")
    assert task.heldout_size == 10 and asked(task) == {json.dumps(r["prompt"]) for r in ROWS[:30]}
    one = tmp_path / "one"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(one))
    assert len(read_split(str(one), "train")) == 40
    with pytest.raises(TaskError, match="holds one data set, expected no split 'test' of it"):
        read_split(str(one), "test")
    with pytest.raises(TaskError, match="has the splits train, test, but no 'validation'"):
        read_split(str(saved), "validation")
    with pytest.raises(TaskError, match="revision: got 'v1', expected none of a folder"):
        task_of(saved, revision="v1")


def test_a_folder_of_files_is_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert [row for _, row in read_split(str(folder), "train")] == ROWS
    assert len(read_split(str(folder), "train[:25%]")) == 10


def test_an_id_is_asked_for_with_what_was_given(monkeypatch) -> None:
    calls = []

    def load(*given, **named):
        calls.append((given, named))
        return datasets.Dataset.from_list(ROWS[30:] if named["split"] == "test" else ROWS[:30])

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = task_of("someone/sums", subset="main", revision="v1", held_out="test", limit=5)
    assert calls == [
        (("someone/sums", "main"), {"split": "train", "revision": "v1"}),
        (("someone/sums", "main"), {"split": "test", "revision": "v1"}),
    ]
    assert task.heldout_size == 10 and asked(task) == {json.dumps(r["prompt"]) for r in ROWS[:5]}
    calls.clear()
    task_of("someone/sums", train="rest")
    assert calls == [(("someone/sums", None), {"split": "rest", "revision": None})]


def test_rows_of_a_data_set_have_a_hash_that_tells_them_apart(saved: Path, monkeypatch) -> None:
    assert dict(task_of(saved).inputs()) == dict(task_of(saved).inputs())
    found = [ROWS, [*ROWS[:39], {**ROWS[39], "answer": 0}]]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *given, **named: datasets.Dataset.from_list(found.pop())
    )
    assert dict(task_of("a/b").inputs()) != dict(task_of("a/b").inputs())


def test_what_datasets_says_is_one_line(monkeypatch) -> None:
    def fail(*given, **named):
        raise ConnectionError("no way\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(TaskError) as caught:
        task_of("someone/sums")
    text = "task.options.dataset: cannot read 'train' of someone/sums (ConnectionError: no way to"
    assert str(caught.value).startswith(text) and "\n" not in str(caught.value)


def test_without_datasets_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'hmpo\[data\]'"):
        hub.read_split("someone/sums", "train")


def test_splits_are_one_each(saved: Path) -> None:
    with pytest.raises(TaskError, match=r"held_out: got .*, expected the name of one split"):
        task_of(saved, held_out=["test", "train"])
