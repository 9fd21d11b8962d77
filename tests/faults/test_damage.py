"""Rot is detected before anything is used, and tampering never runs code."""

import ast
import hashlib
import json
import logging
import os
import pickle
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hmpo
from hmpo.checkpoint import load_checkpoint, save_checkpoint
from hmpo.errors import CheckpointError
from tests.faults.storage import fast_folder, recorded

RANDOM_FLIPS = 1000


@pytest.fixture
def folder():
    with fast_folder() as path:
        yield path


@pytest.fixture
def newest(folder):
    """Two checkpoints; the folder of the newer one is returned."""
    for n in (11, 12):
        path = save_checkpoint(folder, n, small(n), config_hash="0123456789abcdef")
    return path


@pytest.fixture
def quiet():
    """Thousands of expected warnings cost more time than the checks themselves."""
    logger = logging.getLogger("hmpo.checkpoint")
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(logging.NOTSET)


def small(n: int) -> dict:
    return {
        "model": {"w": torch.full((4, 5), n / 7), "scale": torch.tensor(n)},
        "optimizer": {"state": {0: {"m": torch.zeros(20)}}, "lr": 0.1},
        "step": n,
    }


def assert_falls_back(newest: Path, file: str) -> None:
    loaded = load_checkpoint(newest.parent)
    assert loaded.step == 11 and loaded.state["step"] == 11
    ((name, why),) = loaded.skipped
    assert name == newest.name and file in why


def test_the_undamaged_one_is_loaded(newest):
    assert load_checkpoint(newest.parent).step == 12


def test_every_flipped_bit_of_the_manifest_and_its_hash_is_detected(newest, quiet):
    flips = 0
    for file in ("MANIFEST.json", "MANIFEST.sha256"):
        path = newest / file
        content = path.read_bytes()
        for position in range(len(content)):
            for bit in {0, position % 8}:
                damaged = bytearray(content)
                damaged[position] ^= 1 << bit
                path.write_bytes(damaged)
                assert_falls_back(newest, "MANIFEST")
                flips += 1
        path.write_bytes(content)
    assert flips >= 333
    assert load_checkpoint(newest.parent).step == 12


def test_random_bit_flips_over_all_files_are_detected(newest, quiet):
    rng = random.Random(1)
    contents = {path: path.read_bytes() for path in sorted(newest.iterdir())}
    assert len(contents) == 5
    places = [(path, i) for path, content in contents.items() for i in range(len(content))]
    for path, position in (rng.choice(places) for _ in range(RANDOM_FLIPS)):
        damaged = bytearray(contents[path])
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        assert_falls_back(newest, path.name)
        path.write_bytes(contents[path])
    assert load_checkpoint(newest.parent).step == 12


def test_every_truncation_of_every_file_is_detected(newest, quiet):
    truncations = 0
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        for length in sorted({*range(0, len(content), 6), 1, len(content) - 1}):
            path.write_bytes(content[:length])
            assert_falls_back(newest, path.name)
            truncations += 1
        path.write_bytes(content + b"\0")
        assert_falls_back(newest, path.name)
        path.unlink()
        assert_falls_back(newest, path.name)
        path.write_bytes(content)
    assert truncations >= 200
    assert load_checkpoint(newest.parent).step == 12


def test_a_folder_renamed_to_another_step_is_detected(newest):
    newest.rename(newest.parent / "step-00000013")
    loaded = load_checkpoint(newest.parent)
    assert loaded.step == 11
    assert "is of step 12, expected 13" in loaded.skipped[0][1]


# --- tampering: hashes are made to agree, so that only the form can be refused --------------


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def reseal(path: Path, change: Callable[[dict], None] = lambda manifest: None) -> None:
    """Rewrite sizes and hashes so that everything agrees with the files, then `change`."""
    manifest = json.loads((path / "MANIFEST.json").read_text())
    for name, entry in manifest["files"].items():
        content = (path / name).read_bytes()
        entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change(manifest)
    write_manifest(path, json.dumps(manifest).encode())


def write_manifest(path: Path, text: bytes) -> None:
    (path / "MANIFEST.json").write_bytes(text)
    line = f"{hashlib.sha256(text).hexdigest()}  MANIFEST.json\n"
    (path / "MANIFEST.sha256").write_text(line)


