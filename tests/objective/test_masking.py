import math

import pytest
import torch
from torch.autograd import gradcheck

from hmpo.objective.masking import limited, masked_difference, scaled_gradient, without_padding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_padding_of_any_kind_becomes_zero_and_values_keep_every_bit(dtype):
    x = torch.tensor([[1.5, -0.0, math.nan, -3.25], [math.inf, 7.0, -math.inf, 2.0**-20]])
    x = x.to(dtype).requires_grad_()
    mask = torch.tensor([[True, True, False, True], [False, True, False, True]])
    y = without_padding(x, mask)
    assert y.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(y, torch.where(mask, x, 0).to(y.dtype))
    y.backward(torch.full_like(y, 2.0))
    assert torch.equal(x.grad, 2.0 * mask.to(dtype))


def test_a_counted_nan_stays_and_a_view_is_not_touched():
    wide = torch.tensor([[1.0, math.nan, 3.0, 4.0]])
    y = without_padding(wide[:, ::2], torch.tensor([[True, False]]))
    assert y.tolist() == [[1.0, 0.0]]
    assert without_padding(wide, torch.ones(1, 4, dtype=torch.bool)).isnan().sum() == 1
    assert wide[0, 2] == 3.0


def test_a_masked_difference_minds_neither_padding_nor_hides_an_infinity():
    x = torch.tensor([[1.5, math.nan, -2.0, -math.inf]], requires_grad=True)
    y = torch.tensor([[0.25, 1.0, math.inf, 3.0]], dtype=torch.bfloat16)
    d = masked_difference(x, y, torch.tensor([[True, False, False, True]]))
    assert d.dtype == torch.float32
    assert d[0, :3].tolist() == [1.25, 0.0, 0.0]
    assert d[0, 3].isnan()
    d.sum().backward()
    assert x.grad.tolist() == [[1.0, 0.0, 0.0, 1.0]]


def test_limits_equal_a_clamp_in_value_and_gradient_also_on_the_bound():
    x = torch.tensor([[-2.0, -1.0, 0.5, 1.0, 3.0], [9.0, -9.0, 0.0, 0.25, -0.25]])
    low, high = torch.tensor([-1.0, -math.inf]), torch.tensor([1.0, 0.25])
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    weights = torch.arange(1.0, 11.0).view(2, 5)
    (weights * limited(mine, low, high)).sum().backward()
    (weights * theirs.clamp(low[:, None], high[:, None])).sum().backward()
    assert torch.equal(limited(x, low, high), x.clamp(low[:, None], high[:, None]))
    assert torch.equal(mine.grad, theirs.grad)
    assert mine.grad[0].tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]
    assert limited(torch.tensor([[math.nan]]), low[:1], high[:1]).isnan().all()


def test_gradients_are_those_of_the_functions():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64, generator=generator).requires_grad_()
    mask = torch.rand(3, 4, generator=generator) < 0.6
    bound, fixed = torch.full((3,), 0.8, dtype=torch.float64), x.detach() - 1
    assert gradcheck(lambda v: without_padding(v, mask), (x,))
    assert gradcheck(lambda v: masked_difference(v, fixed, mask), (x,))
    assert gradcheck(lambda v: limited(v, -bound, bound), (x,))


def test_a_scaled_gradient_leaves_the_value_alone():
    x = torch.randn(2, 3, requires_grad=True)
    scale = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.5, 1.0]])
    y = scaled_gradient(x, scale)
    assert torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(x.grad, scale)
