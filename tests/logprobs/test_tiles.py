"""Log-probs by tiles of the vocabulary: those of every other scheme."""

import pytest
import torch

from hmpo.logprobs import head, tiles
from hmpo.logprobs.head import head_logprobs
from hmpo.logprobs.tiles import tiled_logprobs
from tests.logprobs.test_head import problem
from tests.oracles.head import head_by_loops

F64 = torch.float64


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles in both directions, none of which fits."""
    monkeypatch.setattr(tiles, "ROWS", 4)
    monkeypatch.setattr(tiles, "COLUMNS", 5)


@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_bias", [True, False])
def test_tiles_equal_a_loop_over_single_numbers(with_bias, temperature, softcap) -> None:
    hidden, weight, bias, targets, g, h = problem()
    bias = bias if with_bias else torch.zeros_like(bias)
    want = head_by_loops(hidden, weight, bias, targets, g, h, temperature, softcap)[0]
    options = {"temperature": temperature, "softcap": softcap}
    got = tiled_logprobs(hidden, weight, bias if with_bias else None, targets, **options)
    assert got.tolist() == pytest.approx(want, abs=1e-12)


def test_log_probs_alone_are_taken_by_tiles_and_others_are_not(monkeypatch) -> None:
    hidden, weight, bias, targets, *_ = problem(dtype=torch.float32)
    calls = []

    def counted(*arguments, **options):
        calls.append(1)
        return tiled_logprobs(*arguments, **options)

    monkeypatch.setattr(head, "tiled_logprobs", counted)
    inputs = hidden, weight.requires_grad_(), bias, targets
    with torch.no_grad():
        alone, nothing = head_logprobs(*inputs, with_entropy=False)
        assert len(calls) == 1
        whole = head_logprobs(*inputs)[0]
    trained = head_logprobs(*inputs, with_entropy=False)[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        head_logprobs(*inputs, with_entropy=False)
    assert len(calls) == 1
    assert nothing.isnan().all()
    assert trained.requires_grad
    assert not alone.requires_grad
    for other in (whole, trained.detach()):
        assert torch.allclose(alone, other, rtol=0, atol=4e-6)


def test_log_probs_are_never_positive_and_ruled_out_tokens_take_no_part() -> None:
    weight = torch.cat([100 * torch.eye(7), torch.zeros(4, 7)])
    targets = torch.arange(7)
    assert (tiled_logprobs(torch.eye(7), weight, None, targets) == 0).all()
    bias = torch.full((11,), -torch.inf)
    bias[9] = 2.0
    got = tiled_logprobs(torch.eye(7), torch.zeros(11, 7), bias, torch.tensor([9] * 6 + [1]))
    assert got[:6].tolist() == [0.0] * 6
    assert got[6] == -torch.inf


def test_no_tokens_have_no_log_probs() -> None:
    assert tiled_logprobs(
        torch.empty(0, 3), torch.randn(8, 3), None, torch.empty(0).long()
    ).shape == (0,)


def test_a_logit_that_is_not_a_number_spoils_its_own_row_alone() -> None:
    hidden, weight, bias, targets, *_ = problem()
    hidden[2, 0] = torch.nan
    bad = tiled_logprobs(hidden, weight, bias, targets).isnan().nonzero()
    assert bad.tolist() == [[2]]
