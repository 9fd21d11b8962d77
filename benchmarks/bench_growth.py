"""How the cost of an update grows with its tokens, its group and its vocabulary.

python benchmarks/bench_growth.py

Three sizes along each axis, a factor of 4 apart, measured in turn. Time and peak memory of a
whole update (rollout, rewards, log-probs, gradient, AdamW's step) are held against a straight
line over the operations that it must do: `off_line` is how far the middle size is from the line
through the two others, which takes fixed costs out. The memory of the vocabulary projection's
forward and backward pass alone is held against its formula, `head_bytes`.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from bench_trl import Case, Tally, model_of, our_update, prompts_of
from common import ceilings, one_thread, peak_memory, roofline, save
from work import rollout_work, update_work

from hmpo.logprobs.head import STORE, block_rows, head_logprobs

REPEATS = 5
BASE = Case("growth", 1.0, prompts=2, group=4, new=32, vocabulary=2048, layers=2, inner=688)
AXES = {
    "tokens": [replace(BASE, prompts=n) for n in (2, 8, 32)],
    "group": [replace(BASE, group=n) for n in (4, 16, 64)],
    "vocabulary": [replace(BASE, vocabulary=n) for n in (8_192, 32_768, 131_072)],
}


@dataclass(frozen=True)
class Head:
    """So many tokens meet so large a vocabulary."""

    tokens: int
    vocabulary: int
    hidden: int = 256


HEADS = {
    "tokens": [Head(n, 32_768) for n in (512, 2048, 8192)],
    "vocabulary": [Head(1024, n) for n in (8_192, 32_768, 131_072)],
}


def work_of(case: Case) -> tuple[float, float]:
    """Operations and bytes of one update."""
    model = model_of(case)
    prompts = torch.full((case.prompts,), case.prompt)
    lengths = torch.full((case.rows,), case.new)
    parts = (work(model, prompts, lengths) for work in (rollout_work, update_work))
    operations, bytes_ = (sum(values) for values in zip(*parts, strict=True))
    return operations, bytes_


def off_line(x: Sequence[float], y: Sequence[float]) -> float:
    """How far the middle y is from the line through the outer two, as a share of that line."""
    slope = (y[2] - y[0]) / (x[2] - x[0])
    return y[1] / (y[0] + slope * (x[1] - x[0])) - 1


def build_update(case: Case) -> Callable[[], Any]:
    """One update of a trainer whose optimizer has its moments already."""
    prompts, update = prompts_of(case, 1), our_update(case, Tally(), clip=True)
    update(prompts)
    return lambda: update(prompts)


def build_head(head: Head) -> Callable[[], Any]:
    """Forward and backward pass of the projection alone."""
    torch.manual_seed(0)
    weight = torch.randn(head.vocabulary, head.hidden).mul_(0.02).requires_grad_()

    def run(tokens: int) -> None:
        weight.grad = None
        states = torch.randn(tokens, head.hidden).requires_grad_()
        targets = torch.randint(head.vocabulary, (tokens,))
        logprobs, _ = head_logprobs(states, weight, None, targets)
        logprobs.sum().backward()

    run(head.tokens)  # the libraries' own buffers are not part of the formula
    weight.grad = None
    return lambda: run(head.tokens)


def head_bytes(head: Head) -> int:
    """Hidden states and their gradient, the projection's gradient, and the logits held at once."""
    size = 4 * head.tokens * head.vocabulary
    if size > STORE:
        shape = (head.vocabulary, head.hidden)
        size = 4 * block_rows(torch.empty(1, 1).expand(shape), 512) * head.vocabulary
    return 4 * head.hidden * (2 * head.tokens + head.vocabulary) + size


def updates(axis: str, cases: list[Case]) -> list[dict[str, Any]]:
    """Time and memory of an update at each size."""
    runs = [build_update(case) for case in cases]
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(REPEATS):
        for run, spent in zip(runs, seconds, strict=True):
            began = time.process_time()
            run()
            spent.append(time.process_time() - began)
    work = [work_of(case) for case in cases]
    flops = [operations for operations, _ in work]
    middle = [statistics.median(spent) for spent in seconds]
    peaks = [peak_memory(build_update, case) for case in cases]
    top = ceilings()
    return [
        {
            "axis": axis,
            "part": "update",
            "size": (case.prompts, case.group, case.vocabulary)[list(AXES).index(axis)],
            "tokens": case.rows * case.new,
            "cpu_s": round(spent, 4),
            "ns_per_mflop": round(1e15 * spent / operations, 1),
            "time_off_line": round(off_line(flops, middle), 3),
            "peak_mib": peak,
            "memory_off_line": round(off_line(flops, peaks), 3),
            **roofline(operations, bytes_, spent, top),
        }
        for case, spent, peak, (operations, bytes_) in zip(cases, middle, peaks, work, strict=True)
    ]


def heads(axis: str, sizes: list[Head]) -> list[dict[str, Any]]:
    """Memory of the projection beside its formula."""
    rows = []
    for head in sizes:
        peak, predicted = peak_memory(build_head, head), head_bytes(head) / 2**20
        rows.append(
            {
                "axis": axis,
                "part": "head",
                "size": head.tokens if axis == "tokens" else head.vocabulary,
                "peak_mib": peak,
                "predicted_mib": round(predicted, 1),
                "off_prediction": round(peak / predicted - 1, 3),
            }
        )
    return rows


def main() -> None:
    """Measure every axis."""
    one_thread()
    rows = []
    for axis, cases in AXES.items():
        rows += updates(axis, cases)
        rows += heads(axis, HEADS[axis]) if axis in HEADS else []
        print(f"{axis}: done", flush=True)
    save("growth", "python benchmarks/bench_growth.py", rows)


if __name__ == "__main__":
    main()
