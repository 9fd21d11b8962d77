import pytest
import torch
from torch import Tensor

from hmpo import members
from hmpo.config.objective import MismatchConfig, ObjectiveConfig
from hmpo.errors import ShapeError
from hmpo.logprobs.head import LEAST_ROWS, head_logprobs
from hmpo.logprobs.one_pass import one_pass, one_pass_serves, whole_responses
from hmpo.objective.loss import power_mean_loss
from hmpo.objective.mismatch import on_policy_rows
from hmpo.objective.terms import count_denominators, minibatch_band

F64 = torch.float64
LENGTHS = [4, 1, 6, 0, 3, 5, 2]
MASK = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
ADVANTAGES = torch.tensor([1.0, -0.5, 0.0, 2.0, -1.5, 0.3, -0.2], dtype=F64)
EXACT = {"rtol": 0, "atol": 1e-12}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


class Case:
    """Seven ragged responses, some rows of a head, and log-probs of an older policy."""

    def __init__(self) -> None:
        n = int(MASK.sum())
        self.hidden = normal(n, 5, seed=1).requires_grad_()
        self.weight = normal(17, 5, seed=2).requires_grad_()
        self.bias = normal(17, seed=3).requires_grad_()
        self.targets = torch.arange(n) * 7 % 17
        with torch.no_grad():
            now = self.logprobs(store=0)
        self.old = (now - 0.3 * normal(*MASK.shape, seed=4)) * MASK
        self.ref = (now - 0.2 * normal(*MASK.shape, seed=6)) * MASK

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.weight, self.bias]

    def logprobs(self, **options: int) -> Tensor:
        picked, _ = head_logprobs(self.hidden, self.weight, self.bias, self.targets, **options)
        return picked.new_zeros(MASK.shape).masked_scatter(MASK, picked)

    def loss(self, values: Tensor, rows: slice, config: ObjectiveConfig, **options) -> Tensor:
        new = values.new_zeros(MASK[rows].shape).masked_scatter(MASK[rows], values)
        inputs = (new, self.old[rows], MASK[rows], ADVANTAGES[rows], config)
        return power_mean_loss(
            *inputs, ref_logprobs=self.ref[rows], denominators=count_denominators(MASK), **options
        )

    def one_pass(self, loss_of, **options):
        inputs = (self.hidden, self.weight, self.bias, self.targets, LENGTHS, loss_of)
        return one_pass(*inputs, **options)


@pytest.mark.parametrize("chunk", [1, 7, 512])
@pytest.mark.parametrize("name", members.BY_NAME)
def test_one_pass_equals_autograd_for_every_member(name: str, chunk: int) -> None:
    config, case = members.BY_NAME[name](), Case()
    new = case.logprobs(store=0)
    inputs = (new, case.old, MASK, ADVANTAGES, config)
    band = minibatch_band(*inputs) if config.needs_band else None
    want = power_mean_loss(*inputs, ref_logprobs=case.ref, band=band)
    found = case.one_pass(lambda x, rows: case.loss(x, rows, config, band=band), chunk=chunk)
    assert torch.allclose(found.loss, want, **EXACT)
    assert torch.allclose(found.logprobs, new[MASK], **EXACT)
    gradients = torch.autograd.grad(found.loss, case.leaves)
    for got, exact in zip(gradients, torch.autograd.grad(want, case.leaves)):
        assert torch.allclose(got, exact, **EXACT)
        assert exact.abs().max() > 1e-4, "a gradient of nothing proves nothing"


def test_a_reference_and_an_off_policy_mask_are_part_of_a_block() -> None:
    config, case = ObjectiveConfig(kl_coef=0.3), Case()
    mismatch = MismatchConfig(off_policy_low=0.9)

    def weighed(new: Tensor, rows: slice) -> Tensor | None:
        inputs = (case.old[rows], MASK[rows], ADVANTAGES[rows], mismatch)
        kept = on_policy_rows(new.detach(), *inputs)
        return None if kept is None else kept.double()

    def loss_of(values: Tensor, rows: slice) -> Tensor:
        new = values.new_zeros(MASK[rows].shape).masked_scatter(MASK[rows], values)
        return case.loss(values, rows, config, weights=weighed(new, rows))

    new = case.logprobs(store=0)
    weights = weighed(new, slice(None))
    assert 0 < weights.sum() < len(LENGTHS)
    want = power_mean_loss(
        new, case.old, MASK, ADVANTAGES, config, ref_logprobs=case.ref, weights=weights
    )
    found = case.one_pass(loss_of, chunk=5)
    assert torch.allclose(found.loss, want, **EXACT)
    gradients = torch.autograd.grad(found.loss, case.leaves)
    for got, exact in zip(gradients, torch.autograd.grad(want, case.leaves)):
        assert torch.allclose(got, exact, **EXACT)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_one_pass_passes_gradcheck(softcap: float | None) -> None:
    case, mix = Case(), normal(sum(LENGTHS), seed=9)

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        def loss_of(values: Tensor, rows: slice) -> Tensor:
            start = sum(LENGTHS[: rows.start])
            return (values.square() * mix[start : start + len(values)]).sum()

        options = {"temperature": 0.7, "softcap": softcap, "chunk": 7}
        return one_pass(hidden, weight, bias, case.targets, LENGTHS, loss_of, **options).loss

    # One set of gradients is handed out once, so each backward pass gets a forward pass.
    assert torch.autograd.gradcheck(Scaled.of(call), case.leaves)


