"""What a rollout has to learn from, and which tokens its gradient comes from."""

import dataclasses
import math

import pytest
import torch

from hmpo import members
from hmpo.config import PowerMeanConfig
from hmpo.logprobs.responses import token_logprobs
from hmpo.models.tiny import tiny_llama
from hmpo.trainer.gradient import accumulate
from hmpo.trainer.signal import duplicates, heaviest, signal_metrics
from hmpo.trainer.token_weights import token_weights
from hmpo.types import Batch, Rollout

GROUP, WIDTH = 2, 5


def batch(advantages, *, lengths=None, ids=None, seed: int = 0) -> Batch:
    """Responses of a vocabulary of 11, stale by noise."""
    draw = torch.Generator().manual_seed(seed)
    rows = len(advantages)
    if ids is None:
        ids = torch.randint(1, 11, (rows, WIDTH), generator=draw)
    ends = torch.tensor(lengths or [WIDTH] * rows)
    mask = torch.arange(WIDTH) < ends[:, None]
    old = (-2.4 + 0.5 * torch.randn(rows, WIDTH, generator=draw)) * mask
    return Batch(
        rollout=Rollout(
            prompt_ids=torch.randint(1, 11, (rows, 3), generator=draw),
            prompt_mask=torch.tensor([[True] * 3] * (rows - 1) + [[False, True, True]]),
            response_ids=ids * mask,
            response_mask=mask,
            old_logprobs=old,
            sampling_logprobs=old,
            finished=torch.ones(rows, dtype=torch.bool),
            group_size=GROUP,
        ),
        rewards=torch.tensor(advantages),
        advantages=torch.tensor(advantages),
        valid=torch.ones(rows, dtype=torch.bool),
    )


def test_the_effective_number_of_prompts_counts_those_of_equal_weight() -> None:
    cases = [
        ([1.0, -1.0] * 3, 3.0),
        ([1.0, -1.0, 0.0, 0.0, 0.0, 0.0], 1.0),
        ([0.0] * 6, 0.0),
        ([3.0, -3.0, 1.0, -1.0], math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))),
    ]
    for advantages, expected in cases:
        found = signal_metrics(batch(advantages), [True, False])
        assert found["signal/prompts_eff"] == pytest.approx(expected)
        assert found["signal/dead_frac"] == 0.5


def test_the_balance_of_signs_is_counted_by_responses_and_by_tokens() -> None:
    found = signal_metrics(batch([1.0, -1.0, 0.0, -2.0], lengths=[1, 4, 5, 5]), [True, True])
    assert found["signal/positive_frac"] == pytest.approx(1 / 3)
    assert found["signal/positive_tokens_frac"] == pytest.approx(1 / 10)
    none = signal_metrics(batch([0.0, 0.0]), [False])
    assert math.isnan(none["signal/positive_frac"])


def test_advantages_of_tokens_that_are_alike_say_what_those_of_responses_say() -> None:
    given = batch([1.0, -1.0, 0.0, -2.0], lengths=[1, 4, 5, 3])
    spread = dataclasses.replace(given, advantages=given.advantages[:, None].expand(4, WIDTH))
    found, expected = (signal_metrics(b, [True, True]) for b in (spread, given))
    assert found == pytest.approx(expected)
    mixed = torch.tensor([[1.0, -3.0, 0.0, 0.0, 9.0], [0.0] * 5, [2.0] * 5, [-1.0] * 5])
    own = dataclasses.replace(batch([0.0] * 4, lengths=[2, 5, 1, 4]), advantages=mixed)
    found = signal_metrics(own, [True, True])
    assert found["signal/positive_frac"] == pytest.approx(1 / 3)
    assert found["signal/positive_tokens_frac"] == pytest.approx(2 / 7)
    assert found["signal/prompts_eff"] == pytest.approx(
        math.exp(-0.4 * math.log(0.4) - 0.6 * math.log(0.6))
    )


def test_a_response_is_a_duplicate_within_its_group_alone() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5]] * 4)
    given = batch([1.0, -1.0, 1.0, -1.0], ids=ids, lengths=[3, 3, 3, 4])
    assert duplicates(given.rollout) == 1
    assert signal_metrics(given, [True, True])["signal/duplicate_frac"] == 0.25


@pytest.mark.parametrize("name", ["grpo", "hmpo", "gspo", "dapo", "cispo", "vespo", "sapo"])
def test_weights_of_tokens_are_those_of_the_gradient(name: str) -> None:
    """The gradient of minus the loss is the sum of w A times that of each token's log-prob."""
    torch.manual_seed(0)
    model = tiny_llama(11, seed=0, hidden_size=16, layers=1, heads=2, intermediate_size=32)
    given = batch([1.0, -1.0, 0.5, -0.5], lengths=[5, 2, 4, 3])
    objective = getattr(members, name)()
    config = PowerMeanConfig(objective=objective, group_size=GROUP, micro_batch_size=3)
    found = accumulate(model, given, config, objective, None)
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    weights = token_weights(given, found.logprobs, objective, None)
    model.zero_grad()
    rollout = given.rollout
    new = token_logprobs(model, rollout.input_ids, rollout.attention_mask, WIDTH, temperature=1.0)
    (-(weights * new * rollout.response_mask).sum()).backward()
    assert bool((weights[~rollout.response_mask] == 0).all()) and bool((weights != 0).any())
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[n], rtol=1e-3, atol=1e-6)


def test_the_heaviest_tokens_come_first_with_what_stands_before_them() -> None:
    ids = torch.tensor([[4, 5, 6, 7, 8], [9, 10, 1, 2, 3]])
    given = batch([1.0, -1.0], ids=ids, lengths=[5, 2])
    weights = torch.tensor([[0.1, 0.0, -0.4, 0.1, 0.0], [0.4, 0.0, 9.0, 9.0, 9.0]])
    found = heaviest(given, weights, None, count=5)
    assert [row["text"] for row in found] == ["6", "9", "4", "7"]
    assert [row["weight"] for row in found] == pytest.approx([-0.4, 0.4, 0.1, 0.1])
    assert [row["share"] for row in found] == pytest.approx([0.4, 0.4, 0.1, 0.1])
    prompt = given.rollout.prompt_ids.tolist()
    assert found[0]["before"] == " ".join(map(str, [*prompt[0], 4, 5]))
    assert found[1]["before"] == " ".join(map(str, prompt[1][1:])), "no padding"
    assert found[1]["reward"] == -1.0
    assert heaviest(given, torch.zeros(2, WIDTH), None) == []
