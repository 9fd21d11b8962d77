from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hmpo.logprobs import fold as fold_module
from hmpo.logprobs import schemes
from hmpo.logprobs.fold import fold, gradient_in_place
from hmpo.logprobs.head import (
    BUFFER,
    GPU_ROWS,
    LEAST_ROWS,
    STORE,
    block_rows,
    head_logprobs,
    limits,
    logits_logprobs,
)
from hmpo.logprobs.one_pass import one_pass
from hmpo.logprobs.schemes import BackwardRows, compacted
from tests.oracles.head import head_by_loops

F64 = torch.float64
SCHEMES = {
    "store": {},
    "recompute": {"store": 0},
    "recompute in blocks": {"store": 0, "chunk": 4},
    "frozen": {"chunk": 4},
}


def problem(n: int = 10, width: int = 6, vocab: int = 23, dtype: torch.dtype = F64):
    """hidden, weight, bias, targets, and the weights of log-probs and entropies in a loss."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, generator=generator)

    targets = torch.randint(vocab, (n,), generator=generator)
    return normal(n, width), normal(vocab, width), normal(vocab), targets, normal(n), normal(n)


def run(scheme: str, hidden, weight, bias, targets, g, h=None, **options):
    """(log-probs, entropy, gradients by name) of one scheme."""
    leaves = {"hidden": hidden.clone().requires_grad_()}
    if scheme != "frozen":
        leaves["weight"] = weight = weight.clone().requires_grad_()
        if bias is not None:
            leaves["bias"] = bias = bias.clone().requires_grad_()
    options = SCHEMES[scheme] | options
    picked, entropy = head_logprobs(leaves["hidden"], weight, bias, targets, **options)
    loss = (picked * g).sum() + (0 if h is None else (entropy * h).sum())
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return picked.detach(), entropy.detach(), dict(zip(leaves, gradients))


@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_and_gradients_equal_a_loop_over_single_numbers(
    scheme: str, temperature: float, softcap: float | None
) -> None:
    hidden, weight, bias, targets, g, h = problem()
    want = head_by_loops(hidden, weight, bias, targets, g, h, temperature, softcap)
    options = {"temperature": temperature, "softcap": softcap}
    picked, entropy, gradients = run(scheme, hidden, weight, bias, targets, g, h, **options)
    assert picked.tolist() == pytest.approx(want[0], abs=1e-12)
    assert entropy.tolist() == pytest.approx(want[1], abs=1e-12)
    for name, value in zip(("hidden", "weight", "bias"), want[2:]):
        if name in gradients:
            error = (gradients[name] - torch.tensor(value, dtype=F64)).abs().max()
            assert error < 1e-12, name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_float32_errs_by_no_more_than_its_rounding(scheme: str) -> None:
    exact = problem(n=40, width=64, vocab=500)
    hidden, weight, bias, targets, g, h = exact
    # |z| <= sum |x w| =: a rounds in H + 1 steps and log-sum-exp in a few; 2^-24 is half an ulp.
    a = float((hidden.abs() @ weight.abs().T + bias.abs()).max())
    bound = (64 + 8) * a * 2**-24
    want = run(scheme, *exact)
    got = run(scheme, hidden.float(), weight.float(), bias.float(), targets, g.float(), h.float())
    assert float((got[0] - want[0]).abs().max()) < bound
    assert float((got[1] - want[1]).abs().max()) < bound * 10  # d H = sum p |log p + H| d z
    for name, exact_gradient in want[2].items():
        # A probability errs by a factor exp(2 bound); then a sum over V or n terms.
        terms = {"hidden": weight, "weight": hidden, "bias": torch.ones(1, 1)}[name]
        size = float((g.abs() + h.abs() * 10).sum() * terms.abs().max())
        assert float((got[2][name] - exact_gradient).abs().max()) < 3 * bound * size


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_pass_gradcheck(scheme: str, with_bias: bool) -> None:
    hidden, weight, bias, targets, _, _ = problem(n=6, width=4, vocab=9)
    free = scheme != "frozen"
    tensors = [hidden.requires_grad_(), weight.requires_grad_(free)]
    tensors += [bias.requires_grad_(free)] if with_bias else []

    def call(x, w, b=None):
        options = {"temperature": 0.8, "softcap": 3.0}
        return head_logprobs(x, w, b, targets, **options, **SCHEMES[scheme])

    # The stored logits serve one backward pass; the next one rounds its products anew.
    assert torch.autograd.gradcheck(call, tensors, nondet_tol=1e-13)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("entropy_too", [True, False])
def test_every_scheme_equals_autograd_through_whole_logits(scheme: str, entropy_too: bool) -> None:
    hidden, weight, bias, targets, g, h = problem()
    h = h if entropy_too else None
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    logits = torch.nn.functional.linear(*leaves)
    picked, entropy = logits_logprobs(logits, targets, 1.3)
    loss = (picked * g).sum() + (0 if h is None else (entropy * h).sum())
    want = dict(zip(("hidden", "weight", "bias"), torch.autograd.grad(loss, leaves)))
    got = run(scheme, hidden, weight, bias, targets, g, h, temperature=1.3)
    assert torch.allclose(got[0], picked, rtol=0, atol=1e-13)
    assert torch.allclose(got[1], entropy, rtol=0, atol=1e-13)
    for name, gradient in got[2].items():
        assert torch.allclose(gradient, want[name], rtol=0, atol=1e-13), name


@pytest.mark.parametrize("scheme", ["store", "recompute", "recompute in blocks"])
def test_rows_without_gradient_are_left_out_and_nothing_changes(scheme: str, monkeypatch) -> None:
    hidden, weight, bias, targets, g, h = problem(n=30)
    g[torch.arange(30) % 3 > 0] = 0
    h[torch.arange(30) % 2 > 0] = 0
    got = run(scheme, hidden, weight, bias, targets, g, h)
    counted: list[int] = []
    original = schemes.Gradients.add

    def add(self, head, gradient, x, rows):
        counted.append(len(gradient))
        original(self, head, gradient, x, rows)

    monkeypatch.setattr(schemes.Gradients, "add", add)
    run(scheme, hidden, weight, bias, targets, g, h)
    assert sum(counted) == int(((g != 0) | (h != 0)).sum()) < 30
    monkeypatch.setattr(BackwardRows, "with_gradient", lambda self: None)
    counted.clear()
    want = run(scheme, hidden, weight, bias, targets, g, h)
    assert sum(counted) == 30
    for name, gradient in want[2].items():
        assert torch.allclose(gradient, got[2][name], rtol=1e-15, atol=1e-14), name


def test_a_batch_without_any_gradient_gives_zeros() -> None:
    hidden, weight, bias, targets, g, _ = problem()
    for scheme in SCHEMES:
        gradients = run(scheme, hidden, weight, bias, targets, g * 0)[2]
        assert all(not gradient.any() for gradient in gradients.values())


def test_no_rows_at_all_are_served() -> None:
    assert [len(x) for x in fold(torch.empty(0, 5), torch.empty(0, dtype=torch.long))] == [0, 0, 0]
    hidden, weight, bias, targets, g, _ = problem()
    for scheme in SCHEMES:
        gradients = run(scheme, hidden[:0], weight, bias, targets[:0], g[:0])[2]
        assert all(not gradient.any() for gradient in gradients.values())


def test_rows_are_compacted_in_their_own_memory() -> None:
    logits = torch.arange(24.0).view(12, 2)
    kept = torch.tensor([0, 3, 4, 7, 8, 9, 11])
    want = logits[kept]
    got = compacted(logits, kept)
    assert torch.equal(got, want) and got.data_ptr() == logits.data_ptr()


def test_a_nan_gradient_is_not_taken_for_none() -> None:
    hidden, weight, bias, targets, g, _ = problem()
    g[3] = torch.nan
    gradients = run("recompute", hidden, weight, bias, targets, g)[2]
    assert gradients["hidden"][3].isnan().all() and gradients["weight"].isnan().all()
    assert not gradients["hidden"][4].isnan().any()


def test_an_entropy_that_nobody_asked_for_is_nan_and_carries_no_gradient() -> None:
    hidden, weight, bias, targets, _, _ = problem()
    hidden.requires_grad_()
    with_it = head_logprobs(hidden, weight, bias, targets)
    picked, entropy = head_logprobs(hidden, weight, bias, targets, with_entropy=False)
    assert torch.allclose(picked, with_it[0], rtol=0, atol=1e-15)
    assert entropy.isnan().all() and not entropy.requires_grad


def test_tokens_that_are_ruled_out_have_no_part_in_entropy_or_gradient() -> None:
    logits = torch.tensor([[0.3, -torch.inf, 1.0], [2.0, 0.1, -torch.inf]], dtype=F64)
    targets = torch.tensor([0, 1])
    picked, lse, entropy = fold(logits, targets)
    want = [fold(row[row.isfinite()][None], torch.tensor([k])) for row, k in zip(logits, (0, 1))]
    assert torch.allclose(picked, torch.cat([w[0] for w in want]), rtol=0, atol=1e-15)
    assert torch.allclose(entropy, torch.cat([w[2] for w in want]), rtol=0, atol=1e-15)
    ones = torch.ones(2, dtype=F64)
    gradient_in_place(logits, targets, lse, entropy, ones, ones)
    assert logits.isfinite().all() and logits[0, 1] == 0 and logits[1, 2] == 0


def test_the_entropy_of_a_sure_policy_is_positive_and_within_half_an_ulp_of_one() -> None:
    logits = torch.zeros(1, 50)
    logits[0, 7] = 30.0
    _, _, entropy = fold(logits, torch.tensor([7]))
    exact = fold(logits.double(), torch.tensor([7]))[2]
    assert entropy > 0 and abs(entropy - exact) < 2**-24


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_rows_worked_on_together_change_nothing(rows: int, monkeypatch) -> None:
    hidden, weight, bias, targets, g, h = problem()
    want = run("recompute", hidden, weight, bias, targets, g, h, softcap=2.0)
    monkeypatch.setattr("hmpo.logprobs.fold.CACHED", rows * len(weight))
    got = run("recompute", hidden, weight, bias, targets, g, h, softcap=2.0)
    # Not bit for bit: where a row lies in a call decides which of a kernel's loops takes it.
    assert torch.allclose(got[0], want[0], rtol=0, atol=1e-14)
    assert torch.allclose(got[1], want[1], rtol=0, atol=1e-14)
    for name, gradient in want[2].items():
        assert torch.allclose(got[2][name], gradient, rtol=0, atol=1e-13), name


def test_half_precision_logits_are_folded_in_float32() -> None:
    hidden, weight, _, targets, g, h = problem(n=12, width=16, vocab=40, dtype=torch.float32)
    logits = (hidden @ weight.T).bfloat16()
    picked, lse, entropy = fold(logits, targets)
    want = fold(logits.float(), targets)
    assert picked.dtype == lse.dtype == entropy.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip((picked, lse, entropy), want))
    whole = logits.float()
    gradient_in_place(whole, targets, lse, entropy, g, h)
    gradient_in_place(logits, targets, lse, entropy, g, h)
    assert torch.equal(logits, whole.bfloat16())


def test_a_block_holds_the_buffer_or_the_chunk_or_the_least_rows() -> None:
    assert block_rows(torch.empty(32000, 1), 512) == 512
    assert block_rows(torch.empty(32000, 1), 128) == 128
    assert block_rows(torch.empty(64000, 1), 512) == (64 << 20) // (64000 * 4)
    assert block_rows(torch.empty(151936, 1), 512) == LEAST_ROWS


def test_tied_weights_add_both_gradients_and_hooks_see_the_heads() -> None:
    _, weight, _, targets, g, _ = problem(n=10, width=6)
    weight.requires_grad_()
    ids = torch.arange(10)
    seen: list[Tensor] = []
    picked, _ = head_logprobs(weight[ids] * 2, weight, None, targets)
    handle = weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    (picked * g).sum().backward()
    handle.remove()
    want = torch.autograd.grad(
        (logits_logprobs(weight[ids] * 2 @ weight.T, targets, 1.0)[0] * g).sum(), weight
    )[0]
    assert torch.allclose(weight.grad, want, rtol=0, atol=1e-13)
    assert len(seen) == 1 and torch.equal(seen[0], weight.grad)


def test_a_gpu_holds_more_by_its_memory(monkeypatch) -> None:
    known = SimpleNamespace(total_memory=64 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: known)
    assert limits(torch.device("cpu")) == (BUFFER, STORE, 1)
    assert limits(torch.device("cuda", 0)) == (2 << 30, 4 << 30, GPU_ROWS)


def test_passes_over_logits_take_more_rows_on_a_gpu_and_never_all_of_many() -> None:
    assert fold_module._block(torch.empty(10_000, 32_000, device="meta")) == (
        (1 << 26) // 32_000,
        32_000,
    )
    assert fold_module._block(torch.empty(5, 32_000, device="meta")) == (5, 32_000)


def peak_bytes(call) -> int:
    """Most bytes of tensors that a call holds at once above what was there before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("scheme", ["recompute", "one pass", "store"])
def test_memory_is_one_buffer_and_the_gradients(scheme: str, rows: int) -> None:
    n, width, vocab = 512, 64, 8000
    hidden, weight, _, targets, g, _ = problem(n, width, vocab, torch.float32)
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def call() -> None:
        if scheme == "one pass":
            parts = g.view(-1, 8)
            lengths = [8] * len(parts)
            found = one_pass(
                *leaves, None, targets, lengths, lambda x, r: x @ parts[r].flatten(), chunk=rows
            )
            found.loss.backward()
        else:
            store = 1 << 30 if scheme == "store" else 0
            picked, _ = head_logprobs(*leaves, None, targets, chunk=rows, store=store)
            (picked * g).sum().backward()

    call()
    hidden.grad = weight.grad = None
    held = 4 * vocab * (n if scheme == "store" else rows)  # logits, overwritten by their gradient
    gradients = 4 * width * (n + vocab)
    scratch = 3 * 4 * fold_module.CACHED + 16 * 4 * n  # rows in cache, and numbers by row
    block = 4 * width * rows + 4 * width * n  # hidden states of a block, and their gradient
    assert held + gradients <= peak_bytes(call) <= held + gradients + scratch + 2 * block
