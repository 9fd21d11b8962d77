"""The scored responses of a rollout, and what telemetry says of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hmpo.rewards import RewardResult
from hmpo.trainer.conversation import Conversations
from hmpo.types import Metrics, Rollout


@dataclass(frozen=True, kw_only=True)
class ScoredResponses:
    """Responses to some prompts, and what the reward functions say of them.

    Example: 2 prompts, groups of 4: `rewards` (8,), 8 prompts, 8 completions.
    """

    rollout: Rollout
    rewards: Float[Tensor, " N"]
    """Total rewards; NaN where dropped."""
    prompts: list[Any]
    """As given, repeated for each response."""
    completions: list[Any]
    """Text up to the first stop string, which is the assistant's message where the prompt is a
    conversation; or token ids where there is no tokenizer."""
    columns: dict[str, list[Any]]
    """By name, a value for each response."""
    result: RewardResult
    """Rewards by function, and faults."""
    conversations: Conversations | None = None
    """Where the policy talked with environments."""


def describe(scored: ScoredResponses, group_size: int, success: float) -> Metrics:
    """Metrics of a whole rollout: the same for each of its updates."""
    rollout, rewards = scored.rollout, scored.rewards.double()
    finite = rewards[rewards.isfinite()]
    lengths = rollout.lengths.double()
    groups = rewards.view(-1, group_size)
    whole_groups = groups[groups.isfinite().all(1)]
    within = _mean(_variance(whole_groups)) if len(whole_groups) else math.nan
    metrics = {
        "reward/mean": _mean(finite),
        "reward/std": _variance(finite) ** 0.5,
        "reward/within_var": within,
        "reward/total_var": _variance(finite),
        "reward/dropped": (~rewards.isfinite()).sum(),
        "success/k": (finite >= success).sum(),
        "success/n": len(finite),
        "n_groups": len(groups),
        "len/mean": lengths.mean(),
        "len/max": lengths.max(),
        "len/trunc_frac": (~rollout.finished).double().mean(),
        "rollout/fast": float(rollout.fast),
    }
    result, talked = scored.result, scored.conversations
    metrics |= {} if talked is None else talked.metrics
    metrics |= {f"logged/{name}": value for name, value in result.metrics.items()}
    for name, values in result.by_function.items():
        column = torch.tensor(values, dtype=torch.float64)
        metrics[f"reward/{name}/mean"] = _mean(column[column.isfinite()])
    return {name: float(value) for name, value in metrics.items()}


def of_all_updates(records: Sequence[Metrics]) -> Metrics:
    """Metrics of the last update of a rollout, with losses and norm averaged over all of them."""
    merged = dict(records[-1])
    for name in ("loss", "pg_loss", "grad_norm"):
        known = [record[name] for record in records if name in record]  # not of no row
        merged |= {name: math.fsum(known) / len(known)} if known else {}
    merged["update_skipped"] = sum(record["update_skipped"] for record in records)
    return merged


def samples_of(scored: ScoredResponses) -> list[dict[str, Any]]:
    """Of each response its prompt and columns, and what came of it, by name.

    `columns` and `extra` are there where the task has columns, or a reward function told some.
    """
    finished = scored.rollout.finished.tolist()
    samples = []
    for i, (prompt, completion) in enumerate(zip(scored.prompts, scored.completions)):
        sample = {
            "prompt": prompt,
            "completion": completion,
            "reward": scored.result.total[i],
            "finished": bool(finished[i]),
            "rewards": {name: column[i] for name, column in scored.result.by_function.items()},
        }
        for key, table in (("columns", scored.columns), ("extra", scored.result.extras)):
            if table:
                sample[key] = {name: column[i] for name, column in table.items()}
        samples.append(sample)
    return samples


def _mean(values: Tensor) -> Tensor:
    """Mean, or NaN of nothing."""
    return values.sum() / len(values)


def _variance(values: Tensor) -> Tensor:
    """Unbiased variance over the last axis; NaN where fewer than two values tell none."""
    count = values.shape[-1]
    centred = values - values.sum(-1, keepdim=True) / count
    return centred.square().sum(-1) / max(0, count - 1)
