"""The command line: one clear line and exit code 2 for what a user can mend; signals; start-up."""

import json
import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hmpo import cli
from hmpo.checkpoint import RunLock
from hmpo.checkpoint.lock import process_alive
from hmpo.run import loop as run
from tests.faults.kills import fork
from tests.faults.micro import left_by, litter, micro_config, micro_policy, records, toml
from tests.faults.storage import failing_at, fast_folder
from tests.run.test_run import assert_same, everything

ROOT = Path(__file__).parents[2]
REWARDS = "tests.faults.rewards:"


@pytest.fixture(scope="module")
def policy():
    with fast_folder() as folder:
        folder.chmod(0o755)
        yield micro_policy(folder / "policy")


@pytest.fixture
def out():
    with fast_folder() as folder:
        yield folder


def written(folder: Path, policy: Path, **changes) -> str:
    """Path of a TOML file that describes a micro run."""
    path = folder / "run.toml"
    path.write_text(toml(micro_config(policy, folder, **changes)))
    return str(path)


def refusal(capsys, *arguments: str) -> str:
    """The one line that `hmpo train` ends with, exit code 2."""
    capsys.readouterr()
    assert cli.main(["train", *arguments, "--no-report", "--quiet"]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("hmpo: ") and captured.out == ""
    assert len(line) < 600 and "Traceback" not in line
    return line


# --- configurations ------------------------------------------------------------------------

FILES = {
    "unknown key": ("updats = 3", r"updats: unknown; did you mean updates\?"),
    "unknown table": ("[optimiser]\nlr = 1", r"optimiser: unknown; did you mean optimizer\?"),
    "wrong type": ('updates = "many"', "updates: got 'many', expected an integer"),
    "out of range": ("[trainer]\ngroup_size = 1", "trainer.group_size: got 1, expected an integ"),
    "bad toml": ("updates = = 3", "Invalid value .at line"),
    "unknown task": ('[task]\nname = "srt"', "task.name: got 'srt'; did you mean sort"),
    "bad level": ("[task]\nlevel = 99", "task.level: got 99, expected 1 to 20"),
    "no such gym": (
        '[task]\nname = "reasoning-gym:nix"',
        "no reasoning-gym task 'nix'; expected one of",
    ),
    "no model": ('[policy]\npath = "no/such/folder"', "no such folder"),
    "hub name": ('[policy]\npath = "org/model"', "no such folder here, and not whole in the"),
    "file as model": ('[policy]\npath = "pyproject.toml"', "is a file, expected a folder"),
    "no weights": ('[policy]\npath = "tests"', "has no config.json"),
    "no module": ('[rewards]\nfunctions = ["nix.da:f"]', "cannot import nix.da"),
    "no file": ('[rewards]\nfunctions = ["nix.py:f"]', "no file nix.py"),
    "no function": (f'[rewards]\nfunctions = ["{REWARDS}rases"]', "no rases .*did you mean rais"),
    "not callable": (f'[rewards]\nfunctions = ["{REWARDS}not_callable"]', "got 3"),
    "no colon": ('[rewards]\nfunctions = ["thing"]', "expected 'module:name'"),
    "two weights": ("[rewards]\nweights = [1.0, 2.0]", "weights: got .*expected 0 numbers"),
    "bad device": ('device = "tpu9000"', "device: got 'tpu9000', expected auto, cpu"),
    "no gpu": ('device = "cuda:77"', "device: got 'cuda:77', but there are"),
    "gspo as hmpo": ('algorithm = "gspo"', 'expected member = "gspo" with algorithm = "gspo"'),
    "kl alone": ("[objective]\nkl_coef = 0.1", "reference: got 'none', expected \"start\""),
}


@pytest.mark.parametrize("case", FILES)
def test_what_is_wrong_in_the_file_is_one_line_and_leaves_no_run(case, out, capsys):
    text, match = FILES[case]
    path = out / "run.toml"
    path.write_text(f'out = "{out}"\n{text}\n' if "out =" not in text else text)
    line = refusal(capsys, str(path))
    assert re.search(match, line), line
    assert not (out / "run").exists()


def test_neither_or_both_of_file_and_resume_is_one_line(out, policy, capsys):
    assert "give a TOML file, or --resume RUN" in refusal(capsys)
    path = written(out, policy)
    assert "one of the two" in refusal(capsys, path, "--resume", str(out))
    assert "cannot be read" in refusal(capsys, str(out / "missing.toml"))


@pytest.mark.parametrize(
    ("module", "changes", "remedy"),
    [
        ("peft", {"policy__lora_rank": 2}, "pip install 'hmpo[lora]'"),
        ("reasoning_gym", {"task__name": "reasoning-gym:basic_arithmetic"}, "hmpo[tasks]"),
        ("torch.utils.tensorboard", {"sinks": ["tensorboard"]}, "pip install 'hmpo[tensorboard]'"),
        ("wandb", {"sinks": ["wandb"]}, "pip install 'hmpo[wandb]'"),
        ("trackio", {"sinks": ["trackio"]}, "pip install 'hmpo[trackio]'"),
    ],
)
def test_a_missing_optional_package_is_one_line_and_leaves_no_run(
    policy, out, capsys, monkeypatch, module, changes, remedy
):
    monkeypatch.setitem(sys.modules, module, None)
    if module == "reasoning_gym":
        changes |= {"task__level": None}
    assert remedy in refusal(capsys, written(out, policy, **changes))
    assert cli.main(["train", written(out, policy, updates=2), "--no-report", "--quiet"]) == 0


# --- rewards -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("raises", r"reward 'raises' at step 0: raised KeyError: 'no such column' .rewards\.py"),
        ("one_short", "got 2 rewards, expected a list of 3 numbers"),
        ("not_a_number", "sample 3 .* got nan, expected a finite number"),
    ],
)
@pytest.mark.parametrize("timeout", [None, 30.0])
def test_a_broken_reward_is_one_line(policy, out, capsys, name, match, timeout):
    changes = {"rewards__functions": [REWARDS + name], "trainer__reward_timeout": timeout}
    path = written(out, policy, eval__final_prompts=3 if name != "not_a_number" else 4, **changes)
    assert re.search(match, refusal(capsys, path))
    assert records(out / "run", "end")[-1]["status"] == "failed"


