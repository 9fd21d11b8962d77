"""The house rules that a machine can check."""

import re
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in found), f"{name}: every line pins one version"
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in found}


def test_every_dependency_is_pinned_once() -> None:
    run, dev = pins("requirements.txt"), pins("requirements-dev.txt")
    assert not run.keys() & dev.keys()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for wanted in project["dependencies"]:
        assert re.split(r"[<>=\[]", wanted)[0] in run, wanted


@pytest.mark.parametrize("python", ["3.11.0", "3.14.0"])
def test_every_pin_serves_the_first_python_that_readme_names_and_the_newest(python: str) -> None:
    refused = {}
    for name in [*pins("requirements.txt"), *pins("requirements-dev.txt")]:
        try:
            wanted = metadata(name).get("Requires-Python")
        except PackageNotFoundError:
            continue  # of another platform
        if wanted and not SpecifierSet(wanted).contains(python):
            refused[name] = wanted
    assert not refused
    assert "`python3` (3.11 or newer)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_makefile_is_short_and_installs_the_pinned_torch() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 66
    for name in ("requirements.txt", "requirements-peers.txt"):
        assert text.count(f"torch=={pins(name)['torch']}\n") == 2, name


def test_no_registry_no_lock_of_another_tool_and_no_local_path() -> None:
    forbidden = re.compile(
        "|".join(["pypi" + r"\.org", "python" + "hosted", "--index" + "-url", "/ro" + "ot/"])
    )
    for name in tracked():
        assert Path(name).name not in ("uv.lock", "poetry.lock"), name
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".json", "") and (
            path.stat().st_size < 1_000_000
        ):
            match = forbidden.search(path.read_text(encoding="utf-8", errors="replace"))
            assert match is None, f"{name}: {match}"


def test_source_files_are_of_readable_size() -> None:
    for path in (ROOT / "hmpo").rglob("*.py"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 500, f"{path.relative_to(ROOT)}: {lines} lines"


def test_stable_command_line_entry_is_executable() -> None:
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
