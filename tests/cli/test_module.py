"""`python -m hmpo` is `hmpo`: the same commands, exit codes and environment."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hmpo.cli

VARIABLES = ("OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM")


def run(code: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.run(
        [sys.executable, *code], cwd=folder, capture_output=True, text=True, env=clean
    )


@pytest.mark.parametrize("module", ["hmpo", "hmpo.cli"])
def test_the_module_shows_the_help_of_the_command(module, tmp_path, capsys) -> None:
    shown = run(["-m", module, "--help"], tmp_path)
    with pytest.raises(SystemExit):
        hmpo.cli.main(["--help"])
    commands = re.search(r"\{[a-z,-]+\}", capsys.readouterr().out)
    assert shown.returncode == 0 and shown.stderr == ""
    assert commands and commands[0] in shown.stdout and "usage: hmpo [-h]" in shown.stdout


@pytest.mark.parametrize("command", [(), ("init",), ("train",), ("report",), ("agm", "replay")])
def test_the_help_is_written_for_users(command, capsys) -> None:
    with pytest.raises(SystemExit):
        hmpo.cli.main([*command, "--help"])
    text = capsys.readouterr().out
    assert "None" not in text and "(default: )" not in text and "import hmpo" not in text


def test_the_module_has_the_commands_exit_codes(tmp_path) -> None:
    refused = run(["-m", "hmpo", "train", "missing.toml"], tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1 and "missing.toml: cannot be read" in refused.stderr


def test_the_environment_is_set_before_torch_is_imported(tmp_path) -> None:
    code = f"""
import os, runpy, sys
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            assert all(v in os.environ for v in {VARIABLES}), "torch comes first"
            raise SystemExit(7)
sys.meta_path.insert(0, Watch())
sys.argv = ["hmpo", "doctor"]
runpy.run_module("hmpo", run_name="__main__")
"""
    assert run(["-c", code], tmp_path).returncode == 7
