"""How often the controllers' statistics see what is not there.

python benchmarks/agm_false_alarms.py [--windows N]     writes results/agm_false_alarms.json
"""

import argparse
import math
import random
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from common import save

from hmpo.agm import (
    AdaptiveAGMController,
    AdaptiveAGMFramework,
    AGMConfig,
    RegimeConfig,
    TrainingPhaseDetector,
)
from hmpo.agm.primitives import line


def noise(rng: random.Random, memory: float) -> Iterator[float]:
    """Stationary noise of variance 1 with lag-1 autocorrelation `memory`."""
    x = rng.gauss(0, 1)
    while True:
        yield x
        x = memory * x + math.sqrt(1 - memory * memory) * rng.gauss(0, 1)


def trends(size: int, memory: float, windows: int, seed: int) -> dict[str, float | int | str]:
    """Share of trendless windows in which |t| > 3, and with an oscillation."""
    rng = random.Random(seed)
    steps, alarms, oscillating = range(size), 0, 0
    for _ in range(windows):
        source = noise(rng, memory)
        found = line(steps, [next(source) for _ in steps])
        assert found is not None
        alarms += abs(found.t) > 3
        oscillating += found.oscillation > 0
    return {
        "what": "trendless window",
        "size": size,
        "memory": memory,
        "windows": windows,
        "t_above_3": alarms / windows,
        "oscillating": oscillating / windows,
    }


def record(step: int, gap: float, reward: float, **more: str | float) -> dict[str, Any]:
    """What the controllers read of a run with one update per rollout."""
    return {
        "type": "step",
        "step": step,
        "rollout": step,
        "staleness": 0,
        "nonfinite": 0,
        "ratio/log_gap_mean": gap,
        "ratio/ess_seq": 0.9,
        "reward/mean": reward,
        "reward/within_var": 0.1,
        "reward/total_var": 0.25,
        "success/n": 64,
        "grad_norm": 0.5,
        "adv/zero_frac": 0.1,
        **more,
    }


def unstable(sd: float, memory: float, steps: int, seed: int) -> dict[str, float | int | str]:
    """Share of records called unstable while the log gap is stationary, without a budget."""
    controller = AdaptiveAGMController(RegimeConfig(gap_target=None))
    source, count = noise(random.Random(seed), memory), 0
    for i in range(steps):
        decision = controller.update(record(i, 1e-2 * math.exp(sd * next(source)), 0.5))
        count += decision["regime"] == "unstable"
    return {
        "what": "stationary log gap",
        "sd": sd,
        "memory": memory,
        "records": steps,
        "unstable": count / steps,
    }


def phase_changes(memory: float, steps: int, seed: int) -> dict[str, float | int | str]:
    """Changes of phase per record while the rewards are stationary."""
    detector, source = TrainingPhaseDetector(), noise(random.Random(seed), memory)
    told = []
    for i in range(steps):
        regime = {"decision/regime": "normal_learning"}
        told.append(detector.update(record(i, 1e-2, 0.5 + 0.05 * next(source), **regime))["phase"])
    changes = sum(a != b for a, b in pairwise(told))
    return {
        "what": "stationary rewards",
        "memory": memory,
        "records": steps,
        "phase_changes": changes / steps,
        "instability": told.count("instability") / steps,
    }


def actions(memory: float, runs: int, steps: int, seed: int) -> dict[str, Any]:
    """What the whole framework does on stationary runs within their budget."""
    counts: Counter[str] = Counter()
    for run in range(runs):
        rng = random.Random(f"{seed}/{run}")
        gaps, rewards = noise(rng, memory), noise(rng, memory)
        framework = AdaptiveAGMFramework(AGMConfig())
        for i in range(steps):
            gap = 1.5e-2 * math.exp(0.3 * next(gaps))
            ess = {"ratio/ess_seq": 0.5 + 0.3 * rng.random()}
            decision = framework.update(record(i, gap, 0.5 + 0.05 * next(rewards), **ess))
            framework.commit(decision)
            counts[str(decision["action"])] += 1
            counts["gated"] += decision["gate"] is True
    total = runs * steps
    return {
        "what": "stationary run",
        "memory": memory,
        "runs": runs,
        "records": total,
        "shares": {name: counts[name] / total for name in sorted(counts)},
    }


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=20000)
    windows = parser.parse_args().windows
    rows: list[dict[str, Any]] = [
        trends(size, memory, windows, seed=1000 * size + int(10 * memory))
        for size in (20, 50, 100)
        for memory in (0.0, 0.5, 0.8)
    ]
    rows += [
        unstable(sd, memory, windows, seed=int(100 * sd) + int(10 * memory))
        for sd in (0.1, 0.25, 0.4)
        for memory in (0.0, 0.5, 0.8)
    ]
    rows += [phase_changes(memory, windows, seed=int(10 * memory)) for memory in (0.0, 0.5, 0.8)]
    runs = max(1, windows // 1000)
    rows += [actions(memory, runs, 500, seed=int(10 * memory)) for memory in (0.0, 0.5, 0.8)]
    save("agm_false_alarms", f"python benchmarks/agm_false_alarms.py --windows {windows}", rows)


if __name__ == "__main__":
    main()