def replaced(name: str, content: Callable[[Path], bytes]) -> Callable[[Path, Path], None]:
    def attack(path: Path, marker: Path) -> None:
        (path / name).write_bytes(content(marker))
        reseal(path)

    return attack


def in_tree(old: str, new: str) -> Callable[[Path, Path], None]:
    def attack(path: Path, marker: Path) -> None:
        text = (path / "state.json").read_text()
        assert old in text
        (path / "state.json").write_text(text.replace(old, new, 1))
        reseal(path)

    return attack


def in_manifest(change: Callable[[dict], None]) -> Callable[[Path, Path], None]:
    return lambda path, marker: reseal(path, change)


def manifest_is(text: Callable[[Path], bytes]) -> Callable[[Path, Path], None]:
    return lambda path, marker: write_manifest(path, text(marker))


def pickled(marker: Path) -> bytes:
    return pickle.dumps(Bomb(marker))


def rename_entry(new: str) -> Callable[[Path, Path], None]:
    def change(manifest: dict) -> None:
        manifest["files"][new] = manifest["files"].pop("model.safetensors")

    return in_manifest(change)


def listed_passwd(manifest: dict) -> None:
    content = Path("/etc/passwd").read_bytes()
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["files"]["/etc/passwd"] = entry


def symlinked(name: str) -> Callable[[Path, Path], None]:
    def attack(path: Path, marker: Path) -> None:
        outside = path.parent.parent / f"{path.parent.name}-outside"
        (path / name).rename(outside)
        (path / name).symlink_to(outside)
        manifest = json.loads((path / "MANIFEST.json").read_text())
        if name in manifest["files"]:  # as a careful attacker would: the size of the link
            manifest["files"][name]["size"] = (path / name).lstat().st_size
            write_manifest(path, json.dumps(manifest).encode())

    return attack


def folder_symlinked(path: Path, marker: Path) -> None:
    path.rename(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


def named_pipe(path: Path, marker: Path) -> None:
    def change(manifest: dict) -> None:
        empty = hashlib.sha256(b"").hexdigest()
        manifest["files"]["state.json"] = {"size": 0, "sha256": empty}

    reseal(path, change)
    (path / "state.json").unlink()
    os.mkfifo(path / "state.json")


def folder_in_place_of_a_file(path: Path, marker: Path) -> None:
    (path / "MANIFEST.json").unlink()
    (path / "MANIFEST.json").mkdir()


def extra_file(path: Path, marker: Path) -> None:
    (path / "pytorch_model.bin").write_bytes(pickled(marker))


def huge_header(path: Path, marker: Path) -> None:
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + content[8:])
    reseal(path)


def header_of_other_tensors(path: Path, marker: Path) -> None:
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content.replace(b'"w"', b'"v"'))
    reseal(path)