def test_a_run_whose_reward_failed_resumes_once_it_is_mended(policy, out):
    reward = out / "mine.py"
    good = (ROOT / "tests/faults/rewards.py").read_text()
    path = written(out, policy, rewards__functions=[f"{reward}:low_digits"])
    reward.write_text(good)
    assert forked_cli(out, ["train", path]) == (0, [])
    expected = left_by(out / "run")
    shutil.rmtree(out / "run")
    reward.write_text("def low_digits(prompts, **others):\n    raise ValueError('not yet')\n")
    code, lines = forked_cli(out, ["train", path])
    assert code == 2 and "raised ValueError: not yet (mine.py:2)" in lines[-1]
    reward.write_text(good)
    assert forked_cli(out, ["train", "--resume", str(out / "run"), "--allow-code"]) == (0, [])
    assert_same(left_by(out / "run"), expected)


# --- folders -------------------------------------------------------------------------------


def test_an_existing_run_is_never_touched_by_a_refused_start(policy, out, capsys):
    path = written(out, policy)
    folder = out / "run"
    assert cli.main(["train", path, "--no-report", "--quiet"]) == 0
    before = everything(folder)
    line = refusal(capsys, path)
    assert "holds a run already; resume it with `hmpo train --resume" in line
    resume = ["--resume", str(folder), "--allow-code"]
    line = refusal(capsys, *resume, "--set", "optimizer.lr=0.5")
    assert "optimizer.lr was 0.01, got 0.5; leave them as they were, or start a new run" in line
    line = refusal(capsys, *resume, "--set", "objective.member=grpo")
    assert "objective.p was -1.0, got 1.0" in line
    assert "updates: got 0" in refusal(capsys, *resume, "--set", "updates=0")
    with RunLock(folder):
        line = refusal(capsys, *resume)
    assert "held by process" in line and "rm '" in line
    (folder / "config.json").write_text("{")
    assert "config.json: not valid JSON: Expecting" in refusal(capsys, *resume)
    (folder / "config.json").write_bytes(before["config.json"])
    assert_same(everything(folder), before)
    assert cli.main(["train", *resume, "--no-report", "--quiet"]) == 0
    before.pop("timing.jsonl")
    after = everything(folder)
    after.pop("timing.jsonl")
    assert_same(after, before)


def test_resume_of_a_folder_without_a_run_is_one_line(out, capsys, monkeypatch):
    assert "holds no run (no config.json)" in refusal(capsys, "--resume", str(out))
    assert "holds no run" in refusal(capsys, "--resume", str(out / "missing"))
    monkeypatch.chdir(out)
    assert "holds no run" in refusal(capsys, "--resume", ".")


def test_resume_takes_the_current_folder(policy, out, monkeypatch):
    path = written(out, policy, updates=2)
    assert cli.main(["train", path, "--no-report", "--quiet"]) == 0
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        patch.chdir(out / "run")
        again = [
            "train",
            "--resume",
            ".",
            "--allow-code",
            "--set",
            "updates=4",
            "--no-report",
            "--quiet",
        ]
        assert cli.main(again) == 0
    assert len(records(out / "run", "step")) == 4


