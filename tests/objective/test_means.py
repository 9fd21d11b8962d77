import itertools
import math
import subprocess
import sys

import pytest
import torch
from torch.autograd import gradcheck

from hmpo.errors import ConfigError
from hmpo.objective.means import (
    ahm_iterate,
    ahm_mean,
    ahm_steps,
    effective_sample_size,
    log_power_mean,
    power_mean_weights,
)
from hmpo.objective.solve import solve_exponent
from tests.objective.cases import ROWS, ragged, row
from tests.oracles import means as oracle

EXPONENTS = [50.0, -50.0, 3.0, -3.0, 1.0, -1.0, 0.5, -0.5, 0.1, 0.01, -0.01, 1e-4, -1e-4, 1e-6, 0.0]


def test_values_by_hand():
    d, mask = row([math.log(1.0), math.log(2.0), math.log(4.0)])
    hand = {1.0: 7 / 3, 0.0: 2.0, -1.0: 12 / 7, 2.0: math.sqrt(7), -2.0: math.sqrt(16 / 7)}
    for p, mean in hand.items():
        assert log_power_mean(d, mask, p).exp().item() == pytest.approx(mean, rel=1e-15)


@pytest.mark.parametrize("p", EXPONENTS)
def test_ragged_rows_equal_the_loops(p):
    d, mask = ragged(ROWS)
    expected = torch.tensor([oracle.log_power_mean(r, p) for r in ROWS], dtype=torch.float64)
    torch.testing.assert_close(log_power_mean(d, mask, p), expected, rtol=1e-13, atol=1e-15)
    weights = power_mean_weights(d, mask, p)
    for i, values in enumerate(ROWS):
        assert weights[i, : len(values)].tolist() == pytest.approx(oracle.weights(values, p))
        assert not weights[i, len(values) :].any()


@pytest.mark.parametrize("sigma", [0.02, 0.3, 3.0])
@pytest.mark.parametrize("length", [1, 2, 3, 8, 64, 512, 2048, 8192])
def test_float32_accuracy(sigma, length):
    """Against the float64 loops on the same float32 inputs: 1e-6 in all three quantities."""
    generator = torch.Generator().manual_seed(length)
    noise = torch.randn(length, generator=generator, dtype=torch.float64)
    d = (noise * sigma - sigma**2 / 2).float()
    values, mask = d.double().tolist(), torch.ones(1, length, dtype=torch.bool)
    for p in EXPONENTS:
        x = d.unsqueeze(0).clone().requires_grad_()
        q = torch.tensor(p, requires_grad=True)
        log_mean = log_power_mean(x, mask, q)
        log_mean.sum().backward()
        exact_p = q.item()
        assert abs(log_mean.item() - oracle.log_power_mean(values, exact_p)) <= 1e-6
        weights = torch.tensor(oracle.weights(values, exact_p), dtype=torch.float64)
        assert (x.grad[0].double() - weights).abs().max() <= 1e-6 * weights.max()
        slope = oracle.slope(values, exact_p)
        assert abs(q.grad.item() - slope) <= 1e-6 * slope


def test_power_mean_exact_no_epsilon_bias():
    """The naive float32 form is off by 2e-4 here, GSPO's whole clip band."""
    generator = torch.Generator().manual_seed(1)
    d = 0.05 * torch.randn(1, 8192, generator=generator)
    mask = torch.ones_like(d, dtype=torch.bool)
    for p in (1e-4, 1e-3, 0.1, 1.0, -1.0):
        exact = oracle.log_power_mean(d[0].double().tolist(), p)
        assert abs(log_power_mean(d, mask, p).item() - exact) < 5e-9
    tiny, mask = row([1e-12, -3e-12])
    assert log_power_mean(tiny, mask, -1.0).item() == pytest.approx(-1e-12, rel=1e-9)


def test_all_means_equal_one_on_policy():
    d, mask = ragged([[0.0] * n for n in (4, 8, 16, 10)])
    for p in EXPONENTS:
        assert torch.equal(log_power_mean(d, mask, p), torch.zeros(4, dtype=torch.float64))
        torch.testing.assert_close(
            power_mean_weights(d, mask, p), mask / mask.sum(1, keepdim=True).double()
        )


def test_mean_of_sequence_independent_of_batch():
    generator = torch.Generator().manual_seed(2)
    d = torch.randn(6, 12, generator=generator)
    mask = torch.rand(6, 12, generator=generator) < 0.7
    last_bits = 4 * torch.finfo(d.dtype).eps * float(d.abs().max())
    for p in EXPONENTS:
        whole = log_power_mean(d, mask, p)
        for i in range(6):
            alone = log_power_mean(d[i : i + 1], mask[i : i + 1], p)
            torch.testing.assert_close(whole[i : i + 1], alone, rtol=0, atol=last_bits)


def test_power_mean_monotone_in_p():
    generator = torch.Generator().manual_seed(3)
    d = torch.randn(20, 30, generator=generator, dtype=torch.float64)
    mask = torch.ones_like(d, dtype=torch.bool)
    values = [log_power_mean(d, mask, p) for p in sorted(EXPONENTS)]
    assert all((low < high).all() for low, high in itertools.pairwise(values))
    assert (d.amin(1) < values[0]).all()
    assert (values[-1] < d.amax(1)).all()


