"""Suites small enough to be run many times: eight micro runs of three updates."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hmpo.lab.suite.execute import execute
from hmpo.lab.suite.folder import SuiteFolder
from hmpo.lab.suite.job import Job
from hmpo.lab.suite.reading import Suite, read_suite
from hmpo.lab.suite.watch import Watcher
from tests.faults.micro import micro_policy

FACTORS = {
    "member": {
        "grpo": {"objective": {"member": "grpo"}},
        "hmpo": {"objective": {"member": "hmpo"}},
    },
    "rate": {"low": {"optimizer": {"lr": 0.001}}, "high": {"optimizer": {"lr": 0.01}}},
}
NAMES = ["grpo+low", "grpo+high", "hmpo+low", "hmpo+high"]


def data(**changes: Any) -> dict[str, Any]:
    """A suite of four cells and two seeds; its policy is beside the file."""
    run = {
        "updates": 3,
        "prompts_per_rollout": 3,
        "device": "cpu",
        "policy": {"path": "policy"},
        "task": {"name": "reverse", "level": 2},
        "rewards": {"functions": ["tests.faults.rewards:low_digits"]},
        "trainer": {"group_size": 4, "max_length": 4, "minibatches": 2},
        "eval": {"prompts": 2, "final_prompts": 3, "every": 1},
        "checkpoint": {"every": 1},
    }
    whole = {
        "name": "small",
        "seeds": {"first": 100, "count": 2},
        "run": run,
        "factors": FACTORS,
        "compare": {"factor": "member", "to": ["grpo"]},
    }
    return whole | changes


def write(folder: Path, **changes: Any) -> Path:
    """The suite as a file, beside its policy."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "policy").exists():
        micro_policy(folder / "policy")
    path = folder / "suite.json"
    path.write_text(json.dumps(data(**changes)))
    return path


def suite(folder: Path, **changes: Any) -> Suite:
    """The suite, read."""
    return read_suite(str(write(folder, **changes)))


QUICK = data()["run"] | {"updates": 2, "eval": {"prompts": 2, "final_prompts": 3}}
"""Settings of runs that take less still."""
MAD = {
    "optimizer": {"lr": 1e37},
    "trainer": {"qk_clip": False, "on_nonfinite": "stop"},
}
"""Settings under which a run ends at its first numbers that are not finite."""


def in_process(
    place: SuiteFolder, runs: list[Job], watcher: Watcher, stopped: Callable[[], int | None]
) -> str:
    """Makes runs in this process, which costs no imports."""
    for job in runs:
        ended = execute(job, lambda message: None)
        if ended["status"] == "impossible":
            return ended["reason"]
    return ""


def outcomes(folder: Path) -> dict[str, dict[str, Any]]:
    """Every outcome below a suite's folder but what it cost, by the path of its run."""
    found = {}
    for path in sorted(folder.glob("runs/*/*/outcome.json")):
        outcome = json.loads(path.read_text())
        outcome.pop("cost")
        found[path.parent.relative_to(folder / "runs").as_posix()] = outcome
    return found
