"""Dynamic sampling: which groups carry a signal, which are trained on, what it costs."""

import math
import random

import pytest
import torch

from hmpo.config import BatchConfig, PowerMeanConfig
from hmpo.errors import ConfigError
from hmpo.rewards import RewardResult
from hmpo.rewards.compose import RewardEvent
from hmpo.trainer.refill import Refill, filled, groups_with_signal, signal_name
from hmpo.trainer.scored import ScoredResponses
from hmpo.types import Rollout
from tests.oracles.refill import refilled

GROUP, PROMPT = 2, 3


def scored(groups, first: int, *, width: int = 2, extra: bool = False) -> ScoredResponses:
    """Responses of one token; the accuracy is the reward `math`, None a dropped one."""
    values = [math.nan if value is None else float(value) for group in groups for value in group]
    rows = len(values)
    mask = torch.zeros(rows, width, dtype=torch.bool)
    mask[:, 0] = True
    ids = torch.full((rows, width), 9)
    ids[:, 0] = first + torch.arange(rows)
    prompts = [f"p{first + n // GROUP}" for n in range(rows)]
    bad = [n for n, value in enumerate(values) if math.isnan(value)]
    return ScoredResponses(
        rollout=Rollout(
            prompt_ids=torch.full((rows, PROMPT), 5),
            prompt_mask=torch.ones(rows, PROMPT, dtype=torch.bool),
            response_ids=ids,
            response_mask=mask,
            old_logprobs=-ids.float() * mask,
            sampling_logprobs=-ids.float() * mask,
            finished=torch.ones(rows, dtype=torch.bool),
            group_size=GROUP,
        ),
        rewards=torch.tensor(values),
        prompts=prompts,
        completions=[str(n) for n in range(rows)],
        columns={"answer": list(range(rows))} | ({"more": [1] * rows} if extra else {}),
        result=RewardResult(
            total=values,
            by_function={"math": values},
            dropped=len(bad),
            events=tuple(
                RewardEvent(name="reward_none", function="math", step=0, sample=n, detail="x")
                for n in bad
            ),
            metrics={"told": float(first)},
            extras={"seen": prompts} if extra else {},
        ),
    )


def run(stream, wanted, settings, minibatches=1, **shape):
    """`filled` over a stream of groups; gives it and what each attempt has drawn."""
    at, sizes = 0, []

    def take(count):
        nonlocal at
        sizes.append(count)
        at += count
        return [[n] for n in range(at - count, at)]

    def sample(prompts, columns, attempt):
        assert attempt == len(sizes) - 1
        found = [stream[n] for (n,) in prompts]
        return scored(found, prompts[0][0], width=2 + attempt, extra=attempt == 1, **shape)

    config = PowerMeanConfig(group_size=GROUP, minibatches=minibatches)
    refill = Refill(draw=lambda count: (take(count), {}), settings=settings)
    return filled(sample, take(wanted), {}, refill, config), sizes


@pytest.mark.parametrize("seed", range(40))
def test_a_batch_is_filled_as_by_hand(seed: int) -> None:
    draw = random.Random(seed)
    share = draw.choice([0.05, 0.4, 0.9])
    stream = [
        (1, 0) if draw.random() < share else draw.choice([(0, 0), (1, 1), (None, 1), (None, None)])
        for _ in range(200)
    ]
    wanted = draw.choice([1, 3, 6])
    caps = {
        "attempts": draw.choice([1, 2, 7]),
        "tokens": draw.choice([0, 1, 40]),
        "responses": draw.choice([0, wanted * GROUP, wanted * GROUP + 5]),
    }
    minibatches = draw.choice([1, wanted * GROUP])
    settings = BatchConfig(
        filter_groups=True,
        max_num_gen_batches=caps["attempts"],
        max_tokens=caps["tokens"],
        max_responses=caps["responses"],
    )
    found, sizes = run(stream, wanted, settings, minibatches)
    rows, expected = refilled(
        stream,
        wanted,
        **caps,
        least=-(-minibatches // GROUP),
        tokens_of_group=GROUP * (PROMPT + 1),
    )
    assert sizes == expected
    total = sum(sizes)
    groups = list(range(total)) if found.rows is None else found.rows[::GROUP].div(GROUP).tolist()
    assert groups == rows
    alive = [len({v for v in group if v is not None}) > 1 for group in stream[:total]]
    assert found.metrics == {
        "batch/attempts": len(sizes),
        "batch/drawn": total,
        "batch/tokens": total * GROUP * (PROMPT + 1),
        "batch/kept_frac": sum(alive) / total,
        "batch/full": float(sum(alive) == wanted),
    }


def test_attempts_stand_one_after_the_other_in_every_column() -> None:
    stream = [(1, 0), (1, 1), (None, 0), (0, 1), (1, 0)]
    found, sizes = run(stream, 3, BatchConfig(filter_groups=True))
    assert sizes == [3, 2] and found.attempts == [0] * 6 + [1] * 4
    whole = found.scored
    assert found.rows is not None and found.rows.tolist() == [0, 1, 6, 7, 8, 9]
    assert whole.rollout.response_ids[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6]
    assert whole.rollout.response_ids.shape == (10, 3) == whole.rollout.old_logprobs.shape
    assert whole.rollout.response_mask.sum() == 10
    assert whole.columns["more"] == [None] * 6 + [1] * 4
    assert whole.result.extras["seen"] == [None] * 6 + ["p3", "p3", "p4", "p4"]
    assert [event.sample for event in whole.result.events] == [4] and whole.result.dropped == 1
    assert whole.result.metrics == {"told": pytest.approx((0 * 6 + 3 * 4) / 10)}
    assert len(whole.prompts) == len(whole.completions) == len(whole.result.total) == 10


def test_prompts_of_other_length_are_padded_on_their_left() -> None:
    from hmpo.trainer.refill import _stacked_rollouts

    first, second = scored([(1, 0)], 0).rollout, scored([(1, 0)], 2).rollout
    short = second.select(torch.arange(2))
    object.__setattr__(short, "prompt_ids", short.prompt_ids[:, :1])
    object.__setattr__(short, "prompt_mask", short.prompt_mask[:, :1])
    both = _stacked_rollouts([first, short], 7)
    assert both.prompt_ids[2:].tolist() == [[7, 7, 5]] * 2
    assert both.prompt_mask.sum(1).tolist() == [3, 3, 1, 1]
    assert both.input_ids.shape == both.attention_mask.shape == (4, 5)


def test_a_group_is_judged_by_the_responses_that_count() -> None:
    nan = math.nan
    accuracy = [1.0, 0.0, 1.0, 0.0, nan, 1.0, 1.0, 1 + 1e-9]
    judged = groups_with_signal(accuracy, [n != 3 for n in range(8)], 2)
    assert judged == [True, False, False, False]


def test_the_accuracy_is_the_named_function_and_never_guessed_among_several() -> None:
    assert signal_name(BatchConfig(), ["math"]) == "math"
    assert signal_name(BatchConfig(signal="b"), ["a", "b"]) == "b"
    with pytest.raises(ConfigError, match=r"^batch\.signal: got '', expected the one of a, b"):
        signal_name(BatchConfig(), ["a", "b"])
    with pytest.raises(ConfigError, match=r"^batch\.signal: got 'c', expected one of a, b$"):
        signal_name(BatchConfig(signal="c"), ["a", "b"])