def test_dp_at_zero_is_half_variance():
    d, mask = ragged([[0.3, -0.2, 0.5, 0.1], [0.7], [-1.0, 2.0]])
    p = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    log_power_mean(d, mask, p).sum().backward()
    half_variance = [v.double()[m].var(correction=0).item() / 2 for v, m in zip(d, mask)]
    assert p.grad.tolist() == pytest.approx(half_variance, abs=1e-15)


@pytest.mark.parametrize("p", [0.0, 1e-9, 1e-4, -1e-4, 0.05, -0.3, 1.0, -1.0, 3.0, 50.0, -50.0])
def test_gradcheck(p):
    d, mask = ragged(ROWS, extra=1)
    d += 0.01 * torch.arange(d.shape[1], dtype=torch.float64)
    d.requires_grad_()
    scalar = torch.tensor(p, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, q: log_power_mean(x, mask, q), (d, scalar))
    per_row = (p + 0.1 * torch.arange(5, dtype=torch.float64)).requires_grad_()
    assert gradcheck(lambda x, q: log_power_mean(x, mask, q), (d, per_row))
    assert gradcheck(lambda x: log_power_mean(x, mask, p), (d,))


def test_gradcheck_of_constant_rows_and_derived_means():
    d, mask = row([0.2, 0.2, 0.2])
    d.requires_grad_()
    for p in (0.0, 1e-4, -1.0, 50.0):
        exponent = torch.tensor(p, dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda x, q: log_power_mean(x, mask, q), (d, exponent))
    d, mask = ragged([[0.3, -0.2, 0.5], [0.7]])
    d.requires_grad_()
    assert gradcheck(lambda x: ahm_mean(x, mask), (d,))
    exponent = torch.tensor(-0.7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, q: power_mean_weights(x, mask, q), (d, exponent))
    assert gradcheck(lambda x, q: effective_sample_size(x, mask, q), (d, exponent))


def test_slope_is_accurate_on_both_sides_of_every_branch():
    """Cumulants, expm1 form and anchored form meet without a step, in float32 and float64."""
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
        d, mask = row([0.3, -0.2, 0.5, 0.1, 0.1], dtype)
        values = d[0].double().tolist()
        for size in (1e-9, 1e-8, 1e-7, 1e-5, 3e-4, 1e-3, 0.01, 0.3, 1.0, 15.0, 25.0, 27.0, 40.0):
            for sign in (-1, 1):
                p = torch.tensor(sign * size, dtype=dtype, requires_grad=True)
                log_power_mean(d, mask, p).sum().backward()
                assert p.grad.item() == pytest.approx(oracle.slope(values, p.item()), rel=tolerance)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_padding_reaches_neither_value_nor_gradient(garbage):
    clean, mask = ragged(ROWS, extra=2)
    dirty, _ = ragged(ROWS, fill=garbage, extra=2)
    for p in (-50.0, -1.0, 0.0, 1e-4, 3.0):
        results = []
        for d in (clean, dirty):
            x = d.clone().requires_grad_()
            q = torch.full((len(ROWS),), p, dtype=torch.float64, requires_grad=True)
            value = log_power_mean(x, mask, q)
            value.sum().backward()
            extras = (ahm_mean(d, mask), effective_sample_size(d, mask, p))
            results.append((value.detach(), x.grad, q.grad, *extras))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
            assert a.isfinite().all()


@pytest.mark.parametrize("p", [-50.0, 50.0])
def test_weights_of_far_tokens_pass_no_nan_from_padding(p):
    d = torch.tensor([[80.0, 79.0, math.nan], [-80.0, -79.0, math.nan]], requires_grad=True)
    mask = torch.tensor([[True, True, False]] * 2)
    exponent = torch.tensor(p, requires_grad=True)
    (
        power_mean_weights(d, mask, exponent)[:, 0] + effective_sample_size(d, mask, exponent)
    ).sum().backward()
    assert d.grad.isfinite().all()
    assert exponent.grad.isfinite()


