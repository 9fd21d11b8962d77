"""Tokens to .80 on the demo's task: with and without dynamic sampling, and with resting prompts.

python benchmarks/dynamic_sampling.py                  what is missing of both parts, seeds 0 to 9
python benchmarks/dynamic_sampling.py listed 0 1       of one part and some seeds

The settings are those of `hmpo demo` with half of its prompts. Held-out success is measured
on the same 256 prompts every 10 updates, and a run ends at the first measurement of at least .80.
What it had spent is `num_tokens`, prompts and responses, those of dropped groups among them.
`fresh` draws a new prompt each time, `listed` 400 prompts again and again.
"""

import dataclasses
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, one_thread, save

from hmpo.cli.demo import GOAL, demo_config
from hmpo.config import BatchConfig, RunConfig, TaskConfig
from hmpo.run.loop import train
from hmpo.run.observer import Observer
from hmpo.tasks import make_task

NAME = "dynamic_sampling"
PROMPTS, EVERY, HELD_OUT, LISTED = 24, 10, 256, 400
SIDES: dict[str, dict[str, BatchConfig]] = {
    "fresh": {"plain": BatchConfig(), "filtered": BatchConfig(filter_groups=True)},
    "listed": {"plain": BatchConfig(), "rested": BatchConfig(rest=20)},
}


class AtGoal(Observer):
    """Asks the run to end at the first measurement that reaches the goal."""

    def __init__(self) -> None:
        self.rates: list[tuple[int, float]] = []

    def on_evaluation(self, step: int, name: str, evaluation: Any) -> None:
        """One measurement."""
        self.rates.append((step, evaluation.sampled.value))
        if evaluation.sampled.value >= GOAL and name != "after":
            os.kill(os.getpid(), signal.SIGTERM)


def config(part: str, side: str, seed: int, out: Path) -> RunConfig:
    """One run."""
    plain = demo_config(seed=seed, out=out, name=f"{part}-{side}-{seed}")
    size = {"every": EVERY, "prompts": HELD_OUT, "final_prompts": HELD_OUT}
    task = plain.task
    if part == "listed":
        task = TaskConfig(name="data", options=listed(out, seed), stop=("\n",))
    return dataclasses.replace(
        plain,
        threads=1,
        device="cpu",
        prompts_per_rollout=PROMPTS,
        samples=0,
        task=task,
        batch=SIDES[part][side],
        eval=dataclasses.replace(plain.eval, **size),
        checkpoint=dataclasses.replace(plain.checkpoint, every=0, keep_best=False),
    )


def listed(out: Path, seed: int) -> dict[str, str]:
    """Files of `LISTED` training prompts and the held-out ones of the demo's task."""
    task = make_task(TaskConfig(name="sort"), seed)
    options = {}
    for split, make, count in (("train", task.train, LISTED), ("held_out", task.heldout, HELD_OUT)):
        rows = {example.prompt: example.columns["answer"] for example in map(make, range(count))}
        lines = [json.dumps({"prompt": prompt, "answer": rows[prompt]}) for prompt in rows]
        file = out / f"{split}-{seed}.jsonl"
        file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        options[split] = str(file)
    return options


def measured(part: str, side: str, seed: int) -> dict[str, Any]:
    """One run, to the goal or to its end."""
    watch, began = AtGoal(), time.process_time()
    with tempfile.TemporaryDirectory() as place:
        result = train(config(part, side, seed, Path(place)), observer=watch)
        if result.status == "interrupted" and watch.rates[-1][1] < GOAL:
            raise SystemExit("interrupted from outside: this run counts for nothing")
        folder = result.folder
        lines = (folder / "telemetry.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [record for record in map(json.loads, lines) if record["type"] == "step"]
    firsts = [record for record in steps if record["minibatch"] == 0]
    return {
        "part": part,
        "side": side,
        "seed": seed,
        "reached": watch.rates[-1][1] >= GOAL,
        "updates": steps[-1]["step"] + 1,
        "tokens": steps[-1]["num_tokens"],
        "prompts": sum(record["n_groups"] for record in firsts),
        "dead": sum(record["adv/zero_frac"] for record in firsts) / len(firsts),
        "attempts": sum(record.get("batch/attempts", 1) for record in firsts) / len(firsts),
        "rested": sum(record.get("batch/rested", 0) for record in firsts),
        "rates": watch.rates,
        "cpu_s": round(time.process_time() - began, 1),
    }


def main(part: str, seeds: list[int]) -> None:
    """Run what is missing, the sides of a seed in an order drawn by it, and save after each."""
    one_thread()
    file = RESULTS / f"{NAME}.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    for seed in seeds:
        sides = list(SIDES[part])
        random.Random(seed).shuffle(sides)
        for side in sides:
            key = (part, side, seed)
            if any((row["part"], row["side"], row["seed"]) == key for row in rows):
                continue
            rows.append(measured(*key))
            print(rows[-1])
            rows.sort(key=lambda row: (row["part"], row["seed"], row["side"]))
            save(NAME, f"python benchmarks/{NAME}.py", rows, show=False)


if __name__ == "__main__":
    chosen = [int(word) for word in sys.argv[2:]] or list(range(10))
    for name in sys.argv[1:2] or SIDES:
        main(name, chosen)
