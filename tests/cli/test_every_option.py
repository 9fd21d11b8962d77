"""Every option of every command does something: what it changes is looked at, one by one.

`OPTIONS` is complete: an option without a check fails the first test.
"""

import dataclasses
import inspect
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hmpo.cli.demo
import hmpo.models
from hmpo import cli
from hmpo.cli.preflight import refuse_several_processes
from hmpo.config.identity import config_hash
from hmpo.errors import ConfigError
from hmpo.lab.study.outcomes import save_outcomes
from hmpo.lab.suite.reading import read_suite
from hmpo.lab.suite.watch import SuiteResult
from hmpo.models.paths import cache_folder
from hmpo.ranks.launched import device_of_rank, rank_of_launch
from hmpo.run import loop as run
from tests.agm.streams import EAGER
from tests.cli import experiment_options
from tests.faults.micro import micro_config, micro_policy, records, toml
from tests.faults.storage import fast_folder
from tests.lab.study.suites import make_outcome
from tests.lab.suite.small import data
from tests.lab.synthetic import make_run
from tests.test_surface import commands

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass
class Place:
    """Two finished runs, one with controllers, and a file that starts another."""

    root: Path
    policy: Path
    run: Path
    steered: Path
    file: Path
    capsys: Any = None
    monkeypatch: Any = None

    def hmpo(self, *words: object) -> str:
        """What a command prints; its exit code is 0."""
        self.capsys.readouterr()
        assert cli.main([str(word) for word in words]) == 0
        return self.capsys.readouterr().out

    def fails(self, *words: object) -> str:
        """The line that a command ends with, exit code 2."""
        self.capsys.readouterr()
        assert cli.main([str(word) for word in words]) == 2
        (line,) = self.capsys.readouterr().err.splitlines()
        return line


SMALL = {"updates": 4, "eval__final_prompts": 1}
STEERED = SMALL | {
    "updates": 12,
    "eval__every": 4,
    "optimizer__lr": 0.03,
    "agm": EAGER | {"mode": "apply", "controls": ["lr", "stop"]},
}


@pytest.fixture(scope="module")
def made():
    with fast_folder() as root:
        policy = micro_policy(root / "policy")
        first = run.train(micro_config(policy, root, "first", **SMALL)).folder
        steered = run.train(micro_config(policy, root, "steered", **STEERED)).folder
        file = root / "run.toml"
        file.write_text(toml(micro_config(policy, root, **SMALL)))
        yield Place(root, policy, first, steered, file)


