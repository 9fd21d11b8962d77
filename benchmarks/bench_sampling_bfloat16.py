"""Sampling from a bfloat16 copy of the weights beside float32, with what it costs to correct.

python benchmarks/bench_sampling_bfloat16.py
"""

import os
import statistics
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from bench_sampling import CASES, build
from common import one_thread, save

from hmpo.logprobs.responses import token_logprobs
from hmpo.objective.mismatch import mismatch_metrics
from hmpo.sampling.responses import sample_responses

NAMES = ("1M", "11M", "58M")
MEASURED = ("mismatch/k3", "mismatch/rho_min", "mismatch/rho_max", "mismatch/ess")


def measure(name: str) -> dict[str, Any]:
    """Median CPU seconds of a rollout in float32, in bfloat16, and of the forward pass after it."""
    case = next(case for case in CASES if case.name == name)
    model, ids, mask = build(case)

    def rollout(dtype: torch.dtype | None) -> Any:
        return sample_responses(
            model,
            ids,
            mask,
            group_size=case.group,
            max_length=case.new,
            eos_token=10**6,
            generator=torch.Generator().manual_seed(0),
            dtype=dtype,
        )

    drawn = rollout(torch.bfloat16)

    @torch.no_grad()
    def recompute() -> torch.Tensor:
        shape = drawn.input_ids, drawn.attention_mask, drawn.response_ids.shape[1]
        return token_logprobs(model, *shape)

    sides = {
        "float32": lambda: rollout(None),
        "bfloat16": lambda: rollout(torch.bfloat16),
        "recompute": recompute,
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for repeat in range(6):
        for side, run in sides.items():
            began = time.process_time()
            run()
            if repeat:
                seconds[side].append(time.process_time() - began)
    middle = {side: statistics.median(values) for side, values in seconds.items()}
    old = recompute()
    gap = (old - drawn.sampling_logprobs).abs()[drawn.response_mask]
    found = mismatch_metrics(old, drawn.sampling_logprobs, drawn.response_mask, None)
    return {
        "case": name,
        "cpu_s": {side: round(value, 4) for side, value in middle.items()},
        "ratio": round(middle["bfloat16"] / middle["float32"], 3),
        "ratio_recomputed": round(
            (middle["bfloat16"] + middle["recompute"]) / middle["float32"], 3
        ),
        "gap_mean": float(gap.mean()),
        "gap_max": float(gap.max()),
        "mismatch": {key: float(found[key]) for key in MEASURED},
    }


def main() -> None:
    """Measure and write the results."""
    one_thread()
    save(
        "sampling_bfloat16",
        "python benchmarks/bench_sampling_bfloat16.py",
        [measure(name) for name in NAMES],
    )


if __name__ == "__main__":
    main()
