"""Runs over two ranks: the numbers of one process, whatever is killed, and any number goes on."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.ranks.processes import made_once
from tests.run.several import (
    command,
    controlled,
    decided,
    ended,
    ranks_of,
    records,
    started,
    torchrun,
    train,
    weights,
)

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs the gloo backend")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by one process and by two ranks."""

    def make(folder: Path) -> None:
        ended(command(folder, "one", 1))
        ended(command(folder, "two", 2))

    return made_once(tmp_path_factory, "several", make)


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


IN_PROC = pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the ranks in /proc")


def saved(process: "subprocess.Popen[str]", place: Path) -> None:
    """Wait until a run has saved its second update."""
    until = time.monotonic() + 240
    while not list(place.glob("checkpoints/step-*2")) and time.monotonic() < until:
        assert process.poll() is None, "over before it saved"
        time.sleep(0.01)


@IN_PROC
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_all_and_the_resumed_run_is_that_of_no_kill(
    runs: Path, tmp_path: Path, rank: int
) -> None:
    name = "two"  # the name is part of the run
    process = started(command(tmp_path, name, 2))
    place = tmp_path / name
    saved(process, place)
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


@IN_PROC
def test_torchrun_starts_a_killed_group_anew_and_it_goes_on(runs: Path, tmp_path: Path) -> None:
    name = "two"
    words = command(tmp_path, name, 1)[1:]
    process = started(torchrun(2, "--max-restarts=1", *words))
    place = tmp_path / name
    saved(process, place)
    os.kill(ranks_of(name)[1], signal.SIGKILL)
    text = process.communicate(timeout=240)[0]
    assert process.returncode == 0, text[-3000:]
    assert records(place)[1:] == records(runs / name)[1:]
    other = runs / name / "completions.jsonl"
    assert (place / "completions.jsonl").read_bytes() == other.read_bytes()


@IN_PROC
def test_a_rank_that_stops_is_given_up_after_the_time_that_the_settings_say(tmp_path: Path) -> None:
    name = "two"
    process = started(command(tmp_path, name, 2, "--set", "distributed.timeout=30"))
    saved(process, tmp_path / name)
    first, second = ranks_of(name)
    os.kill(second, signal.SIGSTOP)
    while Path(f"/proc/{first}").is_dir():  # the launcher kills the stopped one later than that
        time.sleep(0.05)
    os.kill(second, signal.SIGCONT)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 2, text[-3000:]
    assert text.count("hmpo: rank 0 of 2: waited for too long") == 1 and "Traceback" not in text
    assert not ranks_of(name)


def test_a_disk_that_takes_no_checkpoint_ends_all_ranks_with_the_first_ones_line(
    tmp_path: Path,
) -> None:
    limit = f"ulimit -f 64; exec {shlex.join(command(tmp_path, 'full', 2))}"  # blocks of 1 KiB
    text = ended(["bash", "-c", limit], 2)
    lines = [line for line in text.splitlines() if line.startswith("hmpo:")]
    assert "checkpoints/step-00000002" in lines[0] and len(lines) <= 2
    assert all("rank 1 of 2: another one has ended" in line for line in lines[1:])
    assert "Traceback" not in text and not ranks_of("full")


def test_controllers_decide_over_two_ranks_what_they_decide_in_one_process(tmp_path: Path) -> None:
    file = controlled(tmp_path)
    for name, ranks in (("one", 1), ("two", 2)):
        ended(train(file, name, ranks))
    one, two = [decided(tmp_path / name) for name in ("one", "two")]
    for name in ("level", "lr", "eps", "p"):
        values = {decision.get(f"decision/{name}") for decision in one} - {None}
        assert len(values) > 1, f"{name} has moved"
    assert one == two
    compared = [(tmp_path / name / "completions.jsonl").read_bytes() for name in ("one", "two")]
    assert compared[0] == compared[1]


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
