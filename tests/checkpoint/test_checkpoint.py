"""Checkpoints come back as they were saved, in the promised order, and keep what they must."""

import contextlib
import json
import logging
import math
import os
import random
import struct
import subprocess
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from hmpo.checkpoint import (
    Checkpoint,
    RunLock,
    check_free_space,
    estimate_bytes,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    write_atomic,
)
from hmpo.errors import CheckpointError, NonFiniteError, RunFolderError, StorageError
from tests.faults.kills import fork
from tests.faults.storage import fast_folder, recorded, short_writes

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip


@pytest.fixture
def folder():
    with fast_folder() as path:
        yield path


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def same(a, b) -> bool:
    """Equal in value, type and bits, all the way down."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and (a.dtype, a.shape) == (b.dtype, b.shape)
            and raw(a) == raw(b)
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(
            type(x) is type(y) and same(a[x], b[y]) for x, y in zip(a, b)
        )
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    return a == b


def round_trip(folder: Path, state: dict) -> dict:
    save_checkpoint(folder, 0, state, refuse_nonfinite=False)
    loaded = load_checkpoint(folder)
    assert loaded is not None and loaded.skipped == ()
    return loaded.state


def small(n: int) -> dict:
    return {
        "model": {"w": torch.full((4, 3), float(n)), "b": torch.arange(3) + n},
        "step": n,
    }


@st.composite
def tensors(draw) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = math.prod(shape) * dtype.itemsize
    content = draw(st.binary(min_size=count, max_size=count))
    if dtype is torch.bool:
        content = bytes(byte & 1 for byte in content)
    if not count:
        return torch.empty(shape, dtype=dtype)
    tensor = torch.frombuffer(bytearray(content), dtype=dtype).reshape(shape)
    return tensor.transpose(0, -1) if draw(st.booleans()) and shape else tensor


keys = st.one_of(st.text(max_size=6), st.integers(-(10**30), 10**30), st.just("$tensor"))
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(2**200), 2**200), st.floats(),
    st.text(st.characters(), max_size=8), st.binary(max_size=8), tensors(),
)  # fmt: skip
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
    ),
    max_leaves=12,
)


@given(state=st.dictionaries(st.text(max_size=6), trees, max_size=4))
def test_every_tree_of_every_leaf_type_round_trips_bit_for_bit(state):
    with fast_folder() as folder:
        assert same(round_trip(folder, state), state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_round_trips_scalar_empty_strided_and_sliced(folder, dtype):
    base = torch.arange(24).reshape(4, 6).to(dtype)
    state = {"model": {"0d": base[1, 2], "empty": base[:0], "t": base.t(), "cut": base[::2, 1:]}}
    assert same(round_trip(folder, state), state)


def test_lazy_conjugate_and_negative_views_are_saved_resolved(folder):
    z = torch.tensor([1 + 2j, 3 - 4j])
    loaded = round_trip(folder, {"a": {"conj": z.conj(), "neg": z.conj().imag}})["a"]
    assert loaded["conj"].tolist() == [1 - 2j, 3 + 4j]
    assert loaded["neg"].tolist() == [-2.0, 4.0]


def test_tied_tensors_come_back_equal_each_with_its_own_memory(folder):
    w = torch.randn(3, 2)
    loaded = round_trip(folder, {"model": {"embed": w, "head": w, "view": w[1]}})["model"]
    assert torch.equal(loaded["embed"], w) and torch.equal(loaded["head"], w)
    assert loaded["embed"].data_ptr() != loaded["head"].data_ptr()
    assert torch.equal(loaded["view"], w[1])
    assert loaded["view"].untyped_storage().nbytes() == 8


def test_names_that_collide_after_joining_stay_apart(folder):
    state = {
        "model": {
            "a.b": torch.tensor(1),
            "a": {"b": torch.tensor(2)},
            "__metadata__": torch.ones(1),
        },
        "tensors": {"x": torch.tensor(3), "0": torch.tensor(4), 0: torch.tensor(5)},
        "UPPER": {"x": torch.tensor(6)},
        "../evil": {"x": torch.tensor(7)},
        "x": torch.tensor(8),
        "\ud800": {"\ud801": torch.tensor(9)},
    }
    assert same(round_trip(folder, state), state)


def test_more_parts_than_files_allowed_share_one_file(folder):
    state = {f"part{i}": {"w": torch.tensor(i)} for i in range(90)}
    assert same(round_trip(folder, state), state)
    assert len(list((folder / "step-00000000").glob("*.safetensors"))) == 64


def test_random_generators_and_an_optimizer_resume_where_they_stopped(folder):
    model = torch.nn.Linear(5, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(2, 5)).square().sum().backward()
        optimizer.step()

    step()
    generator = random.Random(5)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": {"torch": torch.get_rng_state(), "python": generator.getstate()},
    }
    save_checkpoint(folder, 1, state)
    step()
    expected = [model.weight.clone(), generator.random(), torch.rand(1)]
    loaded = load_checkpoint(folder).state
    assert list(loaded["optimizer"]["state"]) == [0, 1]
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    torch.set_rng_state(loaded["rng"]["torch"])
    generator.setstate(loaded["rng"]["python"])
    step()
    assert torch.equal(model.weight, expected[0])
    assert generator.random() == expected[1]
    assert torch.equal(torch.rand(1), expected[2])


def test_model_file_is_plain_safetensors_with_the_names_of_the_state_dict(folder):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)).bfloat16()
    state = {"model": OrderedDict(model.state_dict()), "optimizer": {"m": torch.zeros(2)}}
    path = save_checkpoint(folder, 3, state)
    tensors = load_file(path / "model.safetensors")
    assert set(tensors) == set(model.state_dict())
    assert all(same(tensors[name], value) for name, value in model.state_dict().items())
    assert (path / "optimizer.safetensors").is_file()


def test_sha256sum_accepts_the_manifest(folder):
    path = save_checkpoint(folder, 3, small(3))
    result = subprocess.run(["sha256sum", "-c", "MANIFEST.sha256"], cwd=path, capture_output=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("leaf", "name"),
    [
        (np.zeros(2), "numpy.ndarray"),
        (np.float64(1), "numpy.float64"),
        ({1, 2}, "builtins.set"),
        (1j, "builtins.complex"),
        (Path("x"), "PosixPath"),
        (len, "builtin_function"),
        (torch.empty(2, device="meta"), "meta"),
        (torch.zeros(2, 2).to_sparse(), "sparse"),
    ],
)
def test_a_leaf_that_is_not_data_is_refused_naming_its_path(folder, leaf, name):
    with pytest.raises(CheckpointError, match=r"state\['a'\]\[0\]\['b'\]: .*" + name):
        save_checkpoint(folder, 1, {"a": [{"b": leaf}]})
    assert not list(folder.iterdir())


@pytest.mark.parametrize("key", [1.5, True, None, (1,)])
def test_a_key_that_is_neither_text_nor_int_is_refused(folder, key):
    with pytest.raises(CheckpointError, match=r"state\['a'\]: got the key"):
        save_checkpoint(folder, 1, {"a": {key: 1}})


def test_a_tree_that_holds_itself_is_refused(folder):
    loop: list = []
    loop.append(loop)
    with pytest.raises(CheckpointError, match="deeper than 64"):
        save_checkpoint(folder, 1, {"a": loop})


def test_the_deepest_tree_that_can_be_saved_can_be_loaded(folder):
    deep: dict | tuple = ()
    for i in range(31):
        deep = {i: (deep,)}
    assert same(round_trip(folder, {"a": deep}), {"a": deep})


@pytest.mark.parametrize("part", ["model", "optimizer"])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.float8_e5m2, torch.complex64]
)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_tensor_is_refused_by_name_and_the_disk_is_unchanged(folder, part, dtype, bad):
    save_checkpoint(folder, 1, small(1))
    before = sorted(folder.rglob("*"))
    weight = torch.ones(5).to(dtype)
    weight[3] = bad
    state = {part: {"ok": torch.ones(2), "deep": [{"w": weight}]}}
    with pytest.raises(NonFiniteError, match=r"state\['" + part + r"'\]\['deep'\]\[0\]\['w'\]"):
        save_checkpoint(folder, 2, state)
    assert sorted(folder.rglob("*")) == before
    save_checkpoint(folder, 2, {"telemetry": state[part]})  # elsewhere NaN may be the value
    save_checkpoint(folder, 3, state, refuse_nonfinite=False)


def test_finite_values_whose_sum_overflows_are_not_refused(folder):
    state = {"model": {"w": torch.full((4,), 3e38), "h": torch.full((9,), 6e4).half()}}
    assert same(round_trip(folder, state), state)
    save_checkpoint(folder, 1, state)


def test_files_are_synced_before_the_folder_before_the_rename_before_the_parent(folder):
    with recorded() as calls:
        final = save_checkpoint(folder, 7, small(7))
    kinds = [(name, Path(path).name) for name, path in calls]
    temporary = kinds[0][1]
    assert kinds[0] == ("mkdir", temporary) and temporary.startswith(".tmp-00000007-")
    order = [name for name, call in ((n, c) for c, n in kinds) if call == "fsync"]
    files = ["model.safetensors", "state.json", "MANIFEST.json", "MANIFEST.sha256"]
    assert order == [*files, temporary, folder.name]
    for name in files:
        last_write = max(i for i, kind in enumerate(kinds) if kind == ("write", name))
        assert last_write < kinds.index(("fsync", name))
    rename = kinds.index(("rename", final.name))
    assert kinds.index(("fsync", temporary)) < rename < kinds.index(("fsync", folder.name))
    assert not any(name == "write" for name, _ in kinds[rename:])


def test_older_ones_are_deleted_only_after_the_new_one_is_durable(folder, monkeypatch):
    save_checkpoint(folder, 1, small(1), keep=1)
    events = []
    for name in ("rename", "fsync", "rmdir"):
        original = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, _n=name, _o=original, **k: (events.append(_n), _o(*a, **k))[1]
        )
    save_checkpoint(folder, 2, small(2), keep=1)
    monkeypatch.undo()
    # rename into place, sync the parent, only then rename the old one away and delete it
    assert events[-4:] == ["rename", "fsync", "rename", "rmdir"]


def test_short_writes_are_continued(folder):
    with short_writes(7):
        save_checkpoint(folder, 1, small(1))
    assert same(load_checkpoint(folder).state, small(1))


def test_no_folder_and_an_empty_folder_are_no_checkpoint(folder):
    assert load_checkpoint(folder) is None
    assert load_checkpoint(folder / "missing") is None
    assert list_checkpoints(folder / "missing") == []


def test_a_file_in_place_of_the_folder_is_an_error_in_one_line(folder):
    (folder / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be listed"):
        load_checkpoint(folder / "file")
    with pytest.raises(StorageError, match="Not a directory"):
        save_checkpoint(folder / "file", 1, small(1))


def test_rotation_keeps_the_newest_and_the_list_is_oldest_first(folder):
    for n in range(12):
        save_checkpoint(folder, n, small(n), keep=3)
        steps = [int(path.name[5:]) for path in list_checkpoints(folder)]
        assert steps == list(range(max(0, n - 2), n + 1))
    assert load_checkpoint(folder, step=10).state["step"] == 10
    with pytest.raises(
        CheckpointError, match=r"got step 3, expected one of the saved \[9, 10, 11\]"
    ):
        load_checkpoint(folder, step=3)


def test_rotation_counts_only_complete_ones_and_never_deletes_the_last_valid(folder):
    for n in (1, 2, 3):
        save_checkpoint(folder, n, small(n), keep=9)
    (folder / "step-00000003" / "state.json").unlink()
    (folder / "step-00000002" / "MANIFEST.json").write_text("{}")
    save_checkpoint(folder, 4, small(4), keep=2)
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000001", "step-00000004"]
    (folder / "step-00000004" / "state.json").unlink()
    loaded = load_checkpoint(folder)
    assert loaded.step == 1 and [name for name, _ in loaded.skipped] == ["step-00000004"]


def test_a_damaged_newer_step_survives_saving_and_is_skipped_until_replaced(folder, caplog):
    for n in (10, 20):
        save_checkpoint(folder, n, small(n), keep=2)
    (folder / "step-00000020" / "model.safetensors").write_bytes(b"")
    assert load_checkpoint(folder).step == 10
    assert "step-00000020: checkpoint skipped: model.safetensors: 0 bytes" in caplog.text
    save_checkpoint(folder, 15, small(15), keep=1)
    assert load_checkpoint(folder).step == 15
    save_checkpoint(folder, 20, small(21), keep=1)
    loaded = load_checkpoint(folder)
    assert (loaded.step, loaded.state["step"], loaded.skipped) == (20, 21, ())


def test_none_valid_is_an_error_that_names_each_and_why(folder):
    for path in [save_checkpoint(folder, n, small(n)) for n in (1, 2)]:
        (path / "MANIFEST.sha256").unlink()
    with pytest.raises(CheckpointError, match="no valid checkpoint among 2") as caught:
        load_checkpoint(folder)
    text = str(caught.value)
    assert "step-00000001: MANIFEST.sha256" in text and "step-00000002" in text
    assert "\n" not in text


def test_saving_a_step_again_replaces_it(folder):
    for value in (5, 6, 7):
        save_checkpoint(folder, 3, small(value))
    assert load_checkpoint(folder).state["step"] == 7
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]


def test_a_checkpoint_set_aside_is_found_and_put_back(folder):
    save_checkpoint(folder, 3, small(3)).rename(folder / ".old-00000003-1-abcdef01")
    assert load_checkpoint(folder).state["step"] == 3
    assert load_checkpoint(folder, step=3).state["step"] == 3
    assert [path.name for path in list_checkpoints(folder)] == [".old-00000003-1-abcdef01"]
    save_checkpoint(folder, 4, small(4))
    assert [p.name for p in sorted(folder.iterdir())] == ["step-00000003", "step-00000004"]


def test_the_one_set_aside_serves_when_its_replacement_is_damaged(folder):
    save_checkpoint(folder, 3, small(3)).rename(folder / ".old-00000003-1-abcdef01")
    save_checkpoint(folder / "other", 3, small(9)).rename(folder / "step-00000003")
    assert load_checkpoint(folder).state["step"] == 9
    (folder / "step-00000003" / "state.json").unlink()
    assert load_checkpoint(folder).state["step"] == 3


def test_stale_temporaries_of_dead_writers_are_cleaned_and_live_ones_left(folder):
    dead = fork(lambda: None)
    os.waitpid(dead, 0)
    live = folder / f".tmp-00000009-{os.getppid()}-aa"
    for path in (folder / f".tmp-00000009-{dead}-aa", folder / f".tmp-9-{os.getpid()}-bb", live):
        path.mkdir()
        (path / "part").write_text("x")
    save_checkpoint(folder, 1, small(1))
    assert [path.name for path in sorted(folder.iterdir())] == [live.name, "step-00000001"]


@pytest.mark.parametrize("arguments", [{"step": -1}, {"step": True}, {"step": 10**18}, {"keep": 0}])
def test_a_bad_step_or_keep_is_refused(folder, arguments):
    with pytest.raises(CheckpointError, match=next(iter(arguments))):
        save_checkpoint(folder, **{"step": 1, "state": small(1)} | arguments)


def test_another_configuration_is_refused_and_not_skipped(folder):
    save_checkpoint(folder, 1, small(1), config_hash="aaa")
    save_checkpoint(folder, 2, small(2), config_hash="bbb")
    assert load_checkpoint(folder, config_hash="bbb").step == 2
    with pytest.raises(CheckpointError, match="'bbb', expected 'aaa'"):
        load_checkpoint(folder, config_hash="aaa")
    assert load_checkpoint(folder, step=1, config_hash="aaa").step == 1


def test_another_torch_build_is_a_warning_that_names_both(folder, monkeypatch, caplog):
    monkeypatch.setattr(torch, "__version__", "2.99.0+other")
    save_checkpoint(folder, 1, small(1))
    monkeypatch.undo()
    with caplog.at_level(logging.WARNING):
        assert load_checkpoint(folder).step == 1
    assert "'2.99.0+other' then" in caplog.text and torch.__version__ in caplog.text


def test_the_same_machine_loads_without_a_warning(folder, caplog):
    save_checkpoint(folder, 1, small(1))
    assert load_checkpoint(folder).skipped == ()
    assert caplog.text == ""


def test_estimate_covers_what_is_written_within_two_kilobytes(folder):
    state = small(1) | {"optimizer": {"m": torch.zeros(1000)}, "text": "x" * 500}
    path = save_checkpoint(folder, 1, state)
    written = sum(file.stat().st_size for file in path.iterdir())
    assert written <= estimate_bytes(state) <= written + 2048


def test_too_little_room_is_refused_before_anything_is_written(folder, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    check_free_space(folder / "not" / "there", 1000)
    with pytest.raises(StorageError, match=r"not/there: .*needed 1001 bytes, 1000 bytes free"):
        check_free_space(folder / "not" / "there", 1001)
    with pytest.raises(StorageError, match="needed"):
        save_checkpoint(folder / "run", 1, small(1))
    assert not list(folder.iterdir())


def test_write_atomic_replaces_whole_files_and_leaves_nothing_beside(folder):
    path = folder / "result.json"
    write_atomic(path, "first")
    with recorded() as calls:
        write_atomic(path, json.dumps({"a": "\u00e9"}, ensure_ascii=False))
    assert path.read_bytes() == b'{"a": "\xc3\xa9"}'
    assert [name for name, _ in calls] == ["write", "fsync", "replace", "fsync"]
    assert [entry.name for entry in folder.iterdir()] == ["result.json"]


def test_write_atomic_into_a_missing_folder_names_the_path(folder):
    with pytest.raises(StorageError, match=r"missing/x: cannot write \(No such file"):
        write_atomic(folder / "missing" / "x", b"1")


def test_a_held_lock_refuses_a_second_writer_and_says_how_to_clear_it(folder):
    expected = rf"process {os.getpid()} .*rm '.*run\.lock'"
    with RunLock(folder / "run"), pytest.raises(RunFolderError, match=expected):
        RunLock(folder / "run").acquire()
    assert not list((folder / "run").iterdir())
    with RunLock(folder / "run"):
        pass


def test_a_lock_of_a_killed_process_is_taken_over_with_a_warning(folder, caplog):
    pid = fork(lambda: (RunLock(folder).acquire(), os.kill(os.getpid(), 9)))
    os.waitpid(pid, 0)
    assert json.loads((folder / "run.lock").read_text())["pid"] == pid
    with RunLock(folder):
        assert f"took over the lock of process {pid}" in caplog.text
        assert json.loads((folder / "run.lock").read_text())["pid"] == os.getpid()


def test_a_zombie_holds_no_lock(folder):
    pid = fork(lambda: (RunLock(folder).acquire(), os.kill(os.getpid(), 9)))
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        stat = Path(f"/proc/{pid}/stat").read_text()
        if stat.rpartition(")")[2].split()[0] == "Z":
            break
    with RunLock(folder):
        assert json.loads((folder / "run.lock").read_text())["pid"] == os.getpid()
        os.waitpid(pid, 0)


def test_a_lock_whose_pid_now_belongs_to_another_process_is_taken_over(folder):
    with RunLock(folder):
        text = (folder / "run.lock").read_text()
    owner = json.loads(text) | {"birth": "another boot/1"}
    (folder / "run.lock").write_text(json.dumps(owner))
    with RunLock(folder):
        assert json.loads((folder / "run.lock").read_text())["birth"] != owner["birth"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 0}', '{"pid": "1"}'])
def test_a_lock_cut_off_while_it_was_written_is_taken_over(folder, text):
    (folder / "run.lock").write_text(text)
    with RunLock(folder):
        assert json.loads((folder / "run.lock").read_text())["pid"] == os.getpid()


def test_a_lock_of_another_host_is_never_taken_over(folder):
    with RunLock(folder):
        text = (folder / "run.lock").read_text()
    (folder / "run.lock").write_text(json.dumps(json.loads(text) | {"host": "elsewhere", "pid": 4}))
    with pytest.raises(RunFolderError, match=r"process 4 on elsewhere .*another host"):
        RunLock(folder).acquire()


def test_a_forked_child_does_not_give_back_its_parents_lock(folder):
    with RunLock(folder) as lock:
        os.waitpid(fork(lock.release), 0)
        assert (folder / "run.lock").exists()
    assert not (folder / "run.lock").exists()


def test_exactly_one_of_many_racing_processes_takes_over_a_stale_lock(folder):
    dead = fork(lambda: (RunLock(folder).acquire(), os.kill(os.getpid(), 9)))
    os.waitpid(dead, 0)
    tried, stay = os.pipe(), os.pipe()

    def take() -> None:
        os.close(stay[1])
        # The warning comes between reading the stale lock and removing it: dwell there.
        logging.getLogger("hmpo.checkpoint.lock").warning = lambda *_: time.sleep(0.2)
        won = b"0"
        with contextlib.suppress(RunFolderError):
            RunLock(folder).acquire()
            won = b"1"
        os.write(tried[1], won)
        os.read(stay[0], 1)  # live on until all have tried

    children = [fork(take) for _ in range(12)]
    answers = b"".join(os.read(tried[0], 1) for _ in children)
    os.close(stay[1])
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 12
    for fd in (*tried, stay[0]):
        os.close(fd)
    assert sorted(answers) == sorted(b"1" + b"0" * 11)


def test_a_checkpoint_is_frozen(folder):
    save_checkpoint(folder, 1, small(1))
    loaded = load_checkpoint(folder)
    assert isinstance(loaded, Checkpoint)
    with pytest.raises(AttributeError):
        loaded.step = 2
