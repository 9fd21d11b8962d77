import json
from pathlib import Path

from hmpo.lab.study.samples import MOST_BYTES, MOST_TEXT, last_samples


def write(folder: Path, rows: list) -> Path:
    text = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    (folder / "completions.jsonl").write_text(text, encoding="utf-8")
    return folder


def row(i: int, **changes):
    return {"step": i, "rollout": i, "prompt": "p", "completion": f"c{i}", "reward": 0.5} | changes


def test_the_last_completions_are_read_from_the_end_of_a_long_file(tmp_path: Path) -> None:
    write(tmp_path, [row(i, prompt="x" * 500) for i in range(2000)])
    assert (tmp_path / "completions.jsonl").stat().st_size > 10 * MOST_BYTES
    assert [sample.step for sample in last_samples(tmp_path, 3)] == [1997, 1998, 1999]


def test_what_is_no_completion_is_passed_over(tmp_path: Path) -> None:
    bad = ["{", "[1]", row(5, prompt=3), {"step": 1}, row(7, reward="high", step="x"), "\x00"]
    (found,) = last_samples(write(tmp_path, bad), 3)
    assert (found.completion, found.reward, found.step) == ("c7", None, None)
    assert last_samples(tmp_path / "none", 3) == []


def test_long_texts_are_cut_and_credentials_masked(tmp_path: Path) -> None:
    secret = "hf_" + "A1b2C3d4E5" * 4
    write(tmp_path, [row(1, completion="y" * 5000), row(2, completion=f"key {secret}")])
    long, masked = last_samples(tmp_path, 2)
    assert len(long.completion) < MOST_TEXT + 20 and long.completion.endswith("(cut)")
    assert secret not in masked.completion
