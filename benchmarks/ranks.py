"""One process, two ranks, four: the same tokens, the same weights, and how much faster.

python -m benchmarks.ranks                  all of it; results as they come
python -m benchmarks.ranks equal speed      parts of it; the rows of the others stay

equal: every case of tests/trainer/rank_cases.py and rank_grid.py (members x exponent sources,
       x advantage estimators; bounds, corrections, optimizers), two rollouts in float64.
controlled: whole runs in float32 whose controllers move learning rate, exponent, clip and level.
long: 50 updates of some members in float32, weights against those of one process.
shard: see ranks_shard.py.
speed: rollouts and updates of a 4.9M policy, one rank on one core against two on two, in turn.
alone: what a process group of one rank costs against none.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from common import RESULTS, commit, save

from benchmarks import ranks_shard
from hmpo.config import PowerMeanConfig, members
from hmpo.config.objective import ExponentConfig, ObjectiveConfig
from hmpo.trainer.power_mean import PowerMeanTrainer
from tests.ranks.processes import run_ranks
from tests.run.several import controlled as controlled_run
from tests.run.several import decided, ended, train
from tests.run.several import weights as saved_weights
from tests.support import tiny_llama

SIZES = (2, 4)
ROUNDS = 5
"""Turns of both sides."""
LONG = {
    "hmpo": members.hmpo(),
    "grpo": members.grpo(),
    "gspo": members.gspo(),
    "sign-aware": members.sign_aware(),
    "cispo": members.cispo(),
    "learnable exponent": ObjectiveConfig(exponent=ExponentConfig(kind="learnable")),
}


def furthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest distance of a matrix, over its norm."""
    return max(float((other[k] - one[k]).norm() / one[k].norm()) for k in one)


def equal(folder: Path) -> list[dict[str, Any]]:
    """Weights and tokens of every case in float64."""
    rows: list[dict[str, Any]] = []
    for module in ("tests.trainer.rank_cases", "tests.trainer.rank_grid"):
        runs = {
            size: torch.load(
                run_ranks(module, size, folder / module, timeout=3000)[0], weights_only=False
            )
            for size in (1, *SIZES)
        }
        for name, one in runs[1].items():
            row: dict[str, Any] = {"part": "equal", "case": name}
            for size in SIZES:
                other = runs[size][name]
                row[f"ranks_{size}"] = {
                    "same_tokens": _tokens(one) == _tokens(other),
                    "weights": furthest(one["weights"], other["weights"]),
                }
            rows.append(row)
    return rows


def _tokens(run: dict[str, Any]) -> list[Any]:
    """The completions of a case."""
    return run.get("completions") or [sample["completion"] for sample in run["responses"]]


def controlled(folder: Path) -> list[dict[str, Any]]:
    """Decisions, completions and weights of runs under live controllers."""
    folder.mkdir(parents=True)
    file = controlled_run(folder)
    sizes = (1, *SIZES)
    for size in sizes:
        ended(train(file, f"ranks-{size}", size))
    one, *others = [folder / f"ranks-{size}" for size in sizes]
    row: dict[str, Any] = {"part": "controlled", "decisions": len(decided(one))}
    for size, other in zip(SIZES, others):
        row[f"ranks_{size}"] = {
            "same_decisions": decided(one) == decided(other),
            "same_tokens": (one / "completions.jsonl").read_bytes()
            == (other / "completions.jsonl").read_bytes(),
            "weights": furthest(saved_weights(one), saved_weights(other)),
        }
    return [row]


def long(folder: Path) -> list[dict[str, Any]]:
    """Weights after 50 updates in float32."""
    runs = {
        size: torch.load(run_ranks("benchmarks.ranks", size, folder)[0], weights_only=False)
        for size in (1, *SIZES)
    }
    return [
        {"part": "long", "case": name, "updates": runs[1][name]["updates"]}
        | {
            f"ranks_{size}": {
                "same_tokens": runs[size][name]["tokens"] == one["tokens"],
                "weights": furthest(one["weights"], runs[size][name]["weights"]),
            }
            for size in SIZES
        }
        for name, one in runs[1].items()
    ]


