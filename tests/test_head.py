import pytest
import torch
from torch.nn import functional

from hmpo.head import head_logprobs, logits_logprobs


def test_gradient_of_the_chunked_projection_passes_gradcheck() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 9, (6,))
    assert torch.autograd.gradcheck(
        lambda h, w, b: head_logprobs(h, w, b, targets, temperature=0.8, chunk=4),
        (hidden, weight, bias),
    )


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_block_size_changes_neither_value_nor_gradient(chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(10, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 30, (10,))
    mix = torch.randn(10, dtype=torch.float64)
    picked, entropy = head_logprobs(hidden, weight, None, targets, temperature=1.3, chunk=chunk)
    got = torch.autograd.grad((picked * mix + entropy * mix.flip(0)).sum(), (hidden, weight))
    logits = functional.linear(hidden, weight)
    picked2, entropy2 = logits_logprobs(logits, targets, 1.3)
    want = torch.autograd.grad((picked2 * mix + entropy2 * mix.flip(0)).sum(), (hidden, weight))
    assert torch.allclose(picked, picked2, rtol=0, atol=1e-13)
    assert torch.allclose(entropy, entropy2, rtol=0, atol=1e-13)
    for a, b in zip(got, want):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)
