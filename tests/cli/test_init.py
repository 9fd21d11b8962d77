"""`hmpo init`: what it writes is a run that `hmpo train` takes; questions, refusals, a hub."""

import builtins
import io
import json
import os
import pty
import select
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from hmpo import cli
from tests.models.hub_server import serving
from tests.proposal.kinds import MODELS, make_data, make_model

GOLDEN = Path(__file__).parents[1] / "golden" / "init.toml"
KINDS = {
    "llama": "train.jsonl",
    "qwen": "v-train.parquet",
    "gemma": "letters.csv.gz",
    "plain": "worked.json",
}
QUICK = ("--set", "prompts_per_rollout=2", "trainer.max_length=8")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("init")
    for name in MODELS:
        make_model(root, name)
    make_data(root)
    return root


@pytest.fixture(autouse=True)
def work(made, monkeypatch):
    """The folder with models and data, without a terminal."""
    monkeypatch.chdir(made)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the same file everywhere
    return made


def init(capsys, *words) -> str:
    """What the command prints; its exit code is 0."""
    capsys.readouterr()
    assert cli.main(["init", *map(str, words)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refusal(capsys, *words) -> str:
    """The line that the command ends with; nothing is written."""
    capsys.readouterr()
    assert cli.main(["init", "refused.toml", *map(str, words)]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert not Path("refused.toml").exists() and len(line) < 400
    return line.removeprefix("hmpo: ")


@pytest.mark.parametrize("model", KINDS)
def test_what_is_written_is_taken_by_a_dry_run(capsys, model):
    out = f"{model}/{model}.toml"
    text = init(capsys, out, "--model", model, "--data", KINDS[model], *QUICK)
    assert f"next:\n  hmpo train {out} --dry-run\n  hmpo train {out}\n" in text
    assert cli.main(["train", out, "--dry-run"]) == 0
    assert "nothing was trained or written" in " ".join(capsys.readouterr().out.split())


def test_a_run_of_it_trains_and_ends(capsys, tmp_path):
    more = (*QUICK, f"out={json.dumps(str(tmp_path))}", "eval.final_prompts=2", "eval.prompts=2")
    words = ("--model", "llama", "--data", "train.jsonl", "--updates", 2)
    init(capsys, "whole.toml", *words, *more)
    assert cli.main(["train", "whole.toml", "--quiet", "--no-report"]) == 0
    assert (tmp_path / "whole" / "policy" / "config.json").is_file()


def test_the_file_is_the_golden_one(capsys):
    """A change is made on purpose: copy the file that the message names over the golden one."""
    words = ("--model", "qwen", "--data", "letters.csv.gz", "--preset", "laptop")
    init(capsys, "golden.toml", *words, "--overwrite")
    text = Path("golden.toml").read_text()
    assert text == GOLDEN.read_text(), Path("golden.toml").resolve()


def test_every_line_is_short_and_every_guess_has_its_reason(capsys):
    init(capsys, "lines.toml", "--model", "llama", "--data", "train.jsonl")
    text = Path("lines.toml").read_text()
    assert all(len(line) <= 100 for line in text.splitlines())
    for setting in ("path", "chat", "train", "max_prompt_length", "functions", "max_length", "lr"):
        lines = text.splitlines()
        (number,) = [n for n, line in enumerate(lines) if line.startswith(f"{setting} =")]
        assert "# " in lines[number] or lines[number - 1].startswith("# "), setting
    assert sum("=" in line for line in text.splitlines() if line[:1] != "#") <= 25


# --- what is given -------------------------------------------------------------------------------


def settings(capsys, *words) -> dict:
    words = ("given.toml", "--overwrite", "--model", "llama", "--data", "train.jsonl", *words)
    init(capsys, *words)
    return tomllib.loads(Path("given.toml").read_text())


def test_flags_and_settings_win_over_guesses(capsys):
    words = ("--reward", "contains", "--updates", 7, "--preset", "one-gpu")
    found = settings(capsys, *words, "--set", "rewards.options.contains.casefold=true")
    assert found["updates"] == 7 and found["policy"]["dtype"] == "bfloat16"
    assert found["rewards"]["functions"] == ["contains"]
    assert found["rewards"]["options"]["contains"] == {"casefold": True}


def test_a_function_of_the_user_is_not_run(capsys, work):
    (work / "mine.py").write_text("raise SystemExit('was run')\ndef f(**columns): ...\n")
    found = settings(capsys, "--reward", "mine.py:f")
    assert found["rewards"]["functions"] == ["mine.py:f"]


def test_a_file_that_is_there_stays_unless_it_may_go(capsys):
    Path("refused.toml").write_text("mine")
    capsys.readouterr()
    words = ["init", "refused.toml", "--model", "llama", "--data", "train.jsonl"]
    assert cli.main(words) == 2
    assert "is there already; give another name, or --overwrite" in capsys.readouterr().err
    assert Path("refused.toml").read_text() == "mine"
    assert cli.main([*words, "--overwrite"]) == 0
    Path("refused.toml").unlink()


GOOD = ("--model", "llama", "--data", "train.jsonl")
REFUSED = {
    "no model": (("--data", "train.jsonl"), "--model: not given; a folder, a hub's"),
    "no data": (("--model", "llama"), "--data: not given; a file"),
    "no such model": (("--model", "lama", *GOOD[2:]), "policy 'lama': no such folder"),
    "no such file": ((*GOOD[:2], "--data", "tran.jsonl"), "no such file; did you mean train.jsonl"),
    "unknown reward": ((*GOOD, "--reward", "mth"), "none of the library, did you mean math?"),
    "no such code": ((*GOOD, "--reward", "nix.py:f"), "--reward 'nix.py:f': no file nix.py"),
    "no such function": ((*GOOD, "--reward", "own.py:scor"), "did you mean score?"),
    "a function of another column": (
        (*GOOD, "--reward", "own.py:score"), "reward 'score': its parameter 'gold' is none of",
    ),
    "a reward that wants options": (
        (*GOOD, "--reward", "judge"), "rewards.options.judge.model: not given, expected a string; "
        "give it by --set",
    ),
    "a reward of another column": ((*GOOD, "--reward", "unit_tests"), "its parameter 'tests'"),
    "unknown preset": ((*GOOD, "--preset", "gpu"), "--preset: got 'gpu'; did you mean one-gpu?"),
    "no updates": ((*GOOD, "--updates", 0), "--updates: got 0, expected an integer >= 1"),
    "a flag as a setting": ((*GOOD, "--set", "policy.path=x"), "give it by --model"),
    "a whole table": ((*GOOD, "--set", "trainer={}"), "such as trainer.KEY=VALUE"),
    "another task": ((*GOOD, "--set", "task.name=sort"), "init writes runs on data of your own"),
    "an unknown setting": ((*GOOD, "--set", "updats=3"), "updats: unknown; did you mean updates?"),
    "no such column": (
        (*GOOD, "--set", "task.options.columns.prompt=qestion"), "did you mean question?",
    ),
    "messages without a template": (
        ("--model", "plain", "--data", "v-train.parquet"), "the model has no chat template",
    ),
    "no hub": (("--model", "org/none", *GOOD[2:]), "HF_HUB_OFFLINE keeps from asking a hub"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_in_a_line(capsys, name):
    words, said = REFUSED[name]
    Path("own.py").write_text("raise SystemExit('was run')\ndef score(completions, gold): ...\n")
    assert said in refusal(capsys, *words)


def test_without_a_terminal_a_reward_is_taken_only_where_it_is_safe(capsys, work):
    rows = [{"prompt": f"write f{n}", "tests": f"assert f{n}() == {n}"} for n in range(60)]
    (work / "code.json").write_text(json.dumps(rows))
    line = refusal(capsys, "--model", "llama", "--data", "code.json")
    assert "what the policy writes is run" in line and "say --reward unit_tests" in line
    (work / "bare.json").write_text(json.dumps([{"prompt": f"say {n}"} for n in range(60)]))
    line = refusal(capsys, "--model", "llama", "--data", "bare.json")
    assert line.startswith("--reward: no column of answers among prompt; ")


def test_a_name_that_is_no_toml_file_is_refused(capsys):
    assert cli.main(["init", "llama"]) == 2
    assert "expected the name of a .toml file" in capsys.readouterr().err


# --- questions -----------------------------------------------------------------------------------


class Terminal:
    """Answers in place of a person's, and the questions."""

    def __init__(self, monkeypatch, *answers: str) -> None:
        self.answers, self.asked = list(answers), []
        monkeypatch.setattr(sys, "stdin", self)
        monkeypatch.setattr(builtins, "input", self.input)

    def isatty(self) -> bool:
        return True

    def input(self, question: str) -> str:
        self.asked.append(question)
        if not self.answers:
            raise EOFError
        return self.answers.pop(0)


def test_five_questions_each_with_what_was_found(capsys, monkeypatch):
    terminal = Terminal(monkeypatch, "llama", "", "", "laptop", "")
    text = init(capsys, "asked.toml")
    defaults = [question.rpartition(" [")[2] for question in terminal.asked]
    assert defaults == ["./gemma]: ", "train.jsonl]: ", "last_number]: ", "laptop]: ", "100]: "]
    assert "'answer': numbers in all of the first" in text
    assert tomllib.loads(Path("asked.toml").read_text())["policy"]["path"] == "llama"


def test_what_is_given_is_not_asked_and_a_wrong_answer_is_asked_again(capsys, monkeypatch):
    terminal = Terminal(monkeypatch, "nix.jsonl", "train.jsonl", "mth", "exact", "0", "3")
    text = init(capsys, "again.toml", "--model", "llama", "--preset", "laptop")
    assert [question.partition(":")[0] for question in terminal.asked] == [
        "data", "data", "reward", "reward", "updates [100]", "updates [100]",
    ]  # fmt: skip
    assert "nix.jsonl: no such file" in text and "did you mean math?" in text
    assert tomllib.loads(Path("again.toml").read_text())["updates"] == 3


def test_a_column_that_cannot_be_told_is_asked_for(capsys, monkeypatch, work):
    rows = [{"stem": f"1+{n}", "hint": "add", "answer": str(n + 1)} for n in range(40)]
    (work / "odd.json").write_text(json.dumps(rows))
    words = ("--model", "llama", "--reward", "exact", "--preset", "laptop", "--updates", 3)
    terminal = Terminal(monkeypatch, "stm", "stem")
    text = init(capsys, "odd.toml", "--data", "odd.json", *words)
    assert len(terminal.asked) == 2 and "did you mean stem?" in text
    columns = tomllib.loads(Path("odd.toml").read_text())["task"]["options"]["columns"]
    assert columns == {"prompt": "stem"}


def test_an_input_that_ends_is_one_line(capsys, monkeypatch):
    Terminal(monkeypatch)
    assert "the input ended before its answer to model: a folder" in refusal(capsys)


def test_a_person_at_a_terminal_is_asked():
    """A real pseudo-terminal: five questions, Enter for each but the first and the last."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "hmpo", "init", "person.toml"]
    root = str(Path(cli.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "HMPO_CACHE": "nowhere"}
    child = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    seen, answers = b"", ["./llama", "", "", "laptop", "5"]
    while select.select([leader], [], [], 120)[0]:
        try:
            seen += os.read(leader, 4096)
        except OSError:
            break
        if seen.endswith(b"]: ") and answers:
            os.write(leader, answers.pop(0).encode() + b"\n")
    os.close(leader)
    assert child.wait(60) == 0, seen.decode()
    assert tomllib.loads(Path("person.toml").read_text())["updates"] == 5


# --- a hub ---------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine, and an empty cache."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


def test_a_model_of_a_hub_stays_named_as_it_is_there(capsys, hub, work):
    hub.push_folder("someone/small", work / "qwen")
    words = ("--model", "someone/small", "--data", "train.jsonl", *QUICK)
    text = init(capsys, "deep/hub.toml", *words)
    assert "qwen3" in text and "thinks before it answers" in text
    found = tomllib.loads(Path("deep/hub.toml").read_text())
    assert found["policy"]["path"] == "someone/small"
    assert cli.main(["train", "deep/hub.toml", "--dry-run"]) == 0


def test_a_hub_that_has_no_such_model_is_one_line(capsys, hub):
    line = refusal(capsys, "--model", "someone/none", "--data", "train.jsonl")
    assert "no such model at http://127.0.0.1" in line
