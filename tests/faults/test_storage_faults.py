"""A disk that fails or a process that dies at any storage call never costs a checkpoint."""

import errno
import os
import random
import resource
import signal
from pathlib import Path

import pytest
import torch

from hmpo.checkpoint import (
    RunLock,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    write_atomic,
)
from hmpo.errors import StorageError
from tests.faults.kills import Kill, Progress, fork, kill_at_random
from tests.faults.storage import dying_at, failing_at, fast_folder

KILLS = 160


@pytest.fixture
def folder():
    with fast_folder() as path:
        yield path


def state_of(n: int) -> dict:
    """A state that can be recomputed from its number."""
    generator = torch.Generator().manual_seed(n)
    weights = {f"layer{i}": torch.rand(64, 64, generator=generator) for i in range(6)}
    return {"model": weights, "optimizer": {"state": {0: {"m": weights["layer0"] * 2}}}, "n": n}


def is_state(state: dict, n: int) -> bool:
    expected = state_of(n)
    return (
        state["n"] == n
        and list(state) == list(expected)
        and list(state["model"]) == list(expected["model"])
        and all(torch.equal(state["model"][k], v) for k, v in expected["model"].items())
        and torch.equal(state["optimizer"]["state"][0]["m"], expected["model"]["layer0"] * 2)
    )


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_failure_at_every_storage_call_of_a_save_leaves_the_previous_one_valid(folder):
    failed = 0
    for code in (errno.ENOSPC, errno.EACCES):
        for again in (False, True):  # a new step, or the step that exists already
            k = 0
            while True:
                run = folder / f"{code}-{again}-{k}"
                save_checkpoint(run, 1, state_of(1))
                step = 1 if again else 2
                refused = None
                with failing_at(k, code) as calls:
                    try:
                        save_checkpoint(run, step, state_of(2), keep=1)
                    except StorageError as error:
                        refused = error
                loaded = load_checkpoint(run)
                assert loaded.skipped == ()
                if refused is None:
                    assert is_state(loaded.state, 2)
                else:
                    failed += 1
                    durable = len(list_checkpoints(run)) == 2 or (again and loaded.state["n"] == 2)
                    assert is_state(loaded.state, 2 if durable else 1)
                    if calls[-1] in ("write", "open", "mkdir", "rename"):
                        assert not durable
                    assert durable or hidden(run) == []
                    assert refused.errno == code
                    assert "\n" not in str(refused)
                    for part in (str(run / f"step-0000000{step}"), "needed", "B free"):
                        assert part in str(refused)
                    save_checkpoint(run, step, state_of(3))  # and the next save works
                    assert is_state(load_checkpoint(run).state, 3)
                    assert hidden(run) == []
                if len(calls) <= k:
                    break
                k += 1
            assert k >= 20
    assert failed >= 4 * 20


def test_a_failure_at_every_storage_call_of_write_atomic_leaves_the_former_file(folder):
    path = folder / "result.json"
    path.write_text("former")
    for k in range(3):  # open, write, fsync of the file; the rename comes fourth
        with failing_at(k) as calls, pytest.raises(StorageError, match=r"result\.json"):
            write_atomic(path, "new")
        assert calls == ["open", "write", "fsync"][: k + 1]
        assert path.read_text() == "former" and hidden(folder) == []


def test_a_file_size_limit_is_a_storage_error_and_the_previous_one_stays_valid(folder):
    save_checkpoint(folder, 1, state_of(1))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            save_checkpoint(folder, 2, state_of(2))
        except StorageError as error:
            assert error.errno == errno.EFBIG and "File too large" in str(error)
            return
        raise AssertionError("the save did not notice")

    _, status = os.waitpid(fork(limited), 0)
    assert status == 0
    assert is_state(load_checkpoint(folder).state, 1)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001"]


def test_a_read_only_folder_is_a_storage_error(folder):
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere; the shim covers EACCES")
    folder.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        save_checkpoint(folder, 1, state_of(1))


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("keep", [1, 2])
def test_death_before_every_storage_call_of_a_save_leaves_a_valid_checkpoint(folder, again, keep):
    k = 0
    while True:
        run = folder / str(k)
        for n in (1, 2):
            save_checkpoint(run, n, state_of(n))

        def dying(run=run, k=k) -> None:
            with dying_at(k):
                save_checkpoint(run, 2 if again else 3, state_of(3), keep=keep)

        _, status = os.waitpid(fork(dying), 0)
        loaded = load_checkpoint(run)
        assert loaded.skipped == ()
        assert any(is_state(loaded.state, n) for n in (2, 3))
        for path in list_checkpoints(run):  # none is left half deleted
            assert load_checkpoint(run, step=int(path.name.split("-")[1])).path == path
        save_checkpoint(run, 4, state_of(4), keep=1)
        assert sorted(path.name for path in run.iterdir()) == ["step-00000004"]
        if os.waitstatus_to_exitcode(status) == 0:
            break
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        k += 1
    assert k >= 25


def test_kill_at_random_instants_never_costs_a_finished_save(folder):
    """Saves are numbered; the n-th is of step n // 2, so each step is saved twice."""
    rng = random.Random(0)
    progress = Progress()
    kills: list[Kill] = []
    start = 0
    for _ in range(KILLS):

        def save_loop(progress: Progress, start: int = start) -> None:
            with RunLock(folder):
                n = start
                while True:
                    state = state_of(n)
                    progress.begun = n + 1
                    save_checkpoint(folder, n // 2, state)
                    progress.finished = n + 1
                    n += 1

        kill = kill_at_random(save_loop, rng, longest_s=0.02, progress=progress)
        kills.append(kill)
        loaded = load_checkpoint(folder)
        done = kill.finished or start  # saves known to be complete before the last begun
        if loaded is None:
            assert done == 0
            continue
        assert loaded.skipped == ()
        assert loaded.state["n"] in (done - 1, kill.begun - 1)
        assert loaded.step == loaded.state["n"] // 2
        assert is_state(loaded.state, loaded.state["n"])
        start = loaded.state["n"] + 1
    assert sum(kill.inside for kill in kills) >= KILLS / 3
    assert start > KILLS / 10  # the runs made progress all the same
    save_checkpoint(folder, start, state_of(start), keep=1)
    assert sorted(p.name for p in folder.iterdir()) == ["run.lock", f"step-{start:08d}"]