def test_row_without_tokens_gives_zero_and_no_gradient():
    d = torch.full((2, 3), math.nan, requires_grad=True)
    p = torch.tensor(-1.0, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    value = log_power_mean(d, mask, p)
    value.sum().backward()
    assert value.tolist() == [0.0, 0.0]
    assert not d.grad.any()
    assert p.grad.item() == 0.0
    assert effective_sample_size(d, mask, 1.0).tolist() == [0.0, 0.0]


def test_nan_at_a_counted_token_is_not_hidden():
    d, mask = row([0.1, math.nan, 0.2])
    for p in EXPONENTS:
        assert log_power_mean(d, mask, p).isnan().all()
    assert solve_exponent(d, mask, 0.5, p_max=3.0).isnan().all()


def test_extreme_log_ratios_stay_finite():
    for dtype in (torch.float32, torch.float64):
        d, mask = row([80.0, -80.0, 0.0, 1.0], dtype)
        for p in EXPONENTS:
            x, q = d.clone().requires_grad_(), torch.tensor(p, dtype=dtype, requires_grad=True)
            value = log_power_mean(x, mask, q)
            value.sum().backward()
            exact = oracle.log_power_mean(d[0].tolist(), q.item())
            assert value.item() == pytest.approx(exact, rel=1e-6, abs=1e-5)
            assert x.grad.isfinite().all()
            assert q.grad.isfinite()


def test_exponents_at_the_edge_of_the_number_range():
    for dtype, sizes in ((torch.float32, (1e-45, 1e-30, 1e-19)), (torch.float64, (1e-320, 1e-155))):
        d, mask = row([0.3, -0.2, 0.5], dtype)
        for size in sizes:
            p = torch.tensor(size, dtype=dtype, requires_grad=True)
            value = log_power_mean(d, mask, p)
            value.sum().backward()
            assert value.item() == pytest.approx(0.2, rel=1e-6)
            assert p.grad.item() == pytest.approx(oracle.slope(d[0].tolist(), 0.0), rel=1e-6)


def test_dtypes():
    d, mask = row([0.5, -0.25])
    assert log_power_mean(d, mask, -1.0).dtype == torch.float64
    for half in (torch.bfloat16, torch.float16):
        x = d.to(half).requires_grad_()
        value = log_power_mean(x, mask, -1.0)
        value.sum().backward()
        assert value.dtype == torch.float32
        assert x.grad.dtype == half
        torch.testing.assert_close(value, log_power_mean(d.float(), mask, -1.0))


def test_long_sequences_ok():
    d = torch.full((1, 100_000), 0.125)
    mask = torch.ones_like(d, dtype=torch.bool)
    assert log_power_mean(d, mask, -1.0).item() == 0.125


def test_ahm_limit_is_sqrt_AH_not_G():
    for ratios, limit, geometric in (
        ((1.0, 1.0, 8.0), 2.169305, 2.0),
        ((0.01, 1.0, 1.0, 1.0), 0.170948, 0.316228),
        ((1.0, 2.0, 4.0, 8.0), math.sqrt(8), math.sqrt(8)),
    ):
        d, mask = row([math.log(r) for r in ratios])
        assert ahm_mean(d, mask).exp().item() == pytest.approx(limit, abs=1e-6)
        assert log_power_mean(d, mask, 0.0).exp().item() == pytest.approx(geometric, abs=1e-6)


def test_ahm_iteration_in_closed_form_equals_the_loop():
    gaps = [0.0, 1e-6, 1e-3, 0.1, 0.5, 1.0, 3.0, 10.0, 20.0]
    tensor = torch.tensor(gaps, dtype=torch.float64)
    for steps in (0, 1, 2, 3, 6):
        loop = [oracle.ahm_loop(g, steps) for g in gaps]
        assert ahm_iterate(tensor, steps).tolist() == pytest.approx(loop, rel=1e-8, abs=2e-15)
    for tolerance in (1e-3, 1e-6, 1e-10):
        loop = [oracle.ahm_loop_steps(g, tolerance) for g in gaps]
        assert ahm_steps(tensor, tolerance).tolist() == loop
    wide = torch.tensor([40.0, 60.0, 100.0, 160.0])
    loop = [oracle.ahm_loop_steps(g, 1e-3) for g in wide.tolist()]
    assert ahm_steps(wide, 1e-3).tolist() == loop
    assert ahm_iterate(wide, 0).tolist() == pytest.approx(wide.tolist(), rel=1e-5)
    assert ahm_iterate(tensor, 5000).tolist() == [0.0] * len(gaps)
    with pytest.raises(ConfigError, match="steps"):
        ahm_iterate(tensor, -1)
    with pytest.raises(ConfigError, match="tolerance"):
        ahm_steps(tensor, 1.0)


def test_non_finite_exponent_is_refused():
    d, mask = row([0.1])
    with pytest.raises(ConfigError, match="p: got nan"):
        log_power_mean(d, mask, math.nan)


def test_validation_survives_optimise_flag():
    """Outside the shape hook and under -O, wrong shapes still name received and expected."""
    code = """
import torch
from hmpo.errors import ShapeError
from hmpo.objective.means import log_power_mean
d, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
wrong = [
    ((d, mask[:, :2], 1.0), "mask: got torch.bool (2, 2), expected bool (2, 3)"),
    ((d, mask.long(), 1.0), "mask: got torch.int64 (2, 3), expected bool"),
    ((d[0], mask[0], 1.0), "log_ratio: got torch.float32 (3,), expected float (B, T)"),
    ((d.long(), mask, 1.0), "log_ratio: got torch.int64"),
    ((d[:, :0], mask[:, :0], 1.0), "with T >= 1"),
    ((d, mask, torch.zeros(3)), "p: got (3,), expected () or (2,)"),
]
for arguments, message in wrong:
    try:
        log_power_mean(*arguments)
    except ShapeError as error:
        if message not in str(error):
            raise SystemExit(f"{error!r} lacks {message!r}")
    else:
        raise SystemExit(f"accepted: {message}")
"""
    subprocess.run([sys.executable, "-O", "-c", code], check=True, timeout=120)