def test_a_folder_that_cannot_be_made_or_written_is_one_line(policy, out, capsys):
    (out / "file").write_text("")
    line = refusal(capsys, written(out, policy), "--set", f"out={out / 'file'}")
    assert "cannot be" in line and "choose another `out`" in line
    line = refusal(capsys, written(out, policy), "--set", f"out={out / ('x' * 300)}")
    assert "File name too long" in line


def test_a_read_only_folder_is_one_line(policy, out):
    """In a child that is nobody, for nothing is read-only to root."""
    path = written(out, policy)
    out.chmod(0o755)
    (out / "run").mkdir()

    def become_nobody() -> None:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        else:
            (out / "run").chmod(0o555)

    log = out / "log"
    log.touch()
    log.chmod(0o666)
    code, lines = forked_cli(out, ["train", path], become_nobody)
    assert code == 2
    assert "run.lock: cannot lock the run folder (Permission denied)" in lines[-1]
    assert list((out / "run").iterdir()) == []


# --- storage that fails --------------------------------------------------------------------


def forked_cli(out: Path, arguments: list[str], prepare=lambda: None) -> tuple[int, list[str]]:
    """Exit code and standard error of the command line in a child that `prepare` set up."""

    def body() -> None:
        fd = os.open(out / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        sys.stdout = sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        import logging

        logging.disable(logging.WARNING)
        prepare()
        code = cli.main([*arguments, "--no-report", "--quiet"])
        sys.stderr.flush()
        os._exit(code)

    _, status = os.waitpid(fork(body), 0)
    lines = (out / "log").read_text().splitlines()
    return os.waitstatus_to_exitcode(status), [line for line in lines if line.startswith("hmpo:")]


def assert_refused_cleanly(code: int, lines: list[str], out: Path) -> None:
    text = (out / "log").read_text()
    assert code == 2 and len(lines) == 1 and "Traceback" not in text, text
    assert re.search(r"cannot (write|be written|be made|lock)|not enough room", lines[0]), lines


def test_a_full_disk_is_one_line_and_the_run_resumes(policy, out):
    """RLIMIT_FSIZE stands in for the disk: every file beyond the limit fails to be written."""
    path = written(out, policy, eval__every=3)
    folder = out / "run"
    assert forked_cli(out, ["train", path])[0] == 0
    expected = left_by(folder)
    refused = 0
    for limit in (200, 3000, 6000, 12_000, 20_000):
        shutil.rmtree(folder)

        def full(limit=limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        code, lines = forked_cli(out, ["train", path], full)
        if code == 0:
            continue
        refused += 1
        assert_refused_cleanly(code, lines, out)
        started = (folder / "config.json").exists()
        again = ["train", "--resume", str(folder), "--allow-code"] if started else ["train", path]
        assert forked_cli(out, again)[0] == 0, limit
        assert_same(left_by(folder), expected)
        assert litter(folder) == []
    assert refused >= 4


def test_a_storage_call_that_fails_anywhere_is_one_line_and_the_run_resumes(policy, out):
    path = written(out, policy, updates=3, eval__every=2)
    folder = out / "run"
    with failing_at(10**9) as seen:
        assert cli.main(["train", path, "--no-report", "--quiet"]) == 0
    counted = len(seen)
    assert counted > 60
    shutil.rmtree(folder)
    assert forked_cli(out, ["train", path])[0] == 0
    expected = left_by(folder)
    chosen, tolerated = sorted(random.Random(5).sample(range(counted), 10)), 0
    kept: list[object] = []
    for k in chosen:
        shutil.rmtree(folder)

        def failing(k=k) -> None:
            shim = failing_at(k)
            shim.__enter__()
            kept.append(shim)  # collected, it would take itself out

        code, lines = forked_cli(out, ["train", path], failing)
        if code == 0:  # only a deletion failed, or the lock's return: told, and nothing is lost
            tolerated += 1
            assert_same(left_by(folder), expected)
            continue
        assert_refused_cleanly(code, lines, out)
        started = (folder / "config.json").exists()
        again = ["train", "--resume", str(folder), "--allow-code"] if started else ["train", path]
        assert forked_cli(out, again)[0] == 0, k
        assert_same(left_by(folder), expected)
        assert litter(folder) == []
    assert tolerated <= 4


# --- signals -------------------------------------------------------------------------------


def start(arguments: list[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "hmpo.cli", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, process: subprocess.Popen, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def long_run(policy):
    """A run of 80 updates: its folder, its file, what it leaves undisturbed; all started anew.

    Every start is a process of its own: here beartype draws from Python's random state, which
    is a part of a checkpoint.
    """
    with fast_folder() as root:
        changes = {"rewards__functions": [REWARDS + "noted"], "trainer__reward_timeout": 30.0}
        path = written(root, policy, updates=80, checkpoint__every=0, **changes)
        process = start(["train", path, "--no-report", "--quiet"], HMPO_TEST_NOTE=f"{root}/note")
        assert process.communicate(timeout=60)[1] == "" and process.returncode == 0
        yield root, path, left_by(root / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_saves_says_how_to_go_on_and_the_resumed_run_is_the_same(long_run, number):
    """The reward runs in a child process of its own, which must not be left behind."""
    root, path, expected = long_run
    folder, note = root / "run", root / "note"
    shutil.rmtree(folder)
    process = start(["train", path, "--no-report"], HMPO_TEST_NOTE=str(note))
    log = folder / "telemetry.jsonl"
    wait_for(lambda: log.exists() and b'"type":"step"' in log.read_bytes(), process)
    time.sleep(random.uniform(0, 0.3))
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (128 + number, "")
    assert f"Go on with: hmpo train --resume {folder} --allow-code" in output
    assert not process_alive(int(note.read_text()))
    (saved,) = (folder / "checkpoints").iterdir()
    assert 0 < int(saved.name[5:]) < 80, "it was stopped in the midst"
    assert not (folder / "run.lock").exists()
    again = ["train", "--resume", str(folder), "--allow-code", "--no-report", "--quiet"]
    process = start(again, HMPO_TEST_NOTE=str(note))
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 0
    assert_same(left_by(folder), expected)
    assert litter(folder) == []


@pytest.mark.parametrize("timeout", [None, 50.0], ids=["reward here", "reward in a process"])
def test_a_second_signal_ends_at_once(policy, out, timeout):
    note = out / "note"
    changes = {"rewards__functions": [REWARDS + "noted_and_slow"]}
    path = written(out, policy, trainer__reward_timeout=timeout, **changes)
    process = start(["train", path, "--no-report", "--quiet"], HMPO_TEST_NOTE=str(note))
    wait_for(lambda: note.exists() and note.read_text(), process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None, "the first one waits for the reward, which takes a minute"
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 30, "half of what the reward takes, on a busy machine too"
    assert process.returncode == 143
    assert errors.splitlines() == ["hmpo: interrupted"]
    assert not process_alive(int(note.read_text())), "no orphan"
    assert not (out / "run" / "run.lock").exists()


# --- start-up ------------------------------------------------------------------------------

PROBE = """
import json, os, resource, sys
sys.argv[1:] = {arguments!r}
{body}
used = resource.getrusage(resource.RUSAGE_SELF)
heavy = [n for n in ("torch", "transformers", "numpy", "matplotlib") if n in sys.modules]
print(json.dumps([used.ru_utime + used.ru_stime, heavy]), file=sys.__stderr__)
"""
HELP = (
    "from hmpo import cli\ntry:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code"
)


@pytest.mark.parametrize(
    ("body", "arguments"),
    [("import hmpo", []), (HELP, ["--help"]), (HELP, ["train", "--help"])],
    ids=["import", "help", "train help"],
)
def test_import_and_help_are_quick_and_import_nothing_heavy(body, arguments):
    spent = []
    for _ in range(3):
        code = PROBE.format(arguments=arguments, body=body)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
        )
        seconds, heavy = json.loads(done.stderr.splitlines()[-1])
        assert heavy == []
        spent.append(seconds)
    assert statistics.median(spent) <= 0.5, spent


def test_the_first_update_of_tiny_sort_takes_at_most_six_cpu_seconds(out):
    """All of the process: imports, model, evaluations of one prompt, one update, saving."""
    (out / "run.toml").write_text(
        f'out = "{out}"\nupdates = 1\nthreads = 1\n[trainer]\nmax_length = 12\n'
        "[eval]\nfinal_prompts = 1\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = start(["train", str(out / "run.toml"), "--no-report", "--quiet"])
    _, errors = process.communicate(timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == 0, errors
    assert len(records(out / "run", "step")) == 1
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds <= 6, seconds


def test_openmp_waits_passively_and_the_hub_is_left_to_rewards():
    code = (
        "import os, sys\n"
        "for name in ('OMP_WAIT_POLICY', 'HF_HUB_OFFLINE', 'TOKENIZERS_PARALLELISM'):\n"
        "    os.environ.pop(name, None)\n"
        "class Watch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('HF_HUB_OFFLINE'))\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Watch())\n"
        "from hmpo import cli\n"
        "cli.main(['train', 'examples/jsonl_rewards.toml'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["PASSIVE", "None"], done.stderr


def test_observer_errors_are_not_swallowed(policy, out):
    class Broken(run.Observer):
        def on_update(self, record, timing):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run.train(micro_config(policy, out), observer=Broken())