W = '["model.safetensors","w","float32",[4,5]]'
ATTACKS = {
    "pickle as state.json": replaced("state.json", pickled),
    "pickle as model.safetensors": replaced("model.safetensors", pickled),
    "pickle as manifest": manifest_is(pickled),
    "pickle as manifest hash": lambda path, marker: (path / "MANIFEST.sha256").write_bytes(
        pickled(marker)
    ),
    "torch zip as model.safetensors": lambda path, marker: (
        torch.save(Bomb(marker), path / "model.safetensors"),
        reseal(path),
    ),
    "parent path": rename_entry("../step-00000011/model.safetensors"),
    "absolute path": rename_entry("/tmp/model.safetensors"),
    "nul in a name": rename_entry("model.safetensors\0"),
    "newline after a name": rename_entry("model.safetensors\n"),
    "backslash in a name": rename_entry("..\\model.safetensors"),
    "dot name": rename_entry(".."),
    "manifest lists /etc/passwd": in_manifest(listed_passwd),
    "manifest lists itself": rename_entry("MANIFEST.json"),
    "symlinked tensors": symlinked("model.safetensors"),
    "symlinked tree": symlinked("state.json"),
    "symlinked manifest": symlinked("MANIFEST.json"),
    "symlinked folder": folder_symlinked,
    "named pipe": named_pipe,
    "folder in place of a file": folder_in_place_of_a_file,
    "extra file": extra_file,
    "huge header": huge_header,
    "header of other tensors": header_of_other_tensors,
    "too many files": in_manifest(
        lambda m: m["files"].update(
            {f"f{i}.safetensors": m["files"]["state.json"] for i in range(99)}
        )
    ),
    "huge size": in_manifest(lambda m: m["files"]["state.json"].update(size=2**60)),
    "negative size": in_manifest(lambda m: m["files"]["state.json"].update(size=-1)),
    "size as text": in_manifest(lambda m: m["files"]["state.json"].update(size="1")),
    "hash as number": in_manifest(lambda m: m["files"]["state.json"].update(sha256=1)),
    "entry is a list": in_manifest(lambda m: m["files"].update({"state.json": []})),
    "files is a list": in_manifest(lambda m: m.update(files=["state.json"])),
    "no tree": in_manifest(lambda m: m["files"].pop("state.json")),
    "unused tensor file": lambda path, marker: (
        (path / "zzz.safetensors").write_bytes(b""),
        reseal(path, lambda m: m["files"].update({"zzz.safetensors": {
            "size": 0, "sha256": hashlib.sha256(b"").hexdigest()}})),
    ),
    "step is true": in_manifest(lambda m: m.update(step=True)),
    "unknown schema": in_manifest(lambda m: m.update(schema="hmpo.checkpoint/999")),
    "schema is a dict": in_manifest(lambda m: m.update(schema={})),
    "unknown key": in_manifest(lambda m: m.update(hook="os.system")),
    "manifest is a list": manifest_is(lambda marker: b"[]"),
    "manifest is not text": manifest_is(lambda marker: b"\xff\xfe{}"),
    "huge manifest": manifest_is(lambda marker: b" " * (2**20 + 1)),
    "duplicate manifest key": manifest_is(lambda marker: b'{"schema": 1, "schema": 1}'),
    "deep manifest": manifest_is(lambda marker: b"[" * 100_000),
    "deep tree": replaced("state.json", lambda marker: b"[" * 100_000 + b"]" * 100_000),
    "tree below the parser's limit": replaced(
        "state.json", lambda marker: b'{"a":' + b"[" * 400 + b"]" * 400 + b"}"
    ),
    "deep keys": replaced(
        "state.json", lambda marker: b'{"$dict":[[' * 150 + b"1" + b",1]]}" * 150
    ),
    "duplicate key in the tree": in_tree('"step":12', '"step":12,"step":12'),
    "duplicate key in a tagged dict": in_tree('"$dict":[[0,', '"$dict":[[0,1],[0,'),
    "float key": in_tree('"$dict":[[0,', '"$dict":[[0.5,'),
    "NaN literal": in_tree('"step":12', '"step":NaN'),
    "endless number": in_tree('"step":12', '"step":' + "9" * 5000),
    "unknown tag": in_tree('"step":12', '"step":{"$eval":"1"}'),
    "tag with company": in_tree('"step":12', '"step":{"$int":"1","x":1}'),
    "bad int": in_tree('"step":12', '"step":{"$int":"zz"}'),
    "bad float": in_tree('"step":12', '"step":{"$float":"00"}'),
    "bad bytes": in_tree('"step":12', '"step":{"$bytes":"?"}'),
    "tuple is text": in_tree('"step":12', '"step":{"$tuple":"12"}'),
    "tensor without shape": in_tree(W, '["model.safetensors","w","float32"]'),
    "tensor from elsewhere": in_tree(W, '["../model.safetensors","w","float32",[4,5]]'),
    "tensor of another name": in_tree(W, '["model.safetensors","v","float32",[4,5]]'),
    "tensor of another dtype": in_tree(W, '["model.safetensors","w","int32",[4,5]]'),
    "tensor of an unknown dtype": in_tree(W, '["model.safetensors","w","object",[4,5]]'),
    "tensor larger than its file": in_tree(
        W, '["model.safetensors","w","float32",[80000000000000,5]]'
    ),
    "tensor smaller than its file": in_tree(W, '["model.safetensors","w","float32",[4,4]]'),
    "tensor of negative size": in_tree(W, '["model.safetensors","w","float32",[-4,-5]]'),
    "tensor of overflowing size": in_tree(
        W, '["model.safetensors","w","float32",[0,4611686018427387904,4611686018427387904]]'
    ),
    "tensor of a text shape": in_tree(W, '["model.safetensors","w","float32",["4",5]]'),
    "tensor named twice": in_tree('"step":12', '"step":{"$tensor":' + W + "}"),
    "tree is a list": replaced("state.json", lambda marker: b"[]"),
    "tree is a tensor": replaced(
        "state.json", lambda marker: b'{"$tensor":' + W.encode() + b"}"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_a_tampered_checkpoint_is_refused_in_one_line_and_runs_nothing(newest, name):
    marker = newest.parent.parent / f"{newest.parent.name}-marker"
    ATTACKS[name](newest, marker)
    try:
        with recorded(("open",)), pytest.raises(CheckpointError) as caught:
            load_checkpoint(newest.parent, step=12)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
        assert not marker.exists()
    finally:
        marker.unlink(missing_ok=True)
        Path(f"{newest.parent}-outside").unlink(missing_ok=True)


def test_a_named_pipe_is_refused_unread(newest):
    named_pipe(newest, newest)
    with pytest.raises(CheckpointError, match=r"state\.json: not a regular file"):
        load_checkpoint(newest.parent, step=12)


def test_the_attack_helper_itself_leaves_a_loadable_checkpoint(newest):
    reseal(newest)
    in_tree('"step":12', '"step":13')(newest, newest)
    assert load_checkpoint(newest.parent).state["step"] == 13


def test_the_planted_bomb_would_go_off_under_pickle(folder):
    pickle.loads(pickled(folder / "marker"))
    assert (folder / "marker").exists()


def test_only_files_that_the_manifest_lists_are_opened(newest, monkeypatch):
    (newest / ".hidden").write_text("x")
    in_manifest(listed_passwd)(newest, newest)
    opened = []
    original = os.open
    monkeypatch.setattr(
        os,
        "open",
        lambda path, *a, **k: (opened.append(Path(path).name), original(path, *a, **k))[1],
    )
    assert load_checkpoint(newest.parent).step == 11
    files = ["MANIFEST.json", "MANIFEST.sha256"]  # of 12: then it is refused
    files += [*files, "state.json", "model.safetensors", "optimizer.safetensors"]
    assert opened == files


def test_an_unknown_schema_names_the_version_and_is_not_skipped(newest):
    in_manifest(lambda m: m.update(schema="hmpo.checkpoint/2"))(newest, newest)
    with pytest.raises(CheckpointError, match=r"'hmpo.checkpoint/2', expected 'hmpo.checkpoint/1'"):
        load_checkpoint(newest.parent)
    save_checkpoint(newest.parent, 13, small(13), keep=1)
    assert newest.is_dir()  # what this version cannot read it does not delete


# --- no module of the package can run code from data ----------------------------------------

FORBIDDEN_MODULES = {
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml",
}  # fmt: skip
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {"torch.load", "os.system", "os.popen"}
ALLOWED = {
    "run/card.py": r"yaml(\.safe_load|\.safe_dump|\.YAMLError)?",
    "rewards/library/programs_child.py": "exec|compile",
}
"""YAML by its safe functions alone; and the child whose whole task is to run a policy's program."""


def unsafe(source: str) -> list[str]:
    """What in `source` could run code from data, as `line: what`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
                found.append(f"{node.lineno}: {node.func.id}")
            for keyword in node.keywords:
                on = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in ("shell", "allow_pickle") and not on:
                    found.append(f"{node.lineno}: {keyword.arg}")
        for name in names:
            if name.split(".")[0] in FORBIDDEN_MODULES or name in FORBIDDEN_ATTRIBUTES:
                found.append(f"{node.lineno}: {name}")
    return found


PACKAGE = Path(hmpo.__file__).parent


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_no_module_can_run_code_from_data(path):
    allowed = ALLOWED.get(path.relative_to(PACKAGE).as_posix(), "")
    found = unsafe(path.read_text(encoding="utf-8"))
    assert [line for line in found if not re.fullmatch(rf"\d+: ({allowed})", line)] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "import pickle as p", "from pickle import loads", "import yaml",
        "from torch import load", "import torch\ntorch.load('x')", "f = torch.load",
        "eval('1')", "exec('1')", "compile('1', '', 'eval')", "__import__('os')",
        "os.system('x')", "from os import system", "os.popen('x')",
        "subprocess.run('x', shell=True)", "subprocess.run('x', shell=flag)",
        "np.load('x', allow_pickle=True)", "import os, pickle",
    ],
)  # fmt: skip
def test_the_scan_finds_each_unsafe_call(source):
    assert unsafe(source)


def test_the_scan_accepts_what_is_safe():
    assert (
        unsafe("model.eval()\nsubprocess.run(['x'], shell=False)\nimport json\njson.load(f)") == []
    )
