"""The explosion of attention logits under Muon, and its cure: a small language model, three seeds.

python benchmarks/explosion.py

A byte-level Llama (4 layers, 128 wide, 4 query and 2 key heads) learns Python's own standard
library. Everything is the same on both sides but the clip's threshold.
"""

import hashlib
import statistics
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import one_thread, save
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hmpo.optim import MuonClip, MuonClipConfig

COMMAND = "python benchmarks/explosion.py"
TRAIN = ("argparse", "ast", "datetime", "doctest", "inspect", "pdb", "subprocess", "tarfile")
HELD_OUT = ("pickle", "optparse")
STEPS, ROWS, LENGTH = 400, 16, 128
LR = 0.02
SIDES = {"no clip": 1e9, "tau = 30": 30.0}
"""Threshold of each side. 1e9 reads the logits and never clips."""


def text(modules: tuple[str, ...]) -> Tensor:
    """Bytes of modules of the standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    joined = b"".join((folder / f"{name}.py").read_bytes() for name in modules)
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()


def batches(data: Tensor, seed: int) -> Iterator[Tensor]:
    """Random windows, `ROWS` at a time, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(data) - LENGTH, (ROWS, 1), generator=generator)
        yield data[starts + torch.arange(LENGTH)]


def made(seed: int) -> nn.Module:
    """A fresh model."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
        )
    )


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean next-byte cross-entropy, nats."""
    return model(input_ids=ids, labels=ids, use_cache=False).loss


@torch.no_grad()
def evaluate(model: nn.Module, held_out: Tensor) -> float:
    """Mean loss on 32 fixed batches of text that was not trained on."""
    windows = batches(held_out, 12345)
    return statistics.fmean(loss_of(model, next(windows)).item() for _ in range(32))


def train(seed: int, tau: float) -> dict[str, Any]:
    """One run; what each step's forward pass saw, and the loss on held-out text at the end."""
    model, data = made(seed), batches(text(TRAIN), seed)
    config = MuonClipConfig(max_qk_score=tau, source="exact")
    optimizer = MuonClip.for_model(
        model, lr=LR, weight_decay=0.0, adamw_lr=3e-3, config=config, ns_dtype=torch.float32
    )
    largest, clips, losses = [], 0, []
    began = time.process_time()
    for _ in range(STEPS):
        loss = loss_of(model, next(data))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        stats = optimizer.last_stats
        largest.append(round(stats.max_logit, 2))
        clips += stats.clipped_heads
        losses.append(round(loss.item(), 4))
    seconds = time.process_time() - began
    optimizer.detach()
    return {
        "eval_loss": round(evaluate(model, text(HELD_OUT)), 4),
        "max_logit": max(largest),
        "clipped_heads": clips,
        "cpu_s": round(seconds, 1),
        "max_logit_by_step": largest,
        "train_loss_by_step": losses,
    }


def main() -> None:
    """Three seeds, both sides."""
    one_thread()
    digest = hashlib.sha256(text(TRAIN + HELD_OUT).to(torch.uint8).numpy().tobytes()).hexdigest()
    rows = []
    for seed in range(3):
        for side, tau in SIDES.items():
            row = {"seed": seed, "side": side} | train(seed, tau)
            rows.append(row | {"text_sha256": digest[:16]})
            shown = {k: v for k, v in row.items() if not k.endswith("by_step")}
            print(shown, flush=True)
    save("explosion", COMMAND, rows)


if __name__ == "__main__":
    main()
