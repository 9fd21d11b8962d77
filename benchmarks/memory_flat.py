"""Memory of a training over 10,000 updates: it should not grow.

The real trainer on a small Llama (two layers, 32 hidden units): sampling, rewards, four updates a
rollout, QK-clip with a threshold that acts, metrics. Every 500 updates the resident memory of the
process and the tensors alive (after a collection of cycles) are read; a leak of one small tensor
an update would show as 10,000 more, one of a byte a parameter an update as 300 MB.

python benchmarks/memory_flat.py
"""

import gc
import warnings
from pathlib import Path
from typing import Any

import torch
from common import one_thread, save
from transformers import LlamaConfig, LlamaForCausalLM

from hmpo.config import HMPOConfig, OptimizerConfig
from hmpo.run.build import build_optimizer
from hmpo.trainer.power_mean import HMPOTrainer

UPDATES, EVERY = 10_000, 500
PROMPTS = [[5, 6, 7], [8, 9], [3, 4, 5, 6], [11, 3]]


def low_tokens(prompts: list, completions: list, completion_ids: list, **columns: Any) -> list:
    """Share of small tokens: there is always something to learn."""
    return [sum(t < 8 for t in row) / len(row) for row in completion_ids]


def trainer() -> HMPOTrainer:
    """The trainer; with a learning rate so small that lengths keep varying to the end."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            max_position_embeddings=64,
        )
    )
    config = HMPOConfig(
        group_size=4, max_length=8, eos_token=(2, 7), minibatches=4, max_qk_score=1.0
    )
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-5))
    return HMPOTrainer(model, None, optimizer, config, low_tokens)


def alive() -> tuple[int, int]:
    """Tensors that are alive, and the bytes of their storages."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return len(tensors), sum(storages.values())


def resident() -> float:
    """MiB of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main() -> None:
    """Train, look every `EVERY` updates, and write how much there is more at the end."""
    one_thread()
    training, rows = trainer(), []
    while training.step < UPDATES:
        if not training.pending_updates:
            training.begin_rollout(PROMPTS, {})
        training.next_update()
        if training.step % EVERY == 0:
            tensors, held = alive()
            mib = round(resident(), 2)
            rows.append(
                {"updates": training.step, "rss_mib": mib, "tensors": tensors, "bytes": held}
            )
    first, last = rows[0], rows[-1]
    per_update = (last["rss_mib"] - first["rss_mib"]) / (last["updates"] - first["updates"])
    rows.append(
        {
            "growth_mib": round(last["rss_mib"] - first["rss_mib"], 2),
            "growth_bytes_per_update": round(per_update * 2**20, 1),
            "growth_tensors": last["tensors"] - first["tensors"],
        }
    )
    save("memory_flat", "python benchmarks/memory_flat.py", rows)


if __name__ == "__main__":
    main()
