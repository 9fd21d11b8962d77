"""A finished suite on disk, made without training: the same bytes for the same arguments."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hmpo.lab.study.analysis import Study
from hmpo.lab.study.outcomes import Outcome, collect, write_outcome
from hmpo.lab.study.plan import read_plan

COMPARE = {"factor": "member", "to": ["grpo"], "within": ["task", "regime"]}
PROTOCOL = {
    "title": "A study",
    "endpoint": {"last": 3},
    "smallest": 0.02,
    "alpha": 0.05,
    "crash": "zero",
}


def cell(
    name: str,
    seeds: Sequence[int],
    *,
    role: str = "main",
    levels: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    against: str = "",
) -> dict[str, Any]:
    return {
        "name": name,
        "role": role,
        "levels": dict(levels or {}),
        "seeds": list(seeds),
        "settings": dict(settings or {}),
        "config_hash": "0" * 64,
        "against": against,
    }


def write_plan(folder: Path, cells: Sequence[Mapping[str, Any]], **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    plan = {
        "schema": 1,
        "name": "headline",
        "hash": "ab" * 32,
        "protocol": PROTOCOL,
        "protocol_hash": "cd" * 32,
        "compare": COMPARE,
        "cells": list(cells),
        **changes,
    }
    (folder / "suite.json").write_text(json.dumps(plan), encoding="utf-8")
    return folder


DECIDED = {
    "mode": "apply",
    "count": 320,
    "applied": 3,
    "end": 320,
    "actions": {"learning_rate": 2, "rollback": 1},
    "marks": [[200, "rollback"]],
    "stop": [[310, "stalled"]],
    "regime": [[0, "initialization"], [40, "stable_learning"], [190, "unstable"]],
    "phase": [[0, "exploration"], [160, "plateau"]],
}
"""Of a run with controllers."""


def make_outcome(
    cell: str,
    seed: int,
    end: float,
    *,
    levels: Mapping[str, str] | None = None,
    role: str = "main",
    status: str = "finished",
    noise: float = 0.0,
    updates: int = 320,
    evals: int = 9,
    n: int = 256,
    metrics: Mapping[str, float | None] | None = None,
    curves: bool = True,
    decisions: Mapping[str, Any] | None = None,
) -> Outcome:
    """A run whose success rises from .2 to `end`, reached in the last three evaluations."""
    rng = random.Random(f"{cell} {seed}")
    steps = [round(i * updates / (evals - 1)) for i in range(evals)]
    rise = [min(1.0, i / (evals - 3)) for i in range(evals)]
    rates = [
        min(1.0, max(0.0, 0.2 + (end - 0.2) * part + rng.gauss(0, noise) * (0 < part < 1)))
        for part in rise
    ]
    grid = [5 * (i + 1) for i in range(updates // 5)]
    part = [step / updates for step in grid]
    wave = {
        "step": grid,
        "g": [0.01 + 0.02 * x + rng.gauss(0, 0.001) for x in part],
        "kl3": [0.002 + 0.004 * x for x in part],
        "clip_pos": [0.02 * x for x in part],
        "clip_neg": [0.05 * x for x in part],
        "entropy": [0.6 * math.exp(-x) for x in part],
        "max_qk": [40 + 70 * x for x in part],
        "lr": [1e-4 * (1 - x) for x in part],
        "p": [-1.0 for _ in part],
    }
    known = {
        "entropy_end": 0.22, "kl3_mean": 0.004, "g_mean": 0.02, "g_max": 0.05, "clip_frac": 0.03,
        "clip_frac_pos": 0.01, "clip_frac_neg": 0.025, "clip_high_share": 0.3,
        "clip_low_share": 0.7, "ratio_sd": 0.02, "ratio_min": 0.8, "ratio_max": 1.2,
        "ess_mean": 0.97, "adv_var": 0.8, "zero_adv_frac": 0.4, "skipped": 0, "nonfinite": 0,
        "max_qk": 110.0, "qk_clip_share": 0.2, "sigma": 0.05, "sigma_sqrt_l": 0.6,
        "reward_mean_end": end, "length_mean": 130.0, "p_end": 1.0, "staleness": 8.0,
    }  # fmt: skip
    return Outcome(
        suite="headline",
        cell=cell,
        role=role,
        levels=dict(levels or {}),
        seed=seed,
        status=status,
        reason="" if status == "finished" else "the loss is NaN",
        config_hash="0" * 64,
        updates=updates,
        tokens=400 * updates,
        evals={
            "step": steps,
            "tokens": [400 * step for step in steps],
            "sampled": rates,
            "greedy": [min(1.0, rate + 0.05) for rate in rates],
            "reward": rates,
        },
        before={"sampled": round(0.2 * n), "n": n, "pass_at": round(0.5 * n), "pass_n": n, "k": 4},
        after={
            "sampled": round(rates[-1] * n),
            "n": n,
            "pass_at": round(min(1, rates[-1] + 0.2) * n),
            "pass_n": n,
            "k": 4,
        },
        metrics={**known, **(metrics or {})},
        reward={"step": grid, "mean": [0.2 + (end - 0.2) * x for x in part]},
        curves=wave if curves else {},
        decisions=dict(decisions or {}),
        cost={"cpu_s": 30 + rng.random(), "wall_s": 31.0, "tokens_per_s": 4000.0},
        environment={"torch": "2.13.0", "python": "3.11.7", "machine": "Linux", "threads": 1},
    )


def place(folder: Path, outcome: Outcome) -> None:
    """Put an outcome where a suite keeps it."""
    write_outcome(folder / "runs" / outcome.cell / str(outcome.seed), outcome)


def make_suite(folder: Path, seeds: Sequence[int] = (1, 2, 3, 4), **changes: Any) -> Path:
    """Two members and a null arm on one task in two regimes, all controls, one run missing.

    When stale, gspo ends .1 above grpo and reinforce .2 below; when fresh they are equal.
    """
    gains = {"grpo": 0.0, "gspo": 0.1, "reinforce": -0.2}
    cells, outcomes = [], []
    for member, gain in gains.items():
        for regime in ("fresh", "stale"):
            levels = {"member": member, "task": "dense", "regime": regime}
            name = "+".join(levels.values())
            lag = {"lag": 8 if regime == "stale" else 0}
            p = {"grpo": 1.0, "gspo": 0.0, "reinforce": -1.0}[member]
            settings = {"objective": {"member": member, "p": p}, "rollout": lag}
            role = "null" if member == "reinforce" else "main"
            cells.append(cell(name, seeds, role=role, levels=levels, settings=settings))
            for seed in seeds:
                own = random.Random(f"{name} {seed}").gauss(0, 0.004)
                end = 0.6 + 0.02 * (seed % 3) + own + (gain if regime == "stale" else 0)
                told = DECIDED if name == "gspo+dense+stale" else None
                outcomes.append(
                    make_outcome(name, seed, end, levels=levels, role=role, decisions=told)
                )
    base = "grpo+dense+stale"
    ends = {o.seed: o.evals["sampled"][-1] for o in outcomes if o.cell == base}
    others = {
        "again": {seed + 100: end + 0.001 for seed, end in ends.items()},
        "negative": ends,
        "positive": {seed: end - 0.3 for seed, end in ends.items()},
        "placebo": dict.fromkeys(ends, 0.2),
    }
    for role, by_seed in others.items():
        against = "" if role == "placebo" else base
        cells.append(cell(role, list(by_seed), role=role, against=against))
        outcomes += [make_outcome(role, seed, end, role=role) for seed, end in by_seed.items()]
    for rate in (1e-4, 1e-3):
        name, lr = f"tune-{rate:g}", {"optimizer": {"lr": rate}}
        cells.append(cell(name, [9], role="tuning", levels={"member": "grpo"}, settings=lr))
        outcomes.append(make_outcome(name, 9, 0.5 + rate, role="tuning"))
    write_plan(folder, cells, **changes)
    for outcome in outcomes[1:]:
        place(folder, outcome)
    return folder


def study_of(folder: Path) -> Study:
    return Study.of(read_plan(folder), collect(folder))
