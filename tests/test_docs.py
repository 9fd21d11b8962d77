"""What README and docs show is true: blocks run, files load, links lead somewhere.

A fenced block is run unless the line before it is `<!-- skip: reason -->`. Python blocks of a page
share one namespace. Of console blocks, `hmpo` commands go through the real command line, with
long trainings replaced by a short one; other commands must name targets, files and extras that
exist; lines that are no command are output.
"""

import ast
import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import hmpo.cli
import hmpo.cli.demo
import hmpo.cli.evaluate
import hmpo.cli.experiment_after
import hmpo.lab.probe.command
import hmpo.lab.report
import hmpo.lab.suite.run
import hmpo.models
import hmpo.ranks.start
import hmpo.run.loop
from hmpo.config import EvalConfig, RunConfig, TrainerConfig
from hmpo.config.places import located
from hmpo.config.reading import run_config
from hmpo.lab.report import write_report
from hmpo.lab.suite.reading import read_suite
from hmpo.lab.suite.watch import SuiteResult
from hmpo.run.build import trainer_config
from hmpo.run.observer import RunResult
from hmpo.tasks import make_task

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"(?P<before>[^\n]*)\n```(?P<kind>\w+)[^\n]*\n(?P<body>.*?)\n```", re.DOTALL)
COMMANDS = ("hmpo", "make", "pip", "python", "python3", "pytest", "git", "ruff", "pyrefly")


def blocks(page: str, *kinds: str) -> list[tuple[str, str]]:
    """(kind, body) of the page's fenced blocks that are not skipped."""
    text = "\n" + (ROOT / page).read_text(encoding="utf-8")
    found = [m for m in BLOCK.finditer(text) if m["kind"] in kinds]
    return [(m["kind"], m["body"]) for m in found if not m["before"].startswith("<!-- skip: ")]


def pages_with(*kinds: str) -> list[str]:
    return [page for page in PAGES if (ROOT / page).exists() and blocks(page, *kinds)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> RunResult:
    """A finished run, `runs/demo`, in a folder that has the examples."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "examples", folder / "examples")
    shutil.copytree(ROOT / "studies", folder / "studies")
    result = hmpo.run.loop.train(
        RunConfig(
            name="demo",
            out=str(folder / "runs"),
            updates=2,
            prompts_per_rollout=4,
            trainer=TrainerConfig(group_size=4, max_length=12, minibatches=2),
            eval=EvalConfig(final_prompts=16),
        )
    )
    write_report([result.folder])
    return result


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "docs"}
    for number, (_, body) in enumerate(blocks(page, "python"), start=1):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(body, f"{page}, python block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", pages_with("toml"))
def test_toml_blocks_are_runs(page: str) -> None:
    for _, body in blocks(page, "toml"):
        run_config(tomllib.loads(body))


def commands(page: str) -> list[list[str]]:
    """The commands of a page's console blocks, split as a shell would."""
    found = []
    for _, body in blocks(page, "console", "bash", "sh"):
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words and words[0].rpartition("/")[2] in COMMANDS:
                found.append([words[0].rpartition("/")[2], *words[1:]])
    return found


@pytest.mark.parametrize("page", pages_with("console", "bash", "sh"))
def test_commands_work(page: str, demo: RunResult, monkeypatch, capsys) -> None:
    monkeypatch.chdir(demo.folder.parents[1])
    shorten(monkeypatch, demo)
    for words in commands(page):
        check = {"hmpo": run_hmpo, "make": check_make, "pip": check_pip, "git": print}
        check.get(words[0], check_python)(words[1:])


def shorten(monkeypatch, demo: RunResult) -> None:
    """Long commands end where their arguments, configuration and task are understood."""
    measure = hmpo.cli.evaluate.evaluate_target

    def train(config, **_):
        trainer_config(config)
        if not config.task.name.startswith("reasoning-gym:"):
            make_task(located(config).task, config.seed)
        return demo

    def evaluate(target, *, settings, **options):
        if str(target) != "smollm2":
            return measure(target, settings=settings, **options)
        run_config({}, settings)
        return 0

    monkeypatch.setattr(hmpo.run.loop, "train", train)
    monkeypatch.setattr(hmpo.ranks.start, "start_ranks", lambda arguments, count: 0)
    monkeypatch.setattr(hmpo.cli.demo, "run_demo", lambda **_: 0)
    monkeypatch.setattr(
        hmpo.lab.suite.run, "run_suite", lambda suite, *, out, **_: SuiteResult(folder=out)
    )
    for name in ("report", "power"):
        monkeypatch.setattr(hmpo.cli.experiment_after, name, suite_is_sound)
    monkeypatch.setattr(
        hmpo.lab.probe.command, "run_probe", lambda target, **_: int(not target.exists())
    )
    monkeypatch.setattr(hmpo.models, "fetch_smollm2", lambda folder=None: folder)
    monkeypatch.setattr(hmpo.cli.evaluate, "evaluate_target", evaluate)
    monkeypatch.setattr(hmpo.lab.report, "write_report", lambda runs, out=None: runs[0])


def suite_is_sound(source: str, out: Path, *_: Any) -> int:
    """What a command says of a suite that was read, in place of its runs."""
    return int(not read_suite(source).cells)


def run_hmpo(words: list[str]) -> None:
    words = ["runs/demo" if word == "runs/NAME" else word for word in words]
    assert hmpo.cli.main(words) == 0, f"hmpo {shlex.join(words)}"


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert set(words) <= set(targets), words


def check_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for word in words[1:]:
        if word.startswith("hmpo["):
            assert set(word[5:-1].split(",")) <= set(extras), word
        elif word.endswith(".txt"):
            assert (ROOT / word).exists(), word
        elif word.startswith("torch=="):
            assert word in (ROOT / "requirements.txt").read_text().split(), word


def check_python(words: list[str]) -> None:
    if words[:2] == ["-m", "pip"]:
        check_pip(words[2:])
    for word in words:
        if word.endswith(".py"):
            ast.parse((ROOT / word).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [page for page in PAGES if (ROOT / page).exists()])
def test_docs_links(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        picture = target.endswith(".png") and not (ROOT / "docs" / "assets").exists()
        if "://" not in target and not picture:
            assert (ROOT / page).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("name", ["config", "metrics", "models"])
def test_generated_page_is_current(name: str) -> None:
    script = ROOT / "scripts" / f"make_{name}_page.py"
    run = subprocess.run(
        [sys.executable, str(script), "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_tables_are_those_of_the_committed_results() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/make_tables.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"run: python scripts/make_tables.py\n{done.stdout}{done.stderr}"
