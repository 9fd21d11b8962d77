"""A policy that is shared out (`distributed.shard`) against whole ones: weights, and memory.

    python -m benchmarks.ranks shard

Bytes are counted from tensors, at every call of a layer, in its backward pass, about each optimizer
step and where rewards are given: all distinct storages of parameters (also of what is gathered),
of their gradients and of the optimizer's state. Activations, the buffers of a collective and the
decoder's own copies are not in them.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hmpo.config import PowerMeanConfig
from hmpo.ranks.shard import local, shards_of
from hmpo.trainer.power_mean import PowerMeanTrainer
from hmpo.trainer.sharded import shard_policy
from tests.ranks.processes import run_ranks
from tests.support import tiny_llama

CASES = "tests.trainer.shard_cases"
SIZES = (2, 4)


def rows(folder: Path) -> list[dict[str, Any]]:
    """Both, for two ranks and for four."""
    return [*weights(folder), memory(folder)]


def weights(folder: Path) -> list[dict[str, Any]]:
    """How far the weights of each case are from those of one process."""
    found: list[dict[str, Any]] = []
    one = _run(CASES, 1, folder, "")
    runs = {size: _run(CASES, size, folder, "sharded") for size in SIZES}
    for name, expected in one.items():
        row: dict[str, Any] = {"part": "shard", "case": name}
        row["dtype"] = "float32" if name.endswith("float32") else "float64"
        for size, run in runs.items():
            row[f"ranks_{size}"] = _compared(expected, run[name])
        found.append(row)
    return found


def memory(folder: Path) -> dict[str, Any]:
    """Peak bytes of a rank: whole, and shared out to two and to four."""
    row: dict[str, Any] = {"part": "shard memory"}
    for size, kind in ((1, ""), *((size, "sharded") for size in SIZES)):
        row |= {f"ranks_{size}": _run("benchmarks.ranks_shard", size, folder / "memory", kind)}
    return row


def _run(module: str, size: int, folder: Path, kind: str) -> dict[str, Any]:
    """What the first rank found."""
    place = folder / module
    out = run_ranks(module, size, place, timeout=3000, kind=kind or "whole")[0]
    found: dict[str, Any] = torch.load(out, weights_only=False)
    return found


def _compared(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    tokens = [[sample["completion"] for sample in run["responses"]] for run in (one, other)]
    pairs = [(other["weights"][name], value) for name, value in one["weights"].items()]
    distance = max(float((new - old).norm() / old.norm()) for new, old in pairs)
    return {"same_tokens": tokens[0] == tokens[1], "weights": distance}


class Peaks:
    """The largest number of bytes that this rank has held, by what it was doing."""

    def __init__(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.policy, self.optimizer, shards = policy, optimizer, shards_of(policy)
        self.parts, self.copied = list(policy.parameters()), getattr(shards, "model", policy)
        self.bytes = {"rollout": 0, "pass": 0, "step": 0}

    def look(self, what: str) -> None:
        """Count now."""
        held: dict[int, int] = {}
        parameters = (*self.parts, *self.policy.parameters(), *self.copied.parameters())
        tensors = [x for x in parameters if not x.is_meta]
        tensors += [x.grad for x in tensors if x.grad is not None]
        states = self.optimizer.state.values()
        tensors += [x for own in states for x in own.values() if isinstance(x, Tensor)]
        for tensor in tensors:
            storage = local(tensor.detach()).untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
        self.bytes[what] = max(self.bytes[what], sum(held.values()))


def measured(sharded: bool) -> dict[str, Any]:
    """Bytes of one rank over two rollouts of two updates with AdamW, 20 million parameters."""
    policy = tiny_llama(
        vocab=4096, seed=1, spread=0.02, hidden_size=512, intermediate_size=1376,
        num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8,
        tie_word_embeddings=True,
    )  # fmt: skip
    count = sum(p.numel() for p in policy.parameters())
    policy = shard_policy(policy) if sharded else policy
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5)
    peaks = Peaks(policy, optimizer)

    def reward(prompts: Any, completions: Any, completion_ids: Any, **_: Any) -> list[float]:
        peaks.look("rollout")
        return [float(sum(ids) % 7) for ids in completion_ids]

    config = PowerMeanConfig(group_size=4, max_length=8, eos_token=2, minibatches=2, qk_clip=False)
    trainer = PowerMeanTrainer(policy, None, optimizer, config, reward)
    for module in policy.modules():
        if type(module).__name__ == "LlamaMLP":
            module.register_forward_hook(lambda *_: peaks.look("pass"))
            module.register_full_backward_hook(lambda *_: peaks.look("pass"))
    optimizer.register_step_pre_hook(lambda *_: peaks.look("step"))
    optimizer.register_step_post_hook(lambda *_: peaks.look("step"))
    for _ in range(2):
        trainer.update_step([[3 + i, 9, 4] for i in range(4)])
    return {"parameters": count, "bytes": peaks.bytes}


def as_rank(file: str, rank: str, size: str, out: str, kind: str) -> None:
    """One process of `memory`."""
    torch.set_num_threads(1)
    if int(size) > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{file}", rank=int(rank), world_size=int(size)
        )
    torch.save(measured(kind == "sharded"), out)
    if int(size) > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    as_rank(*sys.argv[1:])
