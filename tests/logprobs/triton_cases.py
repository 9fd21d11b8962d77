"""Tests of the Triton kernels, for a process of their own: see `test_triton_head.py`.

On a GPU they run there; elsewhere under Triton's interpreter, which takes Triton's functions
apart when they are first imported and so must be asked for before.
"""

import pytest
import torch
from torch import Tensor

from hmpo.logprobs import fold as fold_module
from hmpo.logprobs import triton_fold
from hmpo.logprobs.head import head_logprobs
from hmpo.logprobs.triton_fold import fold, gradient_in_place
from tests.oracles import vocabulary_head as oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS = [1, 5, 63, 130, 1000]
"""Vocabularies of less than a block, and of several blocks of which the last is short."""
BLOCK = 64


def tile(
    width: int, rows: int = 3, size: float = 4.0, dtype=torch.float32
) -> tuple[Tensor, Tensor]:
    """Logits, and targets of which one is the very last token."""
    logits = (torch.randn(rows, width) * size).to(dtype)
    targets = torch.randint(width, (rows,))
    targets[-1] = width - 1
    return logits.to(DEVICE), targets.to(DEVICE)


def expected(logits: Tensor, targets: Tensor, temperature: float, softcap: float | None) -> Tensor:
    rows = zip(logits.tolist(), targets.tolist())
    values = [oracle.folded(row, target, temperature, softcap) for row, target in rows]
    return torch.tensor(values, dtype=torch.float64).T


def expected_gradient(logits: Tensor, targets: Tensor, g: Tensor, h: Tensor, *rest) -> Tensor:
    rows = zip(logits.tolist(), targets.tolist(), g.tolist(), h.tolist())
    return torch.tensor([oracle.gradient(*row, *rest) for row in rows], dtype=torch.float64)


def assert_folds(logits: Tensor, targets: Tensor, temperature: float, softcap=None, **options):
    got = fold(logits, targets, temperature, softcap=softcap, **options)
    want = expected(logits, targets, temperature, softcap)
    scale = 1 + want[1].abs()
    for found, value in zip(got, want):
        assert ((found.cpu().double() - value).abs() <= 1e-6 * scale).all()
    return got


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
def test_fold_is_the_loop(width: int, dtype, temperature: float, softcap: float | None) -> None:
    logits, targets = tile(width, dtype=dtype)
    before = logits.clone()
    assert_folds(logits, targets, temperature, softcap, block=BLOCK)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
def test_gradient_is_the_loop(width: int, dtype, with_entropy: bool, softcap) -> None:
    temperature = 0.7
    logits, targets = tile(width, dtype=dtype)
    before = logits.clone()
    g, h = torch.randn(2, len(logits), device=DEVICE)
    want = expected_gradient(
        logits, targets, g, h if with_entropy else torch.zeros_like(h), temperature, softcap
    )
    _, lse, entropy = fold(logits, targets, temperature, softcap=softcap, block=BLOCK)
    incoming = h if with_entropy else None
    gradient_in_place(logits, targets, lse, entropy, g, incoming, temperature, softcap, block=BLOCK)
    # The rounding of a float32 sum, and of what is stored: the interpreter cuts bfloat16 off
    # where a GPU rounds to nearest.
    cut = 2.0**-8 if DEVICE == "cuda" else 2.0**-7
    stored = cut if dtype == torch.bfloat16 else 0.0
    error = (logits.cpu().double() - want).abs()
    # A float32 exponent of size z is off by up to 2^-24 z, and so, relatively, is its exponential.
    exponent = float(before.abs().max()) / temperature
    incoming_size = float((g.abs() + h.abs() * (1 + lse.abs())).max()) / temperature
    rounding = 3e-6 + 2.0**-24 * exponent * incoming_size
    assert (error <= stored * want.abs() + rounding).all()


@pytest.mark.parametrize("width", [63, 130])
def test_ruled_out_tokens_have_no_share_and_no_gradient(width: int) -> None:
    logits, targets = tile(width)
    logits[0, :-1] = -torch.inf  # whole blocks before the first finite logit
    logits[1, 1::2] = -torch.inf
    targets[0], targets[1] = width - 1, 0
    ruled_out = logits == -torch.inf
    picked, lse, entropy = assert_folds(logits, targets, 1.0, block=BLOCK)
    assert picked[0] == 0 and entropy[0] == 0
    one = torch.ones_like(lse)
    gradient_in_place(logits, targets, lse, entropy, one, one, block=BLOCK)
    assert logits.isfinite().all() and (logits[ruled_out] == 0).all()