def many_updates() -> dict[str, Any]:
    """What one rank finds: 25 rollouts of two updates for each member."""
    found = {}
    for name, objective in LONG.items():
        model = tiny_llama(seed=4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, eps=1e-6)
        config = PowerMeanConfig(
            objective=objective, group_size=4, max_length=16, eos_token=2, minibatches=2
        )
        trainer = PowerMeanTrainer(model, None, optimizer, config, lengths)
        tokens = []
        for k in range(25):
            trainer.update_step([[3 + k % 30, 9], [7, 7, 5], [11], [4, 8, 15, 16], [23, 5]])
            tokens.append([sample["completion"] for sample in trainer.samples])
        weights = {k: v.detach() for k, v in model.named_parameters()}
        found[name] = {"tokens": tokens, "weights": weights, "updates": trainer.step}
    return found


def lengths(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
    """A reward that needs no task."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def policy() -> nn.Module:
    """4.9 million parameters."""
    return tiny_llama(
        vocab=512, seed=1, spread=0.02, hidden_size=256, intermediate_size=688,
        num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip


def seconds(rollouts: int = 3) -> float:
    """Wall seconds of a rollout and its two updates, the median of some after a first one."""
    model = policy()
    config = PowerMeanConfig(group_size=8, max_length=64, eos_token=2, minibatches=2)
    trainer = PowerMeanTrainer(
        model, None, torch.optim.AdamW(model.parameters(), lr=1e-5), config, lengths
    )
    prompts = [[3 + (i * 7 + j) % 500 for j in range(32)] for i in range(16)]
    taken = []
    for _ in range(1 + rollouts):
        began = time.perf_counter()
        trainer.update_step(prompts)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def speed(folder: Path) -> list[dict[str, Any]]:
    """One rank against two, in turn."""
    taken: dict[int, list[float]] = {1: [], 2: []}
    os.environ["RANKS_PART"] = "speed"
    for k in range(ROUNDS):
        for size in taken:
            out = run_ranks("benchmarks.ranks", size, folder / f"{k}")[0]
            taken[size].append(torch.load(out, weights_only=False))
    del os.environ["RANKS_PART"]
    ratios = [one / two for one, two in zip(taken[1], taken[2])]
    parameters = sum(p.numel() for p in policy().parameters())
    return [
        {"part": "speed", "parameters": parameters, "seconds": taken}
        | {"ratio": statistics.median(ratios), "ratios": ratios}
    ]


def alone(folder: Path) -> list[dict[str, Any]]:
    """Process time of a group of one rank against none, in turn."""
    folder.mkdir(parents=True)
    taken: dict[str, list[float]] = {"none": [], "group of one": []}
    for k in range(ROUNDS):
        for name, found in taken.items():
            if name != "none":
                dist.init_process_group(
                    "gloo", init_method=f"file://{folder}/alone-{k}", rank=0, world_size=1
                )
            found.append(seconds())
            if dist.is_initialized():
                dist.destroy_process_group()
    ratio = statistics.median(b / a for a, b in zip(*taken.values()))
    return [{"part": "alone", "seconds": taken, "ratio": ratio}]


def as_rank(file: str, rank: str, size: str, out: str) -> None:
    """One process of `long` or `speed`."""
    torch.set_num_threads(1)
    if int(size) > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{file}", rank=int(rank), world_size=int(size)
        )
    torch.save(seconds() if os.environ.get("RANKS_PART") == "speed" else many_updates(), out)
    if int(size) > 1:
        dist.destroy_process_group()


PARTS = {
    "equal": equal,
    "controlled": controlled,
    "long": long,
    "shard": ranks_shard.rows,
    "speed": speed,
    "alone": alone,
}


def other_rows(parts: list[str]) -> list[dict[str, Any]]:
    """Rows of the other parts, as they were measured at the commit that each of them names."""
    path = RESULTS / "ranks.json"
    if not path.is_file():
        return []
    found = json.loads(path.read_text())
    rows = [row for row in found["rows"] if row["part"].partition(" ")[0] not in parts]
    return [{"commit": found["commit"], **row} for row in rows]


def main() -> None:
    """Measure the parts and write benchmarks/results/ranks.json after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART")
    parts = parser.parse_args().parts or list(PARTS)
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"{unknown[0]}: no such part; one of {', '.join(PARTS)}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            rows = [row | {"commit": commit()} for row in PARTS[part](Path(folder) / part)]
            whole = [*other_rows([part]), *rows]
            whole.sort(key=lambda row: list(PARTS).index(row["part"].partition(" ")[0]))
            save("ranks", f"python -m benchmarks.ranks {part}", whole, show=False)
            for row in rows:
                print(row)


if __name__ == "__main__":
    if len(sys.argv) == 5 and sys.argv[2].isdigit():
        as_rank(*sys.argv[1:])
    else:
        main()
