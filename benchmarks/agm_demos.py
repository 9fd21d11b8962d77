"""What the controllers do to real runs: demonstrations that can fail, three seeds each.

python benchmarks/agm_demos.py start                     fit the start policy of part b
python benchmarks/agm_demos.py a --seed 0 --mode off     one piece: one run, one thread
python benchmarks/agm_demos.py all --jobs 2              every piece that has no file yet
python benchmarks/agm_demos.py collect                   merge the pieces that there are

a       8 times the default learning rate, warmed up over 20 updates: does `apply` stay alive?
a-cold  8 times the demo's learning rate, warmed up over 2: is there time to act?
b       sort 8 digits from a policy that hardly can. `off` trains on 8 digits alone, `apply`
        starts with 6 and lets the curriculum go up. Tokens until an evaluation reaches TARGET.
c       the demo's learning rate and schedule: does `apply` harm a healthy run?

Seeds share the order of prompts and the seed of sampling between modes. Settings, target and
lengths of the runs were chosen on seed 9, which is not among the three.
"""

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

from common import RESULTS, commit, one_thread

from hmpo.config import (
    EvalConfig,
    OptimizerConfig,
    PolicyConfig,
    RunConfig,
    TaskConfig,
    TrainerConfig,
)
from hmpo.config.agm import CurriculumConfig, RegimeConfig
from hmpo.config.control import ControlConfig
from hmpo.config.members import hmpo as hmpo_member
from hmpo.models import save_policy
from hmpo.models.pretrain import fit_supervised
from hmpo.models.tiny import character_tokenizer, tiny_llama
from hmpo.run.environment import describe_environment
from hmpo.run.loop import train
from hmpo.tasks import make_task
from hmpo.tasks.alphabet import ALPHABET

PIECES = RESULTS / "agm"
START = Path("runs") / "agm-demos-start"
PARTS = {"a": 80, "a-cold": 24, "b": 100, "c": 80}
"""Updates of each part."""
SEEDS, MODES = (0, 1, 2), ("off", "apply")
TOP, FIRST, TARGET = 8, 6, 0.20
"""Part b: level to learn, level of the curriculum's start, sampled success to reach."""
FITTED, FIT_UPDATES = range(1, 11), 80
"""Lengths of the examples that the start policy of part b is fitted to, and for how long."""
AGM = ControlConfig(mode="apply")
"""Parts a and c: the defaults, which set the learning rate and may end the run."""
CURRICULUM = ControlConfig(
    mode="apply",
    controls=("level",),
    first_level=FIRST,
    dwell=3,
    regime=RegimeConfig(min_samples=5),
    curriculum=CurriculumConfig(promote=0.25, demote=0.02, dwell=3, mix_previous=0.0),
)
"""Part b: quicker than the defaults, for a run of 50 rollouts."""


def settings(part: str, seed: int, mode: str, out: Path) -> RunConfig:
    """The run of a part: the demo's, smaller."""
    rates = {"a": 8e-4, "a-cold": 1.6e-3, "b": 2e-4, "c": 2e-4}
    curriculum = part == "b"
    agm = ControlConfig() if mode == "off" else CURRICULUM if curriculum else AGM
    return RunConfig(
        name="run",
        out=str(out),
        seed=seed,
        updates=PARTS[part],
        prompts_per_rollout=32,
        policy=PolicyConfig(path=str(START.absolute()) if curriculum else "tiny-sort"),
        task=TaskConfig(name="sort", level=TOP if curriculum else 10),
        objective=hmpo_member(),
        trainer=TrainerConfig(
            group_size=8,
            max_length=12,
            minibatches=2,
            lr_schedule="linear" if part == "c" else "constant",
            warmup_updates=20 if part == "a" else 2,
        ),
        optimizer=OptimizerConfig(lr=rates[part]),
        agm=agm,
        eval=EvalConfig(
            every=10 if curriculum else 8,
            prompts=512 if curriculum else 128,
            final_prompts=1024,
            batch_size=256,
        ),
    )


def fit_start() -> None:
    """Fit the start policy of part b to sorting 1 to 10 digits, and stop early."""
    tokenizer = character_tokenizer(ALPHABET)
    model = tiny_llama(len(tokenizer), seed=1, hidden_size=128, layers=4)
    tasks = [make_task(TaskConfig(name="sort", level=level), 1) for level in FITTED]

    def solved() -> Iterator[tuple[str, str]]:
        rng = random.Random(0)
        for index in count():
            task = rng.choice(tasks)
            example = task.train(index)
            yield example.prompt, example.columns["answer"] + task.stop[0]

    fit_supervised(model, tokenizer, solved(), steps=FIT_UPDATES, batch_size=64, lr=2e-3)
    save_policy(model, tokenizer, START)
    print(f"written: {START}")