def test_a_target_that_is_ruled_out_has_log_prob_minus_infinity() -> None:
    logits, targets = tile(63)
    logits[0, targets[0]] = -torch.inf
    picked, lse, entropy = fold(logits, targets, block=BLOCK)
    assert picked[0] == -torch.inf and lse.isfinite().all() and entropy.isfinite().all()


@pytest.mark.parametrize("offset", [-1e4, 1e4, 1e30])
def test_large_logits_do_not_overflow_nor_blur_the_entropy(offset: float) -> None:
    logits, targets = tile(130)
    logits[:, 3], logits[:, 90] = 20.0, 19.5
    base = fold(logits, targets, block=BLOCK)
    moved = logits + offset
    got = assert_folds(moved, targets, 1.0, block=BLOCK)
    if abs(offset) < 1e5:  # the sums are about the maximum: only the logits' own rounding is left
        assert torch.allclose(got[2], base[2], rtol=0, atol=2e-3)
    assert all(value.isfinite().all() for value in got)


def test_the_result_does_not_depend_on_the_block_beyond_rounding() -> None:
    logits, targets = tile(1000)
    whole = fold(logits, targets, 0.9)
    for block in (16, 128, 4096):
        for found, value in zip(fold(logits, targets, 0.9, block=block), whole):
            assert torch.allclose(found, value, rtol=1e-6, atol=2e-6)


def test_rows_may_lie_apart_and_there_may_be_none() -> None:
    logits, targets = tile(130)
    wide = torch.full((3, 200), 7.0, device=DEVICE)
    wide[:, :130] = logits
    for found, value in zip(fold(wide[:, :130], targets), fold(logits, targets)):
        assert torch.equal(found, value)
    _, lse, entropy = fold(logits, targets)
    gradient_in_place(wide[:, :130], targets, lse, entropy, lse, None)
    assert (wide[:, 130:] == 7).all()
    assert all(len(value) == 0 for value in fold(logits[:0], targets[:0]))


def test_kernels_and_autograd_agree_on_a_loss() -> None:
    logits, targets = tile(130)
    g, h = torch.randn(2, len(logits), device=DEVICE)
    leaf = logits.double().requires_grad_()
    logp = (leaf / 0.8).log_softmax(-1)
    picked = logp.gather(1, targets[:, None])[:, 0]
    (g.double() * picked - h.double() * (logp.exp() * logp).sum(-1)).sum().backward()
    _, lse, entropy = fold(logits, targets, 0.8, block=BLOCK)
    gradient_in_place(logits, targets, lse, entropy, g, h, 0.8, block=BLOCK)
    assert leaf.grad is not None
    assert torch.allclose(logits.double(), leaf.grad, rtol=0, atol=3e-6)


def test_without_entropy_the_rest_is_the_same_and_nan_stands_in_its_place() -> None:
    logits, targets = tile(130)
    whole, part = fold(logits, targets), fold(logits, targets, with_entropy=False)
    assert torch.equal(whole[0], part[0]) and torch.equal(whole[1], part[1])
    assert part[2].isnan().all()


@pytest.mark.parametrize("scheme", ["recompute", "store", "frozen"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_gives_the_same_through_the_kernels_as_through_torch(
    scheme: str, softcap: float | None, dtype, monkeypatch
) -> None:
    hidden = torch.randn(9, 16, device=DEVICE).to(dtype).requires_grad_()
    weight = torch.randn(130, 16, device=DEVICE).to(dtype).requires_grad_(scheme != "frozen")
    leaves = [x for x in (hidden, weight) if x.requires_grad]
    targets = torch.randint(130, (9,), device=DEVICE)
    g, h = torch.randn(2, 9, device=DEVICE)
    used = []

    def through(kernels: object) -> list[Tensor]:
        monkeypatch.setattr(fold_module, "triton_kernels", lambda _: used.append(1) or kernels)
        picked, entropy = head_logprobs(
            hidden,
            weight,
            None,
            targets,
            temperature=0.8,
            softcap=softcap,
            chunk=4,
            store=1 << 20 if scheme == "store" else 0,
        )
        loss = (g * picked + h * entropy).sum()
        return [picked, entropy, *torch.autograd.grad(loss, leaves)]

    # A bfloat16 unit is 2^-7 of a number, and a gradient sums some of them.
    tolerance = 0.03 if dtype == torch.bfloat16 else 2e-5
    for with_kernels, with_torch in zip(through(triton_fold), through(None)):
        scale = with_torch.float().abs().max()
        assert (with_kernels - with_torch).float().abs().max() <= tolerance * scale
    assert used