@pytest.fixture
def place(made, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return dataclasses.replace(made, capsys=capsys, monkeypatch=monkeypatch)


# --- demo, init, train -----------------------------------------------------------------------


def demo(place: Place, *words: object) -> tuple[Any, Any]:
    """Configuration and screen with which `hmpo demo` would train."""
    seen: list[Any] = []

    def train(config, *, observer):
        seen.extend((config, observer))
        raise ConfigError("enough")

    place.monkeypatch.setattr(hmpo.cli.demo, "train", train)
    place.fails("demo", *words)
    return seen[0], seen[1]


def demo_seed(place: Place) -> None:
    assert [demo(place, *words)[0].seed for words in ((), ("--seed", 3))] == [0, 3]


def demo_updates(place: Place) -> None:
    assert [demo(place, *words)[0].updates for words in ((), ("--updates", 3))] == [130, 3]


def demo_out(place: Place) -> None:
    assert [demo(place, *words)[0].out for words in ((), ("--out", "x"))] == ["runs", "x"]


def demo_engine(place: Place) -> None:
    configs = [demo(place, *words)[0] for words in ((), ("--engine", "vllm"))]
    assert [config.rollout.engine for config in configs] == ["hmpo", "vllm"]


def demo_python(place: Place) -> None:
    config = demo(place, "--engine", "vllm", "--python", "/opt/vllm/bin/python")[0]
    assert config.rollout.python == "/opt/vllm/bin/python"
    assert "expected it with --engine vllm" in place.fails("demo", "--python", "python3")


def demo_quiet(place: Place) -> None:
    assert [demo(place, *words)[1].quiet for words in ((), ("--quiet",))] == [False, True]


def begun(place: Place, *words: object) -> tuple[dict[str, Any], str]:
    """What `hmpo init` writes for the micro policy and digits, and what it prints."""
    rows = [{"prompt": f"{n:03d}>", "answer": str(n)} for n in range(60)]
    Path("digits.json").write_text(json.dumps(rows))
    defaults = ("--model", place.policy, "--data", "digits.json")
    text = place.hmpo("init", *words, *(() if "--model" in words else defaults))
    name = next((str(word) for word in words if str(word).endswith(".toml")), "run.toml")
    return tomllib.loads(Path(name).read_text()), text


def init_out_overwrite(place: Place) -> None:
    assert begun(place)[0]["name"] == "run" and begun(place, "mine.toml")[0]["name"] == "mine"
    words = ("init", "--model", place.policy, "--data", "digits.json")
    assert "run.toml is there already" in place.fails(*words)
    place.hmpo(*words, "--overwrite")


def init_model_data(place: Place) -> None:
    found, _ = begun(place)
    assert found["policy"]["path"] == str(place.policy)
    assert found["task"]["options"]["train"] == "digits.json"
    assert "--model: not given" in place.fails("init", "other.toml", "--data", "digits.json")
    assert "--data: not given" in place.fails("init", "other.toml", "--model", place.policy)


def init_reward_preset_updates_set(place: Place) -> None:
    plain, _ = begun(place, "plain.toml")
    words = ("--reward", "exact", "--preset", "one-gpu", "--updates", 5, "--set", "seed=3")
    other, _ = begun(place, "other.toml", *words)
    assert plain["rewards"]["functions"] == ["last_number"] and "seed" not in plain
    assert other["rewards"]["functions"] == ["exact"] and other["seed"] == 3
    assert (plain["updates"], other["updates"]) == (100, 5)
    assert "dtype" not in plain["policy"] and other["policy"]["dtype"] == "bfloat16"


def trained(place: Place, name: str, *words: object) -> tuple[Path, str]:
    """A run of the file under a name of its own."""
    text = place.hmpo("train", place.file, "--set", f"name={name}", *words)
    return place.root / name, text


def train_config_set_report_quiet(place: Place) -> None:
    folder, loud = trained(place, "loud", "updates=2")
    assert (folder / "report.html").exists() and len(records(folder, "step")) == 2
    other, soft = trained(place, "soft", "--quiet", "--no-report")
    assert not (other / "report.html").exists() and len(records(other, "step")) == 4
    assert "held-out after" in loud and "held-out after" not in soft


def train_resume(place: Place) -> None:
    folder, _ = trained(place, "longer", "--quiet", "--no-report")
    words = ("train", "--resume", folder, "--set", "updates=5", "--quiet", "--no-report")
    assert "--allow-code" in place.fails(*words)
    place.hmpo(*words, "--allow-code")
    assert [r["step"] for r in records(folder, "step")] == [0, 1, 2, 3, 4]
    for name in ("name", "out"):
        line = place.fails("train", "--resume", folder, "--set", f"{name}=x")
        assert f"--set {name}: the folder behind --resume decides it" in line


def train_allow_changed(place: Place) -> None:
    lines = "".join(f'{{"prompt": "{i:03d}>"}}\n' for i in range(40))
    Path("prompts.jsonl").write_text(lines)
    options = f"task={{name = 'jsonl', options = {{path = '{Path.cwd()}/prompts.jsonl'}}}}"
    folder, _ = trained(place, "changed", options, "--quiet", "--no-report")
    Path("prompts.jsonl").write_text(lines.replace("000>", "999>"))
    words = ("train", "--resume", folder, "--allow-code", "--set", "updates=5", "--quiet")
    assert "has changed" in place.fails(*words, "--no-report")
    place.hmpo(*words, "--no-report", "--allow-changed")
    assert len(records(folder, "step")) == 5


def train_from_(place: Place) -> None:
    plain, _ = trained(place, "plain", "--quiet", "--no-report")
    again, _ = trained(place, "again", "--from", place.run, "--quiet", "--no-report")
    assert records(plain, "step")[0]["entropy"] != records(again, "step")[0]["entropy"]
    line = place.fails("train", place.file, "--from", place.run, "--set", "policy.start=x")
    assert "--set policy.start: --from" in line


def train_overwrite(place: Place) -> None:
    words = ("train", place.file, "--set", "name=twice", "updates=2", "--quiet", "--no-report")
    place.hmpo(*words)
    assert "holds a run already" in place.fails(*words)
    place.hmpo(*words, "--overwrite")


def train_dry_run(place: Place) -> None:
    text = place.hmpo("train", place.file, "--set", "name=dry", "--dry-run")
    assert "nothing was trained" in text and "low_digits" in text
    assert not (place.root / "dry").exists()


def train_ranks(place: Place) -> None:
    words = ("updates=2", "--no-report")
    one, _ = trained(place, "one", *words)
    command = [sys.executable, "-m", "hmpo", "train", str(place.file), "--set", "name=two", *words]
    subprocess.run([*command, "--ranks", "2"], check=True, capture_output=True)
    two = place.root / "two"
    tokens = [(f / "completions.jsonl").read_text() for f in (one, two)]
    assert tokens[0] == tokens[1]
    assert [records(folder, "run")[0]["world_size"] for folder in (one, two)] == [1, 2]
    assert "--ranks: got 0, expected an integer >= 1" in place.fails(
        "train", place.file, "--set", "name=none", "--ranks", 0
    )


# --- eval, report, fetch-model, doctor ---------------------------------------------------------


def eval_target_prompts_pass_at(place: Place) -> None:
    text = " ".join(place.hmpo("eval", place.run, "--allow-code", "--prompts", 5).split())
    assert "5 held-out prompts" in text and "pass@" not in text
    assert "a success from 1 on" in text
    assert "pass@2" in place.hmpo("eval", place.run, "--allow-code", "--prompts", 5, "--pass-at", 2)
    assert "is a model, not a run" in place.fails("eval", place.policy)
    target = f"{place.run}@3"
    shown = place.hmpo("eval", target, "--allow-code", "--prompts", 5)
    assert "first@3after3updates" in "".join(shown.split())
    assert "after4updates" in "".join(text.split()), "the newest checkpoint"
    line = place.fails("eval", f"{place.run}@2", "--allow-code")
    assert "got step 2, expected one of the saved" in line
    assert "leave out @3" in place.fails("eval", f"{place.policy}@3", "--task", "sort")


def eval_allow_code(place: Place) -> None:
    assert "--allow-code" in place.fails("eval", place.run)


def eval_task(place: Place) -> None:
    words = ("eval", place.policy, "--prompts", 3, "--set", "task.level=2", "--task")
    assert "on reverse" in place.hmpo(*words, "reverse")
    assert "on sort" in place.hmpo(*words, "sort")
    line = place.fails(
        "eval", place.run, "--allow-code", "--task", "sort", "--set", "task.name=reverse"
    )
    assert "--task: got 'sort' beside --set task.name" in line


def eval_set(place: Place) -> None:
    seen = []

    def noted(*_: object, config: Any, **__: object) -> None:
        seen.append(config)
        raise ZeroDivisionError

    place.monkeypatch.setattr("hmpo.run.evaluation.sample_and_score", noted)
    for target in ((place.policy, "--task", "reverse"), (place.run, "--allow-code")):
        for settings in ([], ["trainer.max_length=3", "trainer.temperature=0.5"]):
            with pytest.raises(ZeroDivisionError):
                cli.main(["eval", *map(str, target), "--set", "task.level=2", *settings])
    lengths = [(config.max_length, config.temperature) for config in seen]
    assert lengths == [(3, 1.0), (3, 0.5), (4, 1.0), (3, 0.5)]
    for name, instead in (
        ("eval.final_prompts=3", "give --prompts"),
        ("eval.pass_at=3", "give --pass-at"),
        ("trainer.top_k=3", "leave it out"),
        ("objective.p=0.5", "leave it out"),
        ("policy.start=x", "leave it out"),
        ("updates=3", "leave it out"),
    ):
        line = place.fails("eval", place.run, "--allow-code", "--set", name)
        assert line.startswith(f"hmpo: --set {name.partition('=')[0]}: ") and instead in line
    place.monkeypatch.undo()
    line = place.fails("eval", place.run, "--allow-code", "--set", "device=cuda:77")
    assert "device: got 'cuda:77'" in line


def export_run_step_out(place: Place) -> None:
    text = place.hmpo("export", place.run, "--step", 3, "--out", "at3")
    assert text == "policy after 3 updates: at3\n"
    assert place.hmpo("export", place.run, "--out", "newest") == "policy after 4 updates: newest\n"
    files = [Path(name, "model.safetensors").read_bytes() for name in ("at3", "newest")]
    assert files[0] != files[1] and not (place.run / "export").exists()


def export_merge(place: Place) -> None:
    line = place.fails("export", place.run, "--merge", "--out", "merged")
    assert "--merge: the run has no LoRA adapters" in line and "leave out --merge" in line


def export_overwrite(place: Place) -> None:
    words = ("export", place.run, "--out", "twice")
    place.hmpo(*words)
    assert "is there already" in place.fails(*words)
    place.hmpo(*words, "--overwrite")


def report_runs_out(place: Place) -> None:
    text = place.hmpo("report", place.run, place.steered, "--out", "both.html")
    assert "report: both.html" in text
    page = Path("both.html").read_text()
    assert "first" in page and "steered" in page and not (place.run / "report.html").exists()


def fetch_model_name_folder(place: Place) -> None:
    place.monkeypatch.setattr(hmpo.models, "fetch_smollm2", lambda folder=None: f"into {folder}")
    assert "into None" in place.hmpo("fetch-model")
    assert "into x" in place.hmpo("fetch-model", "smollm2", "--folder", "x")
    assert "expected smollm2" in place.fails("fetch-model", "llama")


def doctor_model_split(place: Place) -> None:
    bare, seen = place.hmpo("doctor"), place.hmpo("doctor", place.policy)
    split = place.hmpo("doctor", place.policy, "--split")
    assert "attention of" not in bare and "attention of" in seen
    assert "trained by" not in seen and "trained by" in split


def doctor_probe(place: Place) -> None:
    probed = place.hmpo("doctor", "--probe", place.policy)
    assert "ok             left padding: " in probed and "0 FAILED" in probed
    assert "expected one" in place.fails("doctor", "--probe")
    assert "expected one of them" in place.fails("doctor", place.policy, "--probe", "--split")


# --- agm -----------------------------------------------------------------------------------------


def agm(place: Place, *words: object) -> str:
    return place.hmpo("agm", *words)


def agm_replay_run_config_compare(place: Place) -> None:
    assert "equal to the" in agm(place, "replay", place.steered, "--compare")
    Path("agm.toml").write_text("[agm]\nadapter.gap_target = 1.0\n")
    words = ("agm", "replay", str(place.steered), "--config", "agm.toml", "--compare")
    assert cli.main(words) == 1
    assert agm(place, "replay", place.steered) != agm(place, "replay", place.run)


def agm_replay_out_until_state(place: Place) -> None:
    words = ("replay", place.steered, "--out")
    agm(place, *words, "whole.jsonl")
    agm(place, *words, "half.jsonl", "--until", 5, "--state-out", "state.json")
    agm(place, *words, "rest.jsonl", "--state-in", "state.json")
    whole, half, rest = (Path(f"{n}.jsonl").read_text() for n in ("whole", "half", "rest"))
    kept = [[line for line in log.splitlines() if '"decision"' in line] for log in (half, rest)]
    assert all(kept) and "\n".join([*kept[0], *kept[1]]) in whole


def agm_replay_strict(place: Place) -> None:
    folder = make_run(Path("long"), updates=120)
    lines = (folder / "telemetry.jsonl").read_text().splitlines()
    Path("log.jsonl").write_text("\n".join([*lines[:3], "{", *lines[3:]]) + "\n")
    assert "malformed: line 4" in agm(place, "replay", "log.jsonl")
    assert "log.jsonl" in place.fails("agm", "replay", "log.jsonl", "--strict")


def agm_any_adapter(place: Place) -> None:
    out = Path("sweep.csv")
    for name, rest in (
        ("replay", ()),
        ("summarize", ()),
        ("plot", ("--out", "x.png")),
        ("sweep", ("--grid", "dwell=1,2", "--out", out)),
    ):
        line = place.fails("agm", name, place.run, *rest, "--adapter", "trl")
        assert line != place.fails("agm", name, place.run, *rest, "--adapter", "unheard-of")


def agm_summarize_run(place: Place) -> None:
    assert agm(place, "summarize", place.steered) != agm(place, "summarize", place.run)


def agm_plot_run_out(place: Place) -> None:
    agm(place, "plot", place.steered, "--out", "a.png")
    agm(place, "plot", place.run, "--out", "b.png")
    assert Path("a.png").read_bytes() != Path("b.png").read_bytes()


def agm_sweep(place: Place) -> None:
    words = ("sweep", place.steered, "--grid")
    one = agm(place, *words, "adapter.gap_target=1e-9", "--out", "one.csv")
    two = agm(place, *words, "adapter.gap_target=1e-9,1e3")
    assert len(two.splitlines()) == len(one.splitlines()) + 1 == 3
    assert Path("one.csv").read_text() in one
    Path("agm.toml").write_text("[agm]\nadapter.dwell = 50\n")
    assert agm(place, *words, "adapter.gap_target=1e-9", "--config", "agm.toml") != one
    assert agm(place, "sweep", place.run, "--grid", "adapter.gap_target=1e-9") != one


def agm_diff(place: Place) -> None:
    assert "no difference" in agm(place, "diff", place.steered, place.steered)
    shown = []
    for words in ((), ("--lines", "1")):
        place.capsys.readouterr()
        assert cli.main(["agm", "diff", str(place.steered), str(place.run), *words]) == 1
        shown.append(place.capsys.readouterr().out.splitlines())
    assert len(shown[1]) < len(shown[0])


# --- experiment ----------------------------------------------------------------------------------


def experiment(place: Place, *words: object) -> tuple[str, dict[str, Any]]:
    """What `hmpo experiment run` prints, and what it would have run; nothing is run."""
    seen: dict[str, Any] = {}

    def run_suite(suite: Any, **given: Any) -> SuiteResult:
        seen.update(given, suite=suite)
        return SuiteResult(folder=given["out"] / suite.name, finished=1)

    def local(jobs: int, gpus: int) -> str:
        return f"{jobs} on {gpus} cards"

    place.monkeypatch.setattr("hmpo.lab.suite.run.run_suite", run_suite)
    place.monkeypatch.setattr("hmpo.lab.suite.run.local", local)
    if not Path("suite.json").exists():
        Path("suite.json").write_text(json.dumps(data(run={"policy": {"path": str(place.policy)}})))
    text = place.hmpo("experiment", "run", *words)
    return text, seen


def experiment_suite_only_seeds(place: Place) -> None:
    def runs(*words: object) -> list[tuple[str, int]]:
        return [(c.name, s) for c, s in experiment(place, "suite.json", *words)[1]["runs"]]

    assert len(runs()) == 8
    assert runs("--only", "hmpo+low", "--seeds", "101") == [("hmpo+low", 101)]
    two = runs("--only", "member=grpo", "--only", "rate=low", "--seeds", "100-101")
    assert two == [("grpo+low", 100), ("grpo+low", 101)]
    assert "no such cell" in place.fails("experiment", "run", "suite.json", "--only", "hmpo+lo")
    assert "nowhere.toml" in place.fails("experiment", "run", "nowhere.toml")


def experiment_jobs_gpus(place: Place) -> None:
    place.monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    found = [
        experiment(place, "suite.json", *words)[1]
        for words in (("--jobs", 3), ("--gpus", 2), ("--jobs", 3, "--gpus", 2))
    ]
    assert [seen["jobs"] for seen in found] == [3, 2, 3]
    assert [seen["maker"][-10:] for seen in found] == ["on 0 cards", *["on 2 cards"] * 2]
    words = ("experiment", "run", "suite.json")
    assert "--jobs: got 0" in place.fails(*words, "--jobs", 0)
    assert "--gpus: got 5, torch sees 4 here" in place.fails(*words, "--gpus", 5)


def experiment_on(place: Place) -> None:
    words = ("experiment", "run", "suite.json")
    experiment(place, "suite.json")
    assert "--on: got 'slurm', expected ray" in place.fails(*words, "--on", "slurm")
    assert "leave --jobs and --gpus out" in place.fails(*words, "--on", "ray", "--jobs", 2)


def experiment_again_out(place: Place) -> None:
    _, plain = experiment(place, "suite.json")
    text, other = experiment(place, "suite.json", "--again", "--out", "x")
    assert [seen["again"] for seen in (plain, other)] == [False, True]
    assert [str(seen["out"]) for seen in (plain, other)] == ["experiments", "x"]
    assert "x/small" in text


def experiment_sample(place: Place) -> None:
    """Two of the committed runs, and a table of what they came to beside their outcomes."""
    path = Path("sampled.json")
    settings = data(run={"policy": {"path": str(place.policy)}}, outcomes="kept.jsonl")
    path.write_text(json.dumps(settings))
    Path("kept.jsonl").touch()
    cells = read_suite(str(path)).cells
    made = [
        dataclasses.replace(
            make_outcome(c.name, seed, 0.5),
            config_hash=config_hash(c.run_config(seed, ".")),
            updates=c.config.updates,
        )
        for c in cells
        for seed in c.seeds
    ]
    save_outcomes(Path("kept.jsonl"), made)
    _, seen = experiment(place, "sampled.json", "--again", "--sample", 2)
    assert len(seen["runs"]) == 2 and seen["again"] is True
    words = ("experiment", "run", "sampled.json", "--sample")
    assert "only --again reads it" in place.fails(*words, 2)
    assert "expected 1 to 8" in place.fails(*words, 9, "--again")


def experiment_quiet(place: Place) -> None:
    quiet = [
        experiment(place, "suite.json", *words)[1]["watcher"].quiet for words in ((), ("--quiet",))
    ]
    assert quiet == [False, True]


def experiment_dry_run(place: Place) -> None:
    settings = data()["run"] | {"policy": {"path": str(place.policy)}}
    Path("suite.json").write_text(json.dumps(data(run=settings)))
    text, seen = experiment(place, "suite.json", "--dry-run", "--only", "member=grpo")
    assert "suite small: 2 cells, 4 of 4 runs to make" in text and not seen
    assert "grpo+low: 2 of 2 runs, " in text and "in all about " in text
    assert not Path("experiments").exists()
    for words in (("--on", "ray"), ("--quiet",)):
        assert words[0] in place.fails("experiment", "run", "suite.json", "--dry-run", *words)


OPTIONS: dict[str, dict[str, Callable[[Place], None]]] = {
    "demo": {
        "seed": demo_seed,
        "updates": demo_updates,
        "out": demo_out,
        "engine": demo_engine,
        "python": demo_python,
        "quiet": demo_quiet,
    },
    "init": {
        "out": init_out_overwrite,
        "overwrite": init_out_overwrite,
        "model": init_model_data,
        "data": init_model_data,
        "reward": init_reward_preset_updates_set,
        "preset": init_reward_preset_updates_set,
        "updates": init_reward_preset_updates_set,
        "set": init_reward_preset_updates_set,
    },
    "train": {
        "config": train_config_set_report_quiet,
        "set": train_config_set_report_quiet,
        "report": train_config_set_report_quiet,
        "quiet": train_config_set_report_quiet,
        "resume": train_resume,
        "from_": train_from_,
        "overwrite": train_overwrite,
        "allow_code": train_resume,
        "allow_changed": train_allow_changed,
        "dry_run": train_dry_run,
        "ranks": train_ranks,
    },
    "eval": {
        "target": eval_target_prompts_pass_at,
        "prompts": eval_target_prompts_pass_at,
        "pass_at": eval_target_prompts_pass_at,
        "task": eval_task,
        "set": eval_set,
        "allow_code": eval_allow_code,
    },
    "export": {
        "run": export_run_step_out,
        "step": export_run_step_out,
        "out": export_run_step_out,
        "merge": export_merge,
        "overwrite": export_overwrite,
    },
    "report": {"runs": report_runs_out, "out": report_runs_out},
    "fetch-model": {"name": fetch_model_name_folder, "folder": fetch_model_name_folder},
    "doctor": {"model": doctor_model_split, "split": doctor_model_split, "probe": doctor_probe},
    "experiment run": {
        "suite": experiment_suite_only_seeds,
        "only": experiment_suite_only_seeds,
        "seeds": experiment_suite_only_seeds,
        "jobs": experiment_jobs_gpus,
        "gpus": experiment_jobs_gpus,
        "on": experiment_on,
        "dry_run": experiment_dry_run,
        "again": experiment_again_out,
        "sample": experiment_sample,
        "out": experiment_again_out,
        "quiet": experiment_quiet,
    },
    **experiment_options.OPTIONS,
    "agm replay": {
        "run": agm_replay_run_config_compare,
        "config": agm_replay_run_config_compare,
        "compare": agm_replay_run_config_compare,
        "out": agm_replay_out_until_state,
        "until": agm_replay_out_until_state,
        "state_in": agm_replay_out_until_state,
        "state_out": agm_replay_out_until_state,
        "strict": agm_replay_strict,
        "adapter": agm_any_adapter,
    },
    "agm summarize": {"run": agm_summarize_run, "adapter": agm_any_adapter},
    "agm plot": {"run": agm_plot_run_out, "out": agm_plot_run_out, "adapter": agm_any_adapter},
    "agm sweep": {
        "run": agm_sweep,
        "grid": agm_sweep,
        "out": agm_sweep,
        "config": agm_sweep,
        "adapter": agm_any_adapter,
    },
    "agm diff": {"first": agm_diff, "second": agm_diff, "lines": agm_diff},
}
"""By command and option, the check that it does something."""
CHECKS = {check.__name__: check for options in OPTIONS.values() for check in options.values()}


def test_every_option_of_every_command_is_looked_at() -> None:
    offered = {
        name: set(inspect.signature(function).parameters) for name, function in commands().items()
    }
    assert {name: set(options) for name, options in OPTIONS.items()} == offered


@pytest.mark.parametrize("name", CHECKS)
def test_each_option_changes_what_a_command_does(place: Place, name: str) -> None:
    CHECKS[name](place)


# --- the environment -----------------------------------------------------------------------------


def cache(monkeypatch, tmp_path) -> list[Any]:
    before = cache_folder()
    monkeypatch.setenv("HMPO_CACHE", str(tmp_path))
    return [before, cache_folder()]


def world_size(monkeypatch, tmp_path) -> list[Any]:
    refuse_several_processes("a suite")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match=r"^WORLD_SIZE = 2: ") as caught:
        refuse_several_processes("a suite")
    return [None, str(caught.value)]


