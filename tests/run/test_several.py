"""Runs over two ranks: the numbers of one process, whatever is killed, and any number goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from hmpo.checkpoint import load_checkpoint

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs the gloo backend")

ROOT = Path(__file__).parents[2]
RUN = """
name = "{name}"
out = "{out}"
updates = {updates}
prompts_per_rollout = 4
threads = 1
[policy]
path = "tiny-sort"
[task]
name = "sort"
[trainer]
group_size = 4
max_length = 12
minibatches = 2
[eval]
every = 2
prompts = 8
final_prompts = 8
[checkpoint]
every = 2
keep = 9
"""


def command(folder: Path, name: str, ranks: int, *words: str, updates: int = 10) -> list[str]:
    file = folder / f"{name}.toml"
    file.write_text(RUN.format(name=name, out=folder, updates=updates), encoding="utf-8")
    start = [str(file)] if "--resume" not in words else []
    more = ["--ranks", str(ranks)] if ranks > 1 else []
    return [sys.executable, "-m", "hmpo", "train", *start, "--no-report", "--quiet", *words, *more]


def started(words: list[str]) -> "subprocess.Popen[str]":
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def ended(words: list[str], code: int = 0) -> str:
    process = started(words)
    text = process.communicate(timeout=240)[0]
    assert process.returncode == code, text[-3000:]
    return text


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "telemetry.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def weights(folder: Path) -> dict[str, Any]:
    saved = load_checkpoint(folder / "checkpoints")
    assert saved is not None
    return saved.state["model"]


def ranks_of(name: str) -> list[int]:
    """Process ids of the ranks of a run, in the order of their ranks."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().split(b"\0")
            entries = (place / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        rank = [entry[5:] for entry in entries if entry.startswith(b"RANK=")]
        if rank and any(word.endswith(f"{name}.toml".encode()) for word in words):
            found[int(rank[0])] = int(place.name)
    return [found[rank] for rank in sorted(found)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by one process and by two ranks."""
    folder = tmp_path_factory.mktemp("several")
    ended(command(folder, "one", 1))
    ended(command(folder, "two", 2))
    return folder


def test_two_ranks_write_the_completions_of_one_process(runs: Path) -> None:
    one, two = [(runs / name / "completions.jsonl").read_bytes() for name in ("one", "two")]
    assert one == two and one.count(b"\n") > 3


def test_two_ranks_log_the_numbers_of_one_process(runs: Path) -> None:
    one, two = records(runs / "one"), records(runs / "two")
    assert [r["type"] for r in one] == [r["type"] for r in two]
    assert (one[0]["world_size"], two[0]["world_size"]) == (1, 2)
    compared = 0
    for first, second in zip(one[1:], two[1:], strict=True):
        for key, value in first.items():
            if isinstance(value, float) and not key.startswith("qk/tier"):
                assert second[key] == pytest.approx(value, rel=1e-3, abs=1e-5, nan_ok=True), key
                compared += 1
    assert compared > 50


def test_two_ranks_end_with_the_weights_of_one_process(runs: Path) -> None:
    one, two = weights(runs / "one"), weights(runs / "two")
    for name, value in one.items():
        assert (two[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the ranks in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_all_and_the_resumed_run_is_that_of_no_kill(
    runs: Path, tmp_path: Path, rank: int
) -> None:
    name = "two"  # the name is part of the run
    process = started(command(tmp_path, name, 2))
    place, until = tmp_path / name, time.monotonic() + 120
    while not list(place.glob("checkpoints/step-*2")) and time.monotonic() < until:
        assert process.poll() is None, "over before anything was killed"
        time.sleep(0.01)
    found = ranks_of(name)
    os.kill(found[rank], signal.SIGKILL)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGKILL
    assert f"hmpo: rank {rank} was ended by signal 9" in text and "Traceback" not in text
    assert not ranks_of(name), "a rank has stayed"
    ended(command(tmp_path, name, 2, "--resume", str(place)))
    assert records(place)[1:] == records(runs / name)[1:]  # the first names the folder
    other = runs / name / "completions.jsonl"
    assert (place / "completions.jsonl").read_bytes() == other.read_bytes()


def test_one_process_goes_on_with_a_run_of_two_ranks(runs: Path, tmp_path: Path) -> None:
    ended(command(tmp_path, "one", 2, updates=4))
    place = tmp_path / "one"
    words = ("--resume", str(place), "--set", "updates=10")
    ended(command(tmp_path, "one", 1, *words))
    one, two = weights(runs / "one"), weights(place)
    for name, value in one.items():
        assert (two[name] - value).norm() <= 1e-5 * value.norm(), name


DRAWS = """
import random

from hmpo.config import TaskConfig
from hmpo.tasks import make_task as plain


class Drawn:
    def __init__(self, task):
        self.task = task

    def __getattr__(self, name):
        return getattr(self.task, name)

    def train(self, index):
        return self.task.train(int(1e6 * random.random()))


def make_task(config, seed):
    return Drawn(plain(TaskConfig(name="sort"), seed))


def drawn(completions, **columns):
    return [random.random() for _ in completions]
"""


def test_tasks_and_rewards_that_draw_from_the_global_generators_draw_the_same(tmp_path) -> None:
    (tmp_path / "draws.py").write_text(DRAWS, encoding="utf-8")
    more = ("--set", "task.name=draws.py:make_task", 'rewards.functions=["draws.py:drawn"]')
    for name, ranks in (("alone", 1), ("both", 2)):
        ended(command(tmp_path, name, ranks, *more, updates=6))
    alone, both = [(tmp_path / n / "completions.jsonl").read_bytes() for n in ("alone", "both")]
    assert alone == both and alone.count(b'"rollout":2') > 0


def test_a_mistake_is_one_line_and_its_exit_code(tmp_path: Path) -> None:
    words = command(tmp_path, "wrong", 2, "--set", "trainer.minibatches=99")
    lines = [line for line in ended(words, 2).splitlines() if line.startswith("hmpo:")]
    assert len(lines) == 1 and "minibatches" in lines[0]
