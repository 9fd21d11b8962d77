"""What a step of Muon costs beside torch.optim.Muon's, and AdamW's for comparison."""

import statistics
import time
from typing import Any

import torch
from common import save
from torch import nn

from hmpo.optim import Muon

COMMAND = "python benchmarks/bench_muonclip.py muon"
CASES = ((24, 1024, 1024, 9), (96, 128, 128, 41), (256, 64, 512, 31))
"""Matrices, rows, columns, repeats."""


def sides(count: int, rows: int, columns: int) -> dict[str, torch.optim.Optimizer]:
    """Each optimizer with matrices and gradients of its own, equal for all."""
    found = {}
    for name in ("hmpo", "torch", "adamw"):
        generator = torch.Generator().manual_seed(0)
        params = [
            nn.Parameter(torch.randn(rows, columns, generator=generator)) for _ in range(count)
        ]
        for p in params:
            p.grad = torch.randn(rows, columns, generator=generator)
        found[name] = {
            "hmpo": lambda p: Muon(p, lr=1e-3),
            "torch": lambda p: torch.optim.Muon(p, lr=1e-3, adjust_lr_fn="match_rms_adamw"),
            "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
        }[name](params)
    return found


def main() -> None:
    """All cases, the sides in turn; the ratio is the median over the turns."""
    rows = []
    for count, n, m, repeats in CASES:
        optimizers = sides(count, n, m)
        seconds: dict[str, list[float]] = {name: [] for name in optimizers}
        for turn in range(repeats + 1):
            names = list(optimizers)[:: 1 if turn % 2 else -1]
            for name in names:
                began = time.process_time()
                optimizers[name].step()
                if turn:  # the first warms up
                    seconds[name].append(time.process_time() - began)
        ratios = [t / h for t, h in zip(seconds["torch"], seconds["hmpo"], strict=True)]
        row: dict[str, Any] = {"matrices": f"{count} x ({n} x {m})"}
        row |= {f"{k}_cpu_ms": round(1e3 * statistics.median(v), 1) for k, v in seconds.items()}
        row |= {
            "speedup": round(statistics.median(ratios), 2),
            "dtype": optimizers["hmpo"].param_groups[0]["ns_dtype"],
        }
        print(row, flush=True)
        rows.append(row)
    save("muonclip_muon", COMMAND, rows)
