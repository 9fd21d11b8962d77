"""Dynamic sampling: prompts whose groups carry no signal are replaced until the batch is full.

DAPO (Yu et al., 2025, arXiv 2503.14476, section 3.2, equation 11) trains only on groups whose
accuracy is neither 0 nor 1. What decides is the accuracy, the values of one reward function, never
the weighted sum: a group of wrong answers of different length has rewards that differ, and nothing
to learn from.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hmpo.config import BatchConfig
from hmpo.config.trainer import TrainerConfig
from hmpo.errors import require
from hmpo.rewards import RewardResult
from hmpo.trainer.prompts import Prompts
from hmpo.trainer.scored import ScoredResponses
from hmpo.types import Metrics, Rollout

Columns = Mapping[str, Sequence[Any]]
EQUAL = 1e-6
"""Accuracies that differ by at most this times max(|accuracy|, 1) are equal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refill:
    """How a rollout is refilled.

    Example: `Refill(draw=lambda count: (next_prompts(count), {}), settings=BatchConfig())`.
    """

    draw: Callable[[int], tuple[Prompts, Columns]]
    """The next so many prompts, and their columns."""
    settings: BatchConfig
    """Which reward function decides, and when it is enough."""


class Filled(NamedTuple):
    """All that a rollout has drawn, and which of it is trained on.

    Example: 2 prompts of 4 asked, 1 without signal and replaced by one with: `scored` has 12
    responses, `rows` 8 of them, `attempts` is [0] * 8 + [1] * 4.
    """

    scored: ScoredResponses
    rows: Int[Tensor, " M"] | None
    """None for all."""
    attempts: list[int]
    """By response, the attempt that drew it."""
    metrics: Metrics


def signal_name(settings: BatchConfig, functions: Sequence[str]) -> str:
    """The reward function whose values are the accuracy.

    Raises:
        ConfigError: one line: it is not there, or none of several is named.
    """
    known = ", ".join(functions)
    if settings.signal:
        require(settings.signal in functions, "batch.signal", settings.signal, f"one of {known}")
        return settings.signal
    expected = f"the one of {known} that is the accuracy"
    require(len(functions) == 1, "batch.signal", "", expected)
    return functions[0]


def groups_with_signal(
    accuracy: Sequence[float], valid: Sequence[bool], group_size: int
) -> list[bool]:
    """For each group whether its accuracies are not all equal.

    Args:
        accuracy: of each response, rows of a group adjacent; NaN where there is none.
        valid: responses that count in the loss; the others say nothing.
        group_size: G.
    """
    found = []
    for start in range(0, len(accuracy), group_size):
        pairs = zip(accuracy[start : start + group_size], valid[start : start + group_size])
        known = [value for value, counts in pairs if counts and not math.isnan(value)]
        size = max((1.0, *map(abs, known)))
        found.append(len(known) > 1 and max(known) - min(known) > EQUAL * size)
    return found


def counted_rows(scored: ScoredResponses, config: TrainerConfig) -> Bool[Tensor, " N"]:
    """Responses that count in the loss: not a dropped reward, not a masked truncation."""
    valid = scored.rewards.isfinite()
    return valid & scored.rollout.finished if config.mask_truncated else valid


