"""Whole runs whose policy is shared out to ranks: files, checkpoints, and who goes on from them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from hmpo.checkpoint import load_checkpoint
from tests.ranks.processes import made_once
from tests.run.several import command, ended, records, weights

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs the gloo backend")
SHARD = ("--set", "distributed.shard=true")
WHOLE = ("--set", "distributed.shard=false")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by one process, and by two ranks that share its policy out."""

    def make(folder: Path) -> None:
        for name, ranks, words in (("one", 1, ()), ("run", 2, SHARD)):
            ended(command(folder, name, ranks, *words, updates=6))

    return made_once(tmp_path_factory, "sharded", make)


def cut(runs: Path, place: Path, step: int = 2) -> None:
    """The sharded run as it was when it had saved a step."""
    shutil.copytree(runs / "run", place / "run")
    for saved in (place / "run" / "checkpoints").iterdir():
        if saved.is_dir() and int(saved.name.rpartition("-")[2]) > step:
            shutil.rmtree(saved)
    shutil.rmtree(place / "run" / "policy")


def state(folder: Path) -> dict[str, Any]:
    saved = load_checkpoint(folder / "checkpoints")
    assert saved is not None and saved.step == 6
    return saved.state


def test_a_sharded_run_writes_the_completions_and_ends_with_the_weights_of_one_process(
    runs: Path,
) -> None:
    one, run = [(runs / name / "completions.jsonl").read_bytes() for name in ("one", "run")]
    assert one == run and one.count(b"\n") > 3
    assert [r["type"] for r in records(runs / "one")] == [r["type"] for r in records(runs / "run")]
    one, run = weights(runs / "one"), weights(runs / "run")
    for name, value in one.items():
        assert (run[name] - value).norm() <= 1e-6 * value.norm(), name


def test_its_checkpoint_is_that_of_one_process_in_form(runs: Path) -> None:
    def form(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.shape, value.dtype
        if isinstance(value, dict):
            return {key: form(part) for key, part in value.items()}
        return type(value)

    one, run = state(runs / "one"), state(runs / "run")
    assert one.keys() == run.keys()
    for part in ("model", "optimizer"):
        assert form(one[part]) == form(run[part])


def test_the_policy_that_it_writes_is_whole(runs: Path) -> None:
    found = load_file(runs / "run" / "policy" / "model.safetensors")
    saved = weights(runs / "run")
    assert set(found) <= set(saved)
    assert all(torch.equal(found[name], saved[name]) for name in found)
    text = (runs / "run" / "policy" / "config.json").read_text()
    assert text == (runs / "one" / "policy" / "config.json").read_text()


@pytest.mark.parametrize(
    ("ranks", "words", "exact"),
    [(2, SHARD, True), (1, WHOLE, False), (3, SHARD, False)],
    ids=["the same ranks", "one process", "three ranks"],
)
def test_a_sharded_run_goes_on_over(
    runs: Path, tmp_path: Path, ranks: int, words: tuple[str, ...], exact: bool
) -> None:
    cut(runs, tmp_path)
    place = str(tmp_path / "run")
    ended(command(tmp_path, "run", ranks, "--resume", place, *words, updates=6))
    before, after = weights(runs / "run"), weights(tmp_path / "run")
    for name, value in before.items():
        if exact:
            assert torch.equal(after[name], value), name
        assert (after[name] - value).norm() <= 1e-6 * value.norm(), name
    if exact:
        for log in ("telemetry.jsonl", "completions.jsonl"):
            assert (tmp_path / "run" / log).read_bytes() == (runs / "run" / log).read_bytes()


def test_a_run_of_one_process_goes_on_sharded(runs: Path, tmp_path: Path) -> None:
    (runs / "swap").mkdir()
    shutil.copytree(runs / "one", runs / "swap" / "run")
    cut(runs / "swap", tmp_path)
    ended(command(tmp_path, "run", 2, "--resume", str(tmp_path / "run"), *SHARD, updates=6))
    before, after = weights(runs / "one"), weights(tmp_path / "run")
    assert all((after[n] - v).norm() <= 1e-6 * v.norm() for n, v in before.items())


def test_one_process_says_that_it_shares_nothing(tmp_path: Path) -> None:
    text = ended([w for w in command(tmp_path, "run", 1, *SHARD, updates=1) if w != "--quiet"])
    assert "distributed.shard: one process keeps the whole policy" in text
