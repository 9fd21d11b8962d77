"""What the controllers cost: CPU per update with all of them on, and the size of their state.

python benchmarks/bench_agm.py [--steps N]     writes results/agm.json; 100,000 updates by default
"""

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Iterator
from typing import Any

from common import save

from hmpo.agm import AdapterConfig, AdaptiveAGMFramework, AGMConfig, CurriculumConfig

CONFIG = AGMConfig(
    adapter=AdapterConfig(
        controls=("lr", "eps", "batch", "p"), base_lr=1e-5, base_eps=0.2, base_batch=64
    ),
    curriculum=CurriculumConfig(levels=4),
)
EVERY = 10_000


def records(steps: int, updates: int) -> Iterator[dict[str, Any]]:
    """A noisy run with `updates` optimizer updates per rollout."""
    rng, slow = random.Random(0), 0.0
    for i in range(steps):
        rollout, staleness = divmod(i, updates)
        if staleness == 0:
            slow = 0.9 * slow + 0.3 * rng.gauss(0, 1)
            rate = 1 / (1 + math.exp(-0.5 * slow))
        depth = (staleness + 1) / updates
        yield {
            "type": "step",
            "step": i,
            "rollout": rollout,
            "staleness": staleness,
            "nonfinite": int(rng.random() < 0.001),
            "ratio/log_gap_mean": 0.02 * depth * math.exp(0.5 * rng.gauss(0, 1)),
            "ratio/d_var": 0.02 * depth * math.exp(0.5 * rng.gauss(0, 1)),
            "ratio/p": 0.0,
            "ratio/ess_seq": 0.9 + 0.1 * rng.random(),
            "reward/mean": rate,
            "reward/within_var": 0.5 * rate * (1 - rate),
            "reward/total_var": rate * (1 - rate),
            "success/k": round(64 * rate),
            "success/n": 64,
            "curriculum/level": 2,
            "grad_norm": 0.5,
            "adv/zero_frac": 0.1,
        }


def entries(value: Any) -> int:
    """Numbers, texts and flags in a state."""
    if isinstance(value, dict):
        return sum(map(entries, value.values()))
    return sum(map(entries, value)) if isinstance(value, list) else 1


def measure(steps: int, updates: int) -> dict[str, Any]:
    """Seconds of every update and commit, and the state every so often."""
    framework = AdaptiveAGMFramework(CONFIG)
    seconds, sizes = [], []
    for i, record in enumerate(records(steps, updates), start=1):
        began = time.process_time_ns()
        framework.commit(framework.update(record))
        seconds.append(time.process_time_ns() - began)
        if i % EVERY == 0:
            state = framework.state_dict()
            sizes.append({"step": i, "entries": entries(state), "bytes": len(json.dumps(state))})
    ranked = sorted(seconds)
    return {
        "updates_per_rollout": updates,
        "steps": steps,
        "cpu_ms_mean": statistics.fmean(seconds) / 1e6,
        "cpu_ms_median": ranked[len(ranked) // 2] / 1e6,
        "cpu_ms_p99": ranked[int(0.99 * len(ranked))] / 1e6,
        "budget_ms": 0.3,
        "state": sizes,
    }


def main() -> None:
    """Measure the worst case, one update per rollout, and a usual one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    steps = parser.parse_args().steps
    rows = [measure(steps, 1), measure(steps, 4)]
    save("agm", f"python benchmarks/bench_agm.py --steps {steps}", rows)


if __name__ == "__main__":
    main()
