"""What the command line refuses before it imports anything heavy."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hmpo import cli
from tests.cli.test_cli import PROBE
from tests.cli.test_cli import refusal as train_refusal

ROOT = Path(__file__).parents[2]


def refusal(capsys, *arguments: str) -> str:
    """The one line that a command ends with, exit code 2."""
    capsys.readouterr()
    assert cli.main(list(arguments)) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("hmpo: ") and captured.out == "" and len(line) < 700
    return line


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["trian", "x.toml"], "did you mean train?"),
        (["evla"], "did you mean eval?"),
        (["agm", "reply", "x"], "did you mean replay?"),
        (["zzz"], "one of agm, demo, train"),
    ],
)
def test_a_command_that_does_not_exist_is_one_line(arguments, hint, capsys) -> None:
    assert refusal(capsys, *arguments) == f"hmpo: {_last(arguments)}: no such command; " + (
        hint if "?" in hint else "one of agm, demo, train, eval, report, fetch-model, doctor"
    )


def _last(arguments: list[str]) -> str:
    return arguments[1] if arguments[0] == "agm" else arguments[0]


FAULTS = {
    "task": '[task]\nname = "srt"',
    "key": "[trainer]\nlearning_rate = 1",
    "value": "updates = 0",
    "policy": '[policy]\npath = "no/such/folder"',
    "reward": '[rewards]\nfunctions = ["no_such.py:f"]',
    "stop": '[task]\nstop = [""]',
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_file_is_told_before_torch_is_imported(fault, tmp_path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(FAULTS[fault] + "\n")
    body = "from hmpo import cli\nassert cli.main() == 2"
    code = PROBE.format(arguments=["train", str(path)], body=body)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    said, facts = done.stderr.splitlines()
    seconds, heavy = json.loads(facts)
    assert said.startswith("hmpo: ") and heavy == [] and seconds < 1


def test_every_set_holds_wherever_it_stands(tmp_path, capsys) -> None:
    path = tmp_path / "run.toml"
    path.write_text("")
    for first, second in ((["updates=0"], ["name=x", "seed=1"]), (["name=x"], ["updates=0"])):
        line = train_refusal(capsys, str(path), "--set", *first, "--set", *second)
        assert "updates: got 0" in line


def test_a_file_behind_set_is_told_where_it_belongs(capsys) -> None:
    line = train_refusal(capsys, "--set", "updates=3", "run.toml")
    assert "put run.toml before --set" in line


def test_one_of_several_processes_is_one_line(tmp_path, capsys, monkeypatch) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f'out = "{tmp_path}"\n')
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE = 2: hmpo trains in one process" in train_refusal(capsys, str(path))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("updates", ["0", "-3"])
def test_a_demo_of_no_updates_is_refused(updates, tmp_path, capsys) -> None:
    line = refusal(capsys, "demo", "--updates", updates, "--out", str(tmp_path))
    assert line == f"hmpo: --updates: got {updates}, expected an integer >= 1"
    assert list(tmp_path.iterdir()) == []


def test_a_home_folder_is_expanded_and_that_of_nobody_is_one_line(
    tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.toml").write_text("updates = 0\n")
    assert "updates: got 0" in refusal(capsys, "train", "~/run.toml")
    assert f"{tmp_path}/runs/x: holds no run" in refusal(capsys, "train", "--resume", "~/runs/x")
    assert f"{tmp_path}/x" in refusal(capsys, "report", "~/x")
    assert f"{tmp_path}/x" in refusal(capsys, "agm", "replay", "~/x")
    for arguments in (["report", "~nobody-9/x"], ["train", "--resume", "~nobody-9/x"]):
        assert "~nobody-9/x: " in refusal(capsys, *arguments)


def test_the_mistake_that_the_readme_shows_gives_the_line_that_it_shows(
    capsys, monkeypatch
) -> None:
    monkeypatch.chdir(ROOT)
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    shown = [i for i, line in enumerate(lines) if line.startswith("hmpo: ")]
    assert shown
    for i in shown:
        command = shlex.split(lines[i - 1].removeprefix("$ "))
        assert command[0] == "hmpo" and refusal(capsys, *command[1:]) == lines[i]
