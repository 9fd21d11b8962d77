"""The imports and commands that a bare clone promises, exactly as they are written."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

TABLE = {
    "harmonic_mean_policy_optimization": {
        "PowerMeanConfig": "hmpo.config:PowerMeanConfig",
        "HMPOConfig": "hmpo.config:HMPOConfig",
        "PowerMeanTrainer": "hmpo.trainer.power_mean:PowerMeanTrainer",
        "HMPOTrainer": "hmpo.trainer.power_mean:HMPOTrainer",
    },
    "algorithms.gspo_vectorized": {
        "GSPOTrainer": "hmpo.trainer.gspo:GSPOTrainer",
        "GSPOConfig": "hmpo.config:GSPOConfig",
    },
    "rl_core.sampling": {
        "sample_responses_batch": "hmpo.sampling.responses:sample_responses",
        "compute_log_probs_batch": "hmpo.logprobs.responses:token_logprobs",
    },
    "optimizers.muon_clip": {
        "MuonClip": "hmpo.optim:MuonClip",
        "MuonClipConfig": "hmpo.optim:MuonClipConfig",
    },
}


@pytest.mark.parametrize("path", TABLE)
def test_stable_path_hands_on_the_names_of_hmpo(path: str) -> None:
    module = importlib.import_module(path)
    assert sorted(module.__all__) == sorted(TABLE[path])
    for name, home in TABLE[path].items():
        package, _, original = home.partition(":")
        assert getattr(module, name) is getattr(importlib.import_module(package), original)


@pytest.mark.parametrize("path", TABLE)
def test_stable_path_holds_no_logic(path: str) -> None:
    tree = ast.parse((ROOT / f"{path.replace('.', '/')}.py").read_text(encoding="utf-8"))
    first, *rest = tree.body
    assert isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant), "a docstring"
    for node in rest:
        exported = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        assert isinstance(node, ast.ImportFrom) or exported, ast.unparse(node)


def test_nothing_in_hmpo_imports_a_stable_path() -> None:
    roots = {path.partition(".")[0] for path in TABLE}
    for file in (ROOT / "hmpo").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert roots.isdisjoint(name.partition(".")[0] for name in names), file


def bare(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command in the repository, without site-packages' path files (so without hmpo there)."""
    packages = [p for p in sys.path if p.rstrip("/").endswith(("site-packages", "dist-packages"))]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(packages),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_demo_runs_from_a_bare_clone() -> None:
    run = bare("test_hmpo_demo.py", "--quick")
    assert run.returncode == 0, run.stderr
    assert "HMPO: " in run.stdout and "GSPO: " in run.stdout
    assert run.stderr == ""


def test_contract_tests_are_selected_by_name() -> None:
    run = bare(
        *("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"),
        *("-k", "harmonic_mean_policy_optimization", "test_harmonic_mean_optimization.py"),
    )
    assert run.returncode == 0, run.stdout + run.stderr
    selected = [line for line in run.stdout.splitlines() if "::" in line]
    assert len(selected) >= 10
    assert sum("agm_history" in line for line in selected) >= 4
    assert sum("means_are_ordered" in line for line in selected) == 1
