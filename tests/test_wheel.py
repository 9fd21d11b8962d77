"""The wheel: built from this tree, it holds `hmpo` and nothing else, and works on its own."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hmpo

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 6_000_000


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    script = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return folder / run.stdout.splitlines()[-1]


def test_wheel_holds_hmpo_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"hmpo-{hmpo.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"hmpo", info}
    tracked = subprocess.run(
        ["git", "ls-files", "hmpo"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    assert not set(tracked) - names, "a tracked file is missing"
    assert not [n for n in names if "__pycache__" in n or n.endswith((".pyc", ".orig", ".rej"))]
    assert f"{info}/licenses/LICENSE" in names


def test_wheel_brings_policy_templates_and_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry = archive.read(f"hmpo-{hmpo.__version__}.dist-info/entry_points.txt").decode()
        metadata = archive.read(f"hmpo-{hmpo.__version__}.dist-info/METADATA").decode()
    assert "hmpo/models/tiny_sort/model.safetensors" in names
    assert any(name.startswith("hmpo/lab/templates/") for name in names)
    assert "hmpo = hmpo.cli:main" in entry
    assert "Requires-Python: >=3.11" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert wheel.stat().st_size < LIMIT


def test_wheel_works_without_this_tree(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    packages = [p for p in sys.path if p.rstrip("/").endswith(("site-packages", "dist-packages"))]
    code = (
        f"import sys; sys.path[:0] = {[str(target), *packages]!r}; sys.argv[0] = 'hmpo'; "
        "import hmpo; "
        f"assert hmpo.__file__.startswith({str(target)!r}), hmpo.__file__; "
        "assert 'torch' not in sys.modules; "
        "from hmpo.cli import main; assert main(['--version']) == 0; "
        "from hmpo.config import PolicyConfig; from hmpo.models import load_policy; "
        "from hmpo.lab.report import write_report; "
        "print(type(load_policy(PolicyConfig()).model).__name__)"
    )
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [hmpo.__version__, "LlamaForCausalLM"]
