"""The house rules that a machine can check."""

import ast
import re
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hmpo"
SOURCES = sorted(PACKAGE.rglob("*.py"))

LONG_FILES: tuple[str, ...] = ()
"""Files over 400 lines, at most 4; CONTRIBUTING lists them. A name may go, none may come."""

FLOORS = [
    "cli",
    "lab | adapters | proposal | probes",
    "run",
    "trainer",
    "engines",
    "sampling | logprobs | environments",
    "optim | models | tasks",
    "agm | objective",
    "attention | rewards | checkpoint | telemetry | config | ranks",
    "types",
    "errors : stats : stopwatch : randomness : processor",
]
FORBIDDEN = {
    ("trainer.gspo", "objective"),
    ("trainer.base", "objective"),
    ("trainer.faults", "objective"),
    ("trainer.rollout", "objective"),
    ("adapters", "trainer"),
    ("adapters", "run"),
    ("agm", "torch"),
    ("agm", "numpy"),
    ("config", "torch"),
    ("config", "numpy"),
}
"""Pairs of module and what it may not import directly."""


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
    assert len(text.splitlines()) <= 77
    for name in ("requirements.txt", "requirements-peers.txt", "requirements-vllm.txt"):
        assert text.count(f"torch=={pins(name)['torch']}\n") == 3, name


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


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def rooms() -> list[Path]:
    return sorted({path.parent for path in SOURCES} - {PACKAGE})


def test_the_package_has_few_files_at_its_root() -> None:
    names = [path.name for path in SOURCES if path.parent == PACKAGE]
    assert len(names) <= 8, names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_has_at_most_400_lines_and_its_functions_60(path: Path) -> None:
    if path.relative_to(ROOT).as_posix() not in LONG_FILES:
        assert lines(path) <= 400
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 60, f"{node.name}: {length} lines"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_pattern_repeats_a_group_possessively(path: Path) -> None:
    """Python 3.11.2 reads such a pattern wrongly where the group can give characters back.

    An atomic group, `(?>(?:...)*)`, says the same and is read rightly.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = re.search(r"\)(?:[*+?]|\{[0-9,]+\})\+", node.value)
            assert found is None, f"line {node.lineno}: {node.value!r}"


def test_the_list_of_longer_files_only_shrinks() -> None:
    assert len(LONG_FILES) <= 4
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in LONG_FILES:
        assert lines(ROOT / name) > 400, f"{name}: take it from the list"
        assert f"`{name}`" in contributing, name


@pytest.mark.parametrize("room", rooms(), ids=lambda room: str(room.relative_to(PACKAGE)))
def test_a_large_room_says_on_a_page_what_is_hard_in_it(room: Path) -> None:
    modules = [path for path in room.glob("*.py") if path.name != "__init__.py"]
    if len(modules) > 8:
        assert lines(room / "README.md") <= 60


def contracts() -> dict[str, dict]:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    return {contract["name"]: contract for contract in tool["importlinter"]["contracts"]}


def test_imports_flow_down_ten_floors() -> None:
    layers = contracts()["layers"]
    assert layers["layers"] == FLOORS and layers["exhaustive"]
    placed = {name for floor in FLOORS for name in re.split(" [|:] ", floor)}
    names = {room.name for room in rooms() if room.parent == PACKAGE}
    names |= {path.stem for path in SOURCES if path.parent == PACKAGE}
    assert placed == names - {"__init__", "__main__"}
    assert not any("ignore_imports" in contract for contract in contracts().values())


def test_what_may_not_be_imported_is_forbidden() -> None:
    forbidden = {
        (source.removeprefix("hmpo."), target.removeprefix("hmpo."))
        for contract in contracts().values()
        if contract["type"] == "forbidden"
        for source in contract["source_modules"]
        for target in contract["forbidden_modules"]
    }
    assert forbidden == FORBIDDEN


def test_stable_command_line_entry_is_executable() -> None:
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