def rank(monkeypatch, tmp_path) -> list[int]:
    before = rank_of_launch()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    return [before, rank_of_launch()]


def local_rank(monkeypatch, tmp_path) -> list[str]:
    before = device_of_rank("cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_of_rank("cpu") == "cpu"
    return [before, device_of_rank("cuda")]


ENVIRONMENT = {
    "HMPO_CACHE": cache,
    "LOCAL_RANK": local_rank,
    "LOCAL_WORLD_SIZE": "tests/ranks/test_launched.py",
    "RANK": rank,
    "WORLD_SIZE": world_size,
    "MASTER_ADDR": "tests/ranks/test_start.py",
    "MASTER_PORT": "tests/ranks/test_start.py",
    "TORCHELASTIC_RESTART_COUNT": "tests/ranks/test_launched.py",
    "TORCHELASTIC_USE_AGENT_STORE": "tests/ranks/test_start.py",
    "HMPO_MATMUL": "tests/logprobs/test_matmul.py",
    "OMP_WAIT_POLICY": "tests/cli/test_cli.py",
    "RAY_USAGE_STATS_ENABLED": "tests/lab/suite/test_on_ray.py",
    "HF_HUB_OFFLINE": "tests/models/test_hub.py",
    "TOKENIZERS_PARALLELISM": "tests/cli/test_cli.py",
    "OPENAI_BASE_URL": "tests/rewards/library/test_judging.py",
    "OMP_NUM_THREADS": "tests/lab/suite/test_again.py",
}
"""Variables of the environment that the package reads or sets, and who looks at each."""
READ = re.compile(r'environ(?:\.get|\.setdefault|\.pop)?[(\[]\s*"(\w+)"')


def test_every_variable_that_the_package_names_is_looked_at() -> None:
    found = set()
    for path in (ROOT / "hmpo").rglob("*.py"):
        found |= set(READ.findall(path.read_text(encoding="utf-8")))
    assert found == ENVIRONMENT.keys()
    for name, test in ENVIRONMENT.items():
        if isinstance(test, str):
            assert name in (ROOT / test).read_text(encoding="utf-8"), name
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    named = {n for page in pages for n in re.findall(r"\bHMPO_[A-Z]+\b", page.read_text())}
    assert named <= found, "what the pages name is read"


@pytest.mark.parametrize("name", [name for name, test in ENVIRONMENT.items() if callable(test)])
def test_each_variable_changes_something(name: str, monkeypatch, tmp_path) -> None:
    monkeypatch.delenv(name, raising=False)
    before, after = ENVIRONMENT[name](monkeypatch, tmp_path)
    assert before != after