class Scaled:
    """A function that gradcheck may differentiate again and again."""

    @staticmethod
    def of(call):
        class Again(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *tensors):
                ctx.save_for_backward(*tensors)
                return call(*tensors)

            @staticmethod
            def backward(ctx, grad):
                leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
                with torch.enable_grad():
                    return torch.autograd.grad(call(*leaves) * grad, leaves)

        return Again.apply


def test_logprobs_and_entropy_come_without_gradient() -> None:
    case = Case()
    found = case.one_pass(lambda values, rows: values.sum())
    assert found.loss.requires_grad
    assert not found.logprobs.requires_grad and not found.entropy.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        found.logprobs.sum().backward()
    want = head_logprobs(case.hidden, case.weight, case.bias, case.targets)[1]
    assert torch.allclose(found.entropy, want, **EXACT)


def test_gradients_are_handed_out_once() -> None:
    case = Case()
    loss = case.one_pass(lambda values, rows: values.sum()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out once"):
        loss.backward()


def test_a_factor_on_the_loss_reaches_the_gradients() -> None:
    case = Case()

    def gradients(factor: float) -> list[Tensor]:
        loss = case.one_pass(lambda values, rows: values.sum()).loss * factor
        return list(torch.autograd.grad(loss, case.leaves))

    for once, thrice in zip(gradients(1), gradients(-3)):
        assert torch.allclose(-3 * once, thrice, **EXACT)


def test_a_loss_without_gradient_gives_zeros() -> None:
    case = Case()
    loss = case.one_pass(lambda values, rows: values.sum().detach()).loss
    assert all(not x.any() for x in torch.autograd.grad(loss, case.leaves))
    with torch.no_grad():
        assert not case.one_pass(lambda values, rows: values.sum()).loss.requires_grad


def test_frozen_weights_get_no_gradient() -> None:
    case = Case()
    hidden = case.hidden
    inputs = (case.weight.detach(), case.bias.detach(), case.targets)
    loss = one_pass(hidden, *inputs, LENGTHS, lambda values, rows: values.sum(), chunk=7).loss
    want = torch.autograd.grad(head_logprobs(hidden, *inputs)[0].sum(), hidden)[0]
    assert torch.allclose(torch.autograd.grad(loss, hidden)[0], want, **EXACT)


def test_blocks_hold_whole_responses() -> None:
    assert whole_responses([], 5) == []
    assert whole_responses([0, 0], 5) == [slice(0, 2)]
    assert whole_responses([3, 2, 1], 5) == [slice(0, 2), slice(2, 3)]
    assert whole_responses([9, 1, 4, 0, 1], 5) == [slice(0, 1), slice(1, 4), slice(4, 5)]
    covered = [i for group in whole_responses(LENGTHS, 7) for i in range(7)[group]]
    assert covered == list(range(7))


def test_one_pass_serves_responses_that_fit_where_logits_cannot_wait() -> None:
    weight = torch.empty(151936, 1)
    limit = 2 * LEAST_ROWS
    assert one_pass_serves(weight, [3, limit], 512)
    assert not one_pass_serves(weight, [3, limit + 1], 512), "the response is too long"
    assert not one_pass_serves(weight, [100], 512), "its logits may wait"
    assert one_pass_serves(torch.empty(32000, 1), [1024, 7], 512)
    assert not one_pass_serves(torch.empty(32000, 1), [1024, 7], 128), "few rows were asked for"
    with torch.no_grad():
        assert not one_pass_serves(weight, [3, limit], 512)


def test_lengths_that_do_not_add_up_are_refused() -> None:
    case = Case()
    inputs = (case.hidden, case.weight, case.bias, case.targets)
    with pytest.raises(ShapeError, match="lengths: got a sum of 5, expected 21"):
        one_pass(*inputs, [2, 3], lambda values, rows: values.sum())
