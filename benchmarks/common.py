"""What every benchmark shares: alternating runs, medians of CPU time, a result file."""

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from hmpo.environment import describe_environment

RESULTS = Path(__file__).parent / "results"


def alternate(sides: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each side, run in turn so that a noisy machine hits all alike."""
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            began = time.process_time()
            run()
            seconds[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def commit() -> str:
    """The commit that was measured, with a mark where more than results and pages has changed."""
    name = _git("describe", "--always", "--abbrev=12")
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs")
    return (name + ("-dirty" if changed else "")) or "unknown"


def _git(*arguments: str) -> str:
    """What git says, or nothing."""
    return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()


def save(name: str, command: str, rows: list[dict[str, Any]]) -> Path:
    """Write `results/NAME.json`: command, commit, machine, rows."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    facts = {
        "command": command,
        "commit": commit(),
        "environment": describe_environment(),
        "rows": rows,
    }
    path.write_text(json.dumps(facts, indent=2) + "\n")
    for row in rows:
        print(row)
    print(f"written: {path.relative_to(Path.cwd())}")
    return path


def one_thread() -> None:
    """Benchmarks run on one thread; process CPU time then compares like with like."""
    torch.set_num_threads(1)