def filled(
    sample: Callable[[Prompts, Columns, int], ScoredResponses],
    prompts: Prompts,
    columns: Columns,
    refill: Refill,
    config: TrainerConfig,
) -> Filled:
    """Sample a rollout, and further prompts in place of those without a signal.

    Args:
        sample: responses to some prompts and their rewards, of attempt 0, 1, ...
        prompts: of the first attempt, as many as the batch is to have.
        columns: their columns.
        refill: where further ones come from.
        config: group size, minibatches, what counts in the loss.

    Raises:
        ConfigError: `batch.signal` names no reward function, or there are several and it is empty.
    """
    settings, group = refill.settings, config.group_size
    parts: list[ScoredResponses] = []
    alive: list[bool] = []
    wanted = tokens = 0
    while True:
        part = sample(prompts, columns, len(parts))
        parts.append(part)
        accuracy = part.result.by_function[signal_name(settings, [*part.result.by_function])]
        alive += groups_with_signal(accuracy, counted_rows(part, config).tolist(), group)
        wanted = wanted or len(alive)
        tokens += int(part.rollout.attention_mask.sum())
        missing = wanted - sum(alive)
        if settings.max_responses:
            missing = min(missing, settings.max_responses // group - len(alive))
        spent = 0 < settings.max_tokens <= tokens
        if missing < 1 or spent or len(parts) >= settings.max_num_gen_batches:
            break
        prompts, columns = refill.draw(missing)
    taken = _taken(alive, wanted, -(-config.minibatches // group))
    device = parts[0].rewards.device
    rows = torch.tensor([g * group + i for g in taken for i in range(group)], device=device)
    return Filled(
        scored=parts[0] if len(parts) == 1 else _stacked(parts, config.pad_token or 0),
        rows=None if len(taken) == len(alive) else rows,
        attempts=[n for n, part in enumerate(parts) for _ in part.prompts],
        metrics={
            "batch/attempts": len(parts),
            "batch/drawn": len(alive),
            "batch/tokens": tokens,
            "batch/kept_frac": sum(alive) / len(alive),
            "batch/full": float(sum(alive) >= wanted),
        },
    )


class Judged(NamedTuple):
    """What samples say of the groups of a rollout."""

    accuracy: list[float]
    """NaN where there is none."""
    counted: list[bool]
    """Responses whose accuracy counts."""
    alive: list[bool]
    """By group, whether these differ."""


def judged(
    samples: Sequence[Mapping[str, Any]], settings: BatchConfig, config: TrainerConfig
) -> Judged:
    """The groups of all responses that were drawn.

    Args:
        samples: of all responses, as the trainer has them, rows of a prompt adjacent.
        settings: which reward function is the accuracy.
        config: group size, and whether truncated responses count.

    Raises:
        ConfigError: `batch.signal` names no reward function, or there are several and it is empty.
    """
    name = signal_name(settings, [*samples[0]["rewards"]])
    accuracy = [float(sample["rewards"][name]) for sample in samples]
    counted = [
        math.isfinite(value)
        and math.isfinite(sample["reward"])
        and (sample["finished"] or not config.mask_truncated)
        for value, sample in zip(accuracy, samples)
    ]
    return Judged(accuracy, counted, groups_with_signal(accuracy, counted, config.group_size))


def with_attempts(
    samples: list[dict[str, Any]], attempts: Sequence[int], rows: Int[Tensor, " M"] | None
) -> list[dict[str, Any]]:
    """Samples with the attempt that drew each, and whether it is trained on (`kept`)."""
    kept = set(range(len(samples)) if rows is None else rows.tolist())
    return [
        sample | {"attempt": attempt, "kept": n in kept}
        for n, (sample, attempt) in enumerate(zip(samples, attempts, strict=True))
    ]


def _taken(alive: Sequence[bool], wanted: int, least: int) -> list[int]:
    """Groups to train on, in the order in which they were drawn.

    Those with a signal; beside them the first others, where there are fewer than `least`. Without
    any, the first `wanted`: the rollout as it would be without dynamic sampling.
    """
    with_it = [group for group, there in enumerate(alive) if there]
    if not with_it:
        return list(range(wanted))
    others = [group for group, there in enumerate(alive) if not there]
    return sorted(with_it + others[: max(0, least - len(with_it))])


def _stacked(parts: Sequence[ScoredResponses], pad_token: int) -> ScoredResponses:
    """The responses of several attempts, one after the other."""
    counts = [len(part.prompts) for part in parts]
    return ScoredResponses(
        rollout=_stacked_rollouts([part.rollout for part in parts], pad_token),
        rewards=torch.cat([part.rewards for part in parts]),
        prompts=[prompt for part in parts for prompt in part.prompts],
        completions=[text for part in parts for text in part.completions],
        columns=_side_by_side([part.columns for part in parts], counts),
        result=_stacked_results([part.result for part in parts], counts),
    )


def _stacked_rollouts(parts: Sequence[Rollout], pad_token: int) -> Rollout:
    """Rows of several rollouts without environments, padded to the longest of them."""

    def column(name: str, *, left: bool = False) -> Tensor:
        values = [getattr(part, name) for part in parts]
        width = max(value.shape[1] for value in values)
        fill = pad_token if name.endswith("_ids") else 0
        padded = []
        for value in values:
            padding = value.new_full((len(value), width - value.shape[1]), fill)
            padded.append(torch.cat([padding, value] if left else [value, padding], 1))
        return torch.cat(padded)

    return Rollout(
        prompt_ids=column("prompt_ids", left=True),
        prompt_mask=column("prompt_mask", left=True),
        response_ids=column("response_ids"),
        response_mask=column("response_mask"),
        old_logprobs=column("old_logprobs"),
        sampling_logprobs=column("sampling_logprobs"),
        finished=torch.cat([part.finished for part in parts]),
        group_size=parts[0].group_size,
        fast=all(part.fast for part in parts),
    )


def _stacked_results(parts: Sequence[RewardResult], counts: Sequence[int]) -> RewardResult:
    """Rewards of several calls; what functions told is averaged over the responses."""
    events, first = [], 0
    for part, count in zip(parts, counts):
        for event in part.events:
            sample = None if event.sample is None else event.sample + first
            events.append(dataclasses.replace(event, sample=sample))
        first += count
    metrics = {}
    for name in dict.fromkeys(name for part in parts for name in part.metrics):
        told = [(part.metrics[name], n) for part, n in zip(parts, counts) if name in part.metrics]
        metrics[name] = math.fsum(value * n for value, n in told) / sum(n for _, n in told)
    names = parts[0].by_function
    return RewardResult(
        total=[value for part in parts for value in part.total],
        by_function={n: [value for part in parts for value in part.by_function[n]] for n in names},
        dropped=sum(part.dropped for part in parts),
        events=tuple(events),
        metrics=metrics,
        extras=_side_by_side([part.extras for part in parts], counts),
    )


def _side_by_side(
    tables: Sequence[Mapping[str, list[Any]]], counts: Sequence[int]
) -> dict[str, list[Any]]:
    """Columns of several tables, one after the other; None where a table lacks one."""
    names = dict.fromkeys(name for table in tables for name in table)
    return {
        name: [v for table, n in zip(tables, counts) for v in table.get(name, [None] * n)]
        for name in names
    }
