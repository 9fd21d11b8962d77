"""JSONL files as they are found: byte-order marks, home folders, other formats, missing answers."""

import json
import os
from pathlib import Path

import pytest

from hmpo.config import PolicyConfig, TaskConfig
from hmpo.config.reading import run_config
from hmpo.errors import ModelError, RewardError, TaskError
from hmpo.models import load_policy
from hmpo.run.build import make_rewards
from hmpo.tasks import make_task
from hmpo.trainer.prompts import check_prompts
from tests.tasks.test_jsonl_gym_and_own import rows, write


def lines(found) -> str:
    return "".join(json.dumps(row) + "\n" for row in found)


def task_of(path, *, stop=None, shots=0, **options):
    config = TaskConfig(
        name="jsonl", options={"path": str(path), **options}, stop=stop, shots=shots
    )
    return make_task(config)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines(rows(40)).encode())
    assert task_of(path).heldout_size == task_of(write(tmp_path / "b.jsonl", rows(40))).heldout_size


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.jsonl", rows(40))
    assert task_of("~/a.jsonl").train(0).columns["answer"]


@pytest.mark.parametrize(
    ("begin", "name"),
    [(b"PAR1", "a parquet file"), (b"\x1f\x8b\x08", "compressed by gzip"), (b"PK\3", "a zip")],
)
def test_another_format_is_named(begin: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(begin + b"\xff\x00" * 20)
    with pytest.raises(TaskError, match=rf"{name}.*, expected JSONL; convert it$"):
        task_of(tmp_path / "a")


def test_stop_strings_are_the_tasks_own_unless_they_are_given(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(40))
    assert task_of(path).stop == ("\n",)
    assert task_of(path, stop=("</s>",)).stop == ("</s>",)
    free = task_of(path, stop=())
    assert free.stop == ()
    assert free.reward(["p"], [" 3\n"], [[]], answer=[3]) == [1.0]
    assert "\n" in task_of(path, stop=(), shots=1).train(0).prompt, "examples are still parted"
    for name in ("sort", "reverse", "countdown", "largest", "key"):
        assert make_task(TaskConfig(name=name)).stop == ("\n",)
        assert make_task(TaskConfig(name=name, stop=())).stop == ()


def test_answers_and_columns_are_asked_for_before_a_model_is_loaded(tmp_path: Path) -> None:
    found = rows(40)
    del found[6]["answer"]
    config = run_config(
        {"task": {"name": "jsonl", "options": {"path": write(tmp_path / "a.jsonl", found)}}}
    )
    task = make_task(config.task)
    with pytest.raises(TaskError, match=r"a\.jsonl, line 7: no answer"):
        make_rewards(config, task)
    (tmp_path / "own.py").write_text("def r(completions, level, **k): return [1.0] * 8\n")
    own = run_config({"rewards": {"functions": [f"{tmp_path}/own.py:r"]}})
    with pytest.raises(RewardError, match="its parameter 'level' is none of"):
        make_rewards(own, task)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("\u00a7>", "holds characters the tokenizer does not know"),
        ("1\ud83d>", "holds a lone surrogate"),
        ("1" * 505 + ">", "prompt of 507 tokens and max_length = 8: got 515 tokens"),
    ],
)
@pytest.mark.parametrize("split", ["path", "heldout_path"])
def test_a_prompt_that_cannot_be_read_is_named_by_its_line_before_the_run(
    bad: str, words: str, split: str, tmp_path: Path
) -> None:
    good = [{"prompt": f"{i}>", "answer": "1"} for i in range(24)]
    files = {"path": good[:12], "heldout_path": good[12:]}
    files[split] = [*files[split][:5], {"prompt": bad, "answer": "1"}, *files[split][5:]]
    paths = {name: write(tmp_path / f"{name}.jsonl", found) for name, found in files.items()}
    task = task_of(**paths)
    loaded = load_policy(PolicyConfig(path="tiny-sort"))
    with pytest.raises(ModelError) as caught:
        check_prompts(task, loaded.tokenizer, loaded.model, max_length=8)
    text = str(caught.value)
    assert f"{split}.jsonl, line 6: " in text and words in text and text.isprintable()


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TaskError, match="no regular file; give a file of JSON lines"):
        make_task(TaskConfig(name="jsonl", options={"path": str(tmp_path / "pipe")}))
