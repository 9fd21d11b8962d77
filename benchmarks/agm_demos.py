"""What the controllers do to real runs: three demonstrations, one piece at a time.

python benchmarks/agm_demos.py a --seed 0 --mode off      one run of one part

Part a: the demo's policy and task at 8 times its learning rate. Part c: the same at the demo's
own learning rate. Each piece is one process on one thread and writes
`benchmarks/results/agm/PART-SEED-MODE.json`.
"""

import argparse
import contextlib
import json
import tempfile
import time
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
from hmpo.members import hmpo as hmpo_member
from hmpo.run import train

PIECES = RESULTS / "agm"
LR = 2e-4
"""Learning rate of `hmpo demo`."""
RATES = {"a": 8 * LR, "c": LR}
UPDATES, PROMPTS, GROUP = 80, 32, 8


def settings(part: str, seed: int, out: Path) -> RunConfig:
    """The run of a part: the demo's, smaller."""
    return RunConfig(
        name="run",
        out=str(out),
        seed=seed,
        updates=UPDATES,
        prompts_per_rollout=PROMPTS,
        reference="none",
        policy=PolicyConfig(path="tiny-sort"),
        task=TaskConfig(name="sort"),
        objective=hmpo_member(),
        trainer=TrainerConfig(group_size=GROUP, max_length=12, minibatches=2, warmup_updates=2),
        optimizer=OptimizerConfig(lr=RATES[part]),
        eval=EvalConfig(every=8, prompts=128, final_prompts=512, batch_size=256),
    )


def evaluations(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sampled success by update, with its counts and 95 % Wilson interval."""
    keep = ("", "_k", "_n", "_low", "_high")
    return [
        {"update": record["step"]} | {f"success{k}": record[f"eval/sampled{k}"] for k in keep}
        for record in records
        if record["type"] == "eval"
    ]


def piece(part: str, seed: int, mode: str) -> dict[str, Any]:
    """One run and what its telemetry says."""
    began, name = time.process_time(), commit()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        result = train(settings(part, seed, Path(folder)))
        lines = (result.folder / "telemetry.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record for record in records if record["type"] == "step"]
    return {
        "part": part,
        "seed": seed,
        "mode": mode,
        "commit": name,
        "updates": len(steps),
        "evals": evaluations(records),
        "tokens": sum(step["n_tokens"] for step in steps),
        "cpu_s": round(time.process_time() - began, 1),
    }


def main() -> None:
    """Run one piece."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("part", choices=sorted(RATES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=["off"], default="off")
    args = parser.parse_args()
    one_thread()
    row = piece(args.part, args.seed, args.mode)
    PIECES.mkdir(parents=True, exist_ok=True)
    path = PIECES / f"{args.part}-{args.seed}-{args.mode}.json"
    path.write_text(json.dumps(row, indent=2) + "\n")
    print(f"written: {path.relative_to(Path.cwd())}: {row['evals'][-1]}")


if __name__ == "__main__":
    main()
