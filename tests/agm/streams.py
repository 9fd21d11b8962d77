"""Made-up telemetry: healthy runs, and what can happen to a run."""

import math
import random

EAGER = {
    "regime": {"window": 3, "baseline_window": 4, "min_samples": 3, "performance_window": 3,
               "vol_hi": 0.6, "confirm": 1},
    "phase": {"window": 3, "min_samples": 3, "confirm": 1, "dwell": 0, "t_hi": 1.5},
    "adapter": {"dwell": 1, "median_window": 2, "cooldown": 2, "performance_window": 3,
                "gap_target": 5e-4},
    "curriculum": {"min_trials": 4, "max_trials": 8, "confirm": 1, "dwell": 0, "promote": 0.3,
                   "demote": 0.1},
    "scales": {"scales": [6, 8, 10]},
    "dwell": 1,
}  # fmt: skip
"""Settings under which even a few rollouts move everything."""


def step(number, **fields):
    """One step record of a run with one update per rollout; fields by their names."""
    record = {
        "type": "step",
        "run_id": "made-up",
        "step": number,
        "rollout": number,
        "staleness": 0,
        "nonfinite": 0,
        "update_skipped": False,
        "ratio/log_gap_mean": 1e-3,
        "ratio/d_var": 1e-3,
        "ratio/p": 0.0,
        "ratio/ess_seq": 0.9,
        "reward/mean": 0.5,
        "reward/within_var": 0.1,
        "reward/total_var": 0.25,
        "success/k": 32,
        "success/n": 64,
        "grad_norm": 0.5,
        "adv/zero_frac": 0.1,
        "lr": 1e-5,
    }
    return record | fields


def evaluation(number, mean, trials=64):
    """One eval record."""
    return {
        "type": "eval",
        "run_id": "made-up",
        "step": number,
        "eval/name": "during",
        "eval/mean": mean,
        "eval/sampled_k": round(mean * trials),
        "eval/sampled_n": trials,
    }


def autocorrelated(rng, memory, sd, n):
    """Stationary noise with mean 0."""
    x, values = rng.gauss(0, sd), []
    for _ in range(n):
        values.append(x)
        x = memory * x + math.sqrt(1 - memory**2) * rng.gauss(0, sd)
    return values


def healthy(seed=0, n=300, memory=0.5, gap=1e-3, sd=0.25, updates=1, evals=10, slow=80.0):
    """Rewards that rise and level off, a steady gap, an eval now and then."""
    rng = random.Random(seed)
    gaps, noise = autocorrelated(rng, memory, sd, n), autocorrelated(rng, memory, 0.04, n)
    records = []
    for i in range(n):
        rate = min(1.0, max(0.0, 0.15 + 0.7 * (1 - math.exp(-i / slow)) + noise[i]))
        within = 0.6 * rate * (1 - rate)
        for u in range(updates):
            depth = 1.0 if updates == 1 else u / (updates - 1)
            records.append(
                step(
                    i * updates + u,
                    **{
                        "rollout": i,
                        "staleness": u,
                        "ratio/log_gap_mean": depth * gap * math.exp(gaps[i]),
                        "ratio/d_var": depth * gap * math.exp(gaps[i]),
                        "ratio/ess_seq": 1 - 0.1 * depth * rng.random(),
                        "reward/mean": rate,
                        "reward/within_var": within * (1 + 0.1 * rng.random()),
                        "reward/total_var": rate * (1 - rate),
                        "success/k": round(64 * rate),
                        "grad_norm": math.exp(0.2 * rng.gauss(0, 1)),
                        "adv/zero_frac": 0.1 * rng.random(),
                    },
                )
            )
        if evals and i % evals == 0:
            records.append(evaluation((i + 1) * updates - 1, rate))
    return records