def curve(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sampled success by update and tokens so far, with counts and 95 % Wilson interval."""
    tokens, points = 0, []
    for record in records:
        if record["type"] == "step":
            tokens += record["n_tokens"]
        elif record["type"] == "eval":
            ends = {f"success{k}": record[f"eval/sampled{k}"] for k in ("", "_k", "_n")}
            ends |= {f"success{k}": round(record[f"eval/sampled{k}"], 4) for k in ("_low", "_high")}
            points.append({"update": record["step"], "tokens": tokens} | ends)
    return points


def applied(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The decisions that changed the run."""
    names = ("lr_mult", "level", "stop", "regime")
    return [
        {"update": record["step"], "reason": record["reason"]}
        | {name: record[f"decision/{name}"] for name in names if f"decision/{name}" in record}
        for record in records
        if record["type"] == "decision" and record["applied"]
    ]


def piece(part: str, seed: int, mode: str) -> dict[str, Any]:
    """One run and what its telemetry says."""
    began, name = time.process_time(), commit()
    with tempfile.TemporaryDirectory() as folder:
        config = settings(part, seed, mode, Path(folder))
        with contextlib.chdir(folder):
            result = train(config)
        lines = (result.folder / "telemetry.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record for record in records if record["type"] == "step"]
    points = curve(records)
    series = ("reward/mean", "ratio/log_gap_mean", "lr")
    return {
        "part": part,
        "seed": seed,
        "mode": mode,
        "commit": name,
        "status": result.status,
        "updates": len(steps),
        "tokens": points[-1]["tokens"],
        "curve": points,
        "applied": applied(records),
        "nonfinite": sum(step["nonfinite"] for step in steps),
        "cpu_s": round(time.process_time() - began, 1),
        **{f"{key}_by_update": [float(f"{step[key]:.4g}") for step in steps] for key in series},
        "level_by_update": [step.get("curriculum/level", TOP) for step in steps],
    }


def write_piece(part: str, seed: int, mode: str) -> None:
    """Run a piece and keep what it says."""
    one_thread()
    row = piece(part, seed, mode)
    PIECES.mkdir(parents=True, exist_ok=True)
    path = PIECES / f"{part}-{seed}-{mode}.json"
    path.write_text(json.dumps(row) + "\n")
    print(f"written: {path.name}: {row['curve'][-1]}, {row['cpu_s']} CPU s", flush=True)


def run_all(jobs: int) -> None:
    """Every piece without a file, each in a process of its own, seeds side by side."""
    todo = [(part, seed, mode) for part in PARTS for seed in SEEDS for mode in MODES]
    todo = [p for p in todo if not (PIECES / f"{p[0]}-{p[1]}-{p[2]}.json").exists()]

    def run(one: tuple[str, int, str]) -> None:
        part, seed, mode = one
        arguments = [part, "--seed", str(seed), "--mode", mode]
        subprocess.run([sys.executable, __file__, *arguments], check=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, todo))


def collect() -> None:
    """One result file of all pieces that there are."""
    files = [PIECES / f"{p}-{s}-{m}.json" for p in PARTS for s in SEEDS for m in MODES]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        print("missing: " + ", ".join(missing))
    rows = [json.loads(file.read_text()) for file in files if file.exists()]
    for row in rows:
        reached = [point for point in row["curve"] if point["success"] >= TARGET]
        row["tokens_to_target"] = reached[0]["tokens"] if reached and row["part"] == "b" else None
    facts = {
        "command": "python benchmarks/agm_demos.py all",
        "commit": ", ".join(dict.fromkeys(row["commit"] for row in rows)),
        "environment": describe_environment(),
        "facts": {"target": TARGET, "top": TOP, "first": FIRST},
        "rows": rows,
    }
    path = RESULTS / "agm_demos.json"
    path.write_text(json.dumps(facts) + "\n")
    print(f"written: {path.name}")


def main() -> None:
    """Do what the command line names."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("what", choices=[*PARTS, "start", "all", "collect"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=MODES, default="off")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    if args.what == "start":
        one_thread()
        fit_start()
    elif args.what == "all":
        run_all(args.jobs)
    elif args.what == "collect":
        collect()
    else:
        write_piece(args.what, args.seed, args.mode)


if __name__ == "__main__":
    main()
