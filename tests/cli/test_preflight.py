"""What the command line refuses before it imports anything heavy."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hmpo import cli
from hmpo.cli.preflight import COMMANDS
from hmpo.models import resolve_policy_path
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
        hint if "?" in hint else f"one of {', '.join(COMMANDS)}"
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
    "level": "[task]\nlevel = 99",
    "prompts": '[task]\nname = "jsonl"\noptions = { path = "no/such.jsonl" }',
    "unread": "[optimizer]\nmuon_lr = 0.1",
    "unread objective": "[objective]\nclip_sigma = 0.5",
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
    line = train_refusal(capsys, str(path))
    assert "WORLD_SIZE = 2 and no RANK: each process would train alone" in line
    assert not (tmp_path / "run").exists()


def test_what_one_process_makes_is_refused_to_several(tmp_path, capsys, monkeypatch) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f'out = "{tmp_path}"\n')
    line = train_refusal(capsys, str(path), "--dry-run", "--ranks", "2")
    assert "--ranks: got 2, expected nothing with --dry-run" in line
    line = train_refusal(capsys, str(path), "--ranks", "2", "--set", "device=cuda:1")
    assert "device: got 'cuda:1', expected auto, cpu or cuda with --ranks" in line
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "a dry run is made by one process" in train_refusal(capsys, str(path), "--dry-run")
    assert "the demo is made by one process" in refusal(capsys, "demo", "--out", str(tmp_path))


def test_ranks_ask_for_gpus_that_are_there_and_for_a_device_that_is_one(
    tmp_path, capsys, monkeypatch
) -> None:
    import torch

    path = tmp_path / "run.toml"
    path.write_text(f'out = "{tmp_path}"\n')
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    line = train_refusal(capsys, str(path), "--ranks", "2", "--set", "device=cuda")
    assert "--ranks: got 2, expected at most 1 (one GPU for each" in line
    line = train_refusal(capsys, str(path), "--ranks", "2", "--set", "device=foo")
    assert "device: got 'foo', expected auto, cpu, cuda or cuda:N" in line
    assert not (tmp_path / "run").exists()


def test_the_line_of_a_later_rank_begins_with_its_number(tmp_path, capsys, monkeypatch) -> None:
    path = tmp_path / "run.toml"
    path.write_text("updates = 0\n")
    for rank, begin in (("0", "hmpo: "), ("1", "hmpo: rank 1: ")):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        assert train_refusal(capsys, str(path)).startswith(f"{begin}{path}: updates: got 0")


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


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--resume"],
        ["train", "--from"],
        ["eval"],
        ["report"],
        ["agm", "replay"],
        ["demo", "--updates", "1", "--out"],
        ["train"],
    ],
)
def test_a_path_too_long_for_the_system_is_one_line(command, capsys) -> None:
    assert "File name too long" in refusal(capsys, *command, "a" * 300)


def test_an_empty_folder_for_runs_is_refused(tmp_path, capsys) -> None:
    path = tmp_path / "run.toml"
    path.write_text('out = ""\n')
    assert "out: got '', expected a folder" in train_refusal(capsys, str(path))


# --- what is measured --------------------------------------------------------------------------


@pytest.fixture
def trl_run(tmp_path) -> Path:
    """What TRL leaves: a log and state, and models in folders."""
    folder = tmp_path / "trl"
    shutil.copytree(resolve_policy_path("tiny-sort"), folder / "checkpoint-4")
    (folder / "telemetry.jsonl").write_text("{}\n")
    (folder / "checkpoint-4" / "trainer_state.json").write_text("{}")
    return folder


def test_a_target_that_cannot_be_measured_says_what_it_is(tmp_path, trl_run, capsys) -> None:
    (tmp_path / "empty").mkdir()
    cases = {
        "nosuch": "no such run or model folder",
        "empty": "holds neither a run (no config.json) nor a model",
        "trl": f"of another trainer, such as TRL; measure its model {trl_run}/checkpoint-4",
        "trl/checkpoint-4": "is a model, not a run; say what to measure with --task NAME",
        "trl/telemetry.jsonl": "is a file; give a run's folder",
    }
    for name, words in cases.items():
        line = refusal(capsys, "eval", str(tmp_path / name))
        assert line.startswith(f"hmpo: {tmp_path / name}: ") and words in line


def test_a_folder_that_cannot_be_resumed_says_what_it_is(tmp_path, trl_run, capsys) -> None:
    for option in ("--resume", "--from"):
        model = trl_run / "checkpoint-4"
        assert "is a model's folder, not a run's; train it" in refusal(
            capsys, "train", option, str(model)
        )
        line = refusal(capsys, "train", option, str(trl_run))
        assert "of another trainer, such as TRL" in line or "holds no run" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompts", "0"], "--prompts: got 0, expected an integer >= 1"),
        (["--pass-at", "-1"], "--pass-at: got -1, expected an integer >= 0"),
        (["--set", "optimizer.lr=1"], "--set optimizer.lr: hmpo eval does not read it"),
        (["--set", "eval.final_prompts=9"], "does not read it; give --prompts"),
        (["--set", "trainer={max_length=3}"], "--set trainer: hmpo eval does not read it"),
        (["--set", "policy.path=x"], "the model is the argument"),
        (["--set", "device=cuda:77"], "device: got 'cuda:77', but there are"),
    ],
)
def test_an_option_of_eval_is_obeyed_or_refused(arguments, words, capsys) -> None:
    assert words in refusal(capsys, "eval", "tiny-sort", "--task", "sort", *arguments)


def test_a_given_length_of_responses_wins_over_the_tasks_hint(capsys) -> None:
    for length, sorts in ((2, False), (12, True)):
        given = ["--set", f"trainer.max_length={length}", "--prompts", "16"]
        capsys.readouterr()
        assert cli.main(["eval", "tiny-sort", "--task", "sort", *given]) == 0
        assert ("greedy                  │ 0.000" in capsys.readouterr().out) == (not sorts)


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
