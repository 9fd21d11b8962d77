"""Whole runs through the command line: success before and after, and what they cost.

python benchmarks/whole_runs.py demo 0 1 2                  three seeds of `hmpo demo`
HMPO_VLLM_PYTHON=.venv-vllm/bin/python python benchmarks/whole_runs.py demo_vllm
                                                            one, its rollouts drawn by vLLM
python benchmarks/whole_runs.py smollm2_largest             an example, by the name of its file
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, commit

from hmpo.run.environment import describe_environment

KEPT = ("config.json", "environment.json", "telemetry.jsonl", "timing.jsonl", "completions.jsonl")


def cpu_seconds() -> float:
    """CPU time of all finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(arguments: list[str]) -> dict[str, float]:
    """Run one hmpo command; what it cost."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    subprocess.run([sys.executable, "-m", "hmpo.cli", *arguments], check=True)
    return {
        "cpu_s": round(cpu_seconds() - cpu, 1),
        "wall_s": round(time.perf_counter() - wall, 1),
    }


def evaluations(folder: Path) -> dict[str, Any]:
    """The first and the last evaluation of a run."""
    lines = (folder / "telemetry.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    evals = [record for record in records if record["type"] == "eval"]
    keep = ("eval/sampled", "eval/greedy", "eval/pass_at_k")
    rows = {}
    for name, record in (("before", evals[0]), ("after", evals[-1])):
        rows[name] = {k: v for k, v in record.items() if k.startswith(keep) or k == "eval/k"}
    updates = sum(record["type"] == "step" for record in records)
    return {"updates": updates, **rows}


def keep_records(folder: Path, kept: Path) -> None:
    """Copy a run's records; the places of this machine are left out."""
    kept.mkdir(parents=True, exist_ok=True)
    for file in KEPT:
        shutil.copy(folder / file, kept / file)
    config = json.loads((kept / "config.json").read_text()) | {"out": "runs"}
    if "relative_to" in config:
        config["relative_to"] = ["examples"]
    if config.get("rollout", {}).get("python"):
        config["rollout"]["python"] = ".venv-vllm/bin/python"
    (kept / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def measure(name: str, arguments: list[str], folder: Path, kept_as: str) -> dict[str, Any]:
    """Run, keep the run's records beside the results, and return one row."""
    cost = run(arguments)
    keep_records(folder, RESULTS / "runs" / kept_as)
    return {"name": name, **cost, **evaluations(folder)}


def main() -> None:
    """Measure what the command line names."""
    what, seeds = sys.argv[1], [int(seed) for seed in sys.argv[2:]] or [0]
    began, rows = commit(), []
    with tempfile.TemporaryDirectory() as out:
        for seed in seeds:
            target = Path(out) / str(seed)
            if what.startswith("demo"):
                arguments = ["demo", "--seed", str(seed), "--out", str(target)]
                if what == "demo_vllm":
                    vllm = str(Path(os.environ["HMPO_VLLM_PYTHON"]).absolute())
                    arguments += ["--engine", "vllm", "--python", vllm]
                folder = target / "demo"
            else:
                arguments = ["train", f"examples/{what}.toml", "--no-report"]
                arguments += ["--set", f"out={target}", f"name={what}", f"seed={seed}"]
                folder = target / what
            kept = f"{what}-{seed}" if len(seeds) > 1 else what
            rows.append({"seed": seed} | measure(what, arguments, folder, kept))
    facts = {
        "command": " ".join(["python", "benchmarks/whole_runs.py", *sys.argv[1:]]),
        "commit": began,
        "environment": describe_environment(),
        "rows": rows,
    }
    (RESULTS / f"{what}.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
