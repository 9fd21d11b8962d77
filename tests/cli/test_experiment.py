"""Mistakes in a suite are found before anything runs, and before torch is imported."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hmpo import cli
from tests.lab.suite.small import data

MISTAKES = [
    ({"policy": {"path": "nowhere"}}, "cell grpo+low: policy 'nowhere': no such folder"),
    ({"task": {"name": "sorrt"}}, "cell grpo+low: task.name: got 'sorrt'"),
    ({"optimizer": {"muon_lr": 1.0}}, "cell grpo+low: optimizer.muon_lr: got 1.0"),
    ({"rewards": {"functions": ["nowhere.py:f"]}}, "cell grpo+low: reward function"),
    ({"updats": 1}, "run.updats: unknown; did you mean updates?"),
]


@pytest.mark.parametrize(("settings", "line"), MISTAKES)
def test_a_mistake_in_any_cell_is_one_line_before_anything_runs(
    settings: dict[str, Any], line: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("suite.json").write_text(json.dumps(data(run=settings)))
    assert cli.main(["experiment", "run", "suite.json"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert line in said
    assert [path.name for path in tmp_path.iterdir()] == ["suite.json"]


def test_mistakes_cost_no_torch(tmp_path: Path) -> None:
    (tmp_path / "suite.json").write_text(json.dumps(data(run=MISTAKES[0][0])))
    script = (
        "import sys\nfrom hmpo import cli\n"
        "code = cli.main(['experiment', 'run', 'suite.json'])\n"
        "sys.exit(3 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True)
    assert done.returncode == 2


@pytest.mark.parametrize(("word", "hint"), [("rnu", "did you mean run?"), ("zzz", "one of run")])
def test_an_unknown_command_is_one_line(word: str, hint: str, capsys) -> None:
    assert cli.main(["experiment", word]) == 2
    assert f"hmpo: {word}: no such command; {hint}" in capsys.readouterr().err
