import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmpo.errors import ConfigError
from hmpo.optim.newton_schulz import (
    GAIN,
    JORDAN,
    NS_COEFFICIENTS,
    _restarts,
    fast_dtype,
    gram_newton_schulz,
    newton_schulz,
    ns_triples,
    polar_factor,
)
from tests.oracles import muon as oracle

SHAPES = [(6, 4), (4, 6), (5, 5), (1, 3), (3, 1), (8, 40)]


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def power_law(size, power=1.5):
    u, _, v = torch.linalg.svd(random(size, size), full_matrices=False)
    return (u * torch.arange(1, size + 1, dtype=torch.float64) ** -power) @ v


@pytest.mark.parametrize("form", [newton_schulz, gram_newton_schulz])
@pytest.mark.parametrize("name", NS_COEFFICIENTS)
def test_both_forms_equal_the_loop(name, form):
    triples = ns_triples(name)
    for shape in SHAPES:
        matrix = random(*shape)
        found = form(matrix, triples, dtype=torch.float64)
        torch.testing.assert_close(found, oracle.newton_schulz(matrix, triples), rtol=0, atol=1e-8)
        batch = torch.stack([matrix, 2 * matrix, -matrix])
        many = form(batch, triples, dtype=torch.float64)
        torch.testing.assert_close(many, torch.stack([found, found, -found]), rtol=0, atol=1e-8)


# Range of the scalar map over singular values in [1e-2, 1], and its slope at 0, computed apart
# from this code.
@pytest.mark.parametrize(
    ("name", "low", "high", "slope"),
    [
        ("jordan", 0.682, 1.134, 485),
        ("you", 0.978, 1.032, 493),
        ("polar_express", 0.870, 1.124, 976),
        ("cans", 0.884, 1.120, 1049),
        ("deepseek_v4", 1.0, 1.0, 79263),
    ],
)
def test_singular_values_are_lifted_to_one(name, low, high, slope):
    sigma = torch.logspace(-2, 0, 4000, dtype=torch.float64)
    x, growth = sigma.clone(), 1.0
    for a, b, c in ns_triples(name):
        x = a * x + b * x**3 + c * x**5
        growth *= a
    assert float(x.min()) == pytest.approx(low, abs=1e-3)
    assert float(x.max()) == pytest.approx(high, abs=1e-3)
    assert growth == pytest.approx(slope, rel=1e-3)


def test_more_steps_of_polar_express_converge():
    sigma = torch.logspace(-3, 0, 4000, dtype=torch.float64)
    for a, b, c in ns_triples("polar_express", 8):
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    torch.testing.assert_close(sigma, torch.ones_like(sigma), rtol=0, atol=1e-3)


# Cosine with the polar factor of the singular value decomposition, measured apart from this code
# on other draws: hence 0.01 (0.03 for the power law).
@pytest.mark.parametrize(
    ("name", "gaussian", "steep"),
    [
        ("jordan", 0.983, 0.639),
        ("you", 0.994, None),
        ("polar_express", 0.993, 0.747),
        ("cans", 0.994, 0.758),
        ("deepseek_v4", 1.0, 1.0),
    ],
)
def test_cosine_with_the_polar_factor(name, gaussian, steep):
    triples = ns_triples(name)
    for matrix, cosine, margin in (
        (random(512, 512), gaussian, 0.01),
        (power_law(512), steep, 0.03),
    ):
        if cosine is None:
            continue
        found = newton_schulz(matrix, triples).double()
        exact = oracle.polar(matrix)
        value = torch.cosine_similarity(found.flatten(), exact.flatten(), dim=0)
        assert float(value) == pytest.approx(cosine, abs=margin)


@pytest.mark.parametrize("name", NS_COEFFICIENTS)
def test_gram_form_equals_the_other_in_float32(name):
    triples = ns_triples(name)
    u, _, v = torch.linalg.svd(random(32, 128), full_matrices=False)
    steep = (u * torch.arange(1, 33, dtype=torch.float64) ** -1.5) @ v
    low_rank = random(32, 3) @ random(3, 128, seed=1)
    for matrix in (random(32, 128), steep, random(128, 32)):
        found = gram_newton_schulz(matrix.float(), triples)
        expected = oracle.newton_schulz(matrix, triples)
        assert float((found - expected).norm() / expected.norm()) < 1e-4
    # What is rounding in a singular value of 0 may grow up to the slope, no further.
    found = gram_newton_schulz(low_rank.float(), triples)
    assert float(torch.linalg.matrix_norm(found, 2)) < 1.5


def test_gram_form_in_float16_stays_near():
    matrix = random(32, 128)
    for name in ("jordan", "you", "polar_express"):
        expected = oracle.newton_schulz(matrix, ns_triples(name))
        found = gram_newton_schulz(matrix, ns_triples(name), dtype=torch.float16).double()
        assert float((found - expected).norm() / expected.norm()) < 0.02


def test_gram_form_refuses_bfloat16():
    with pytest.raises(ConfigError, match="bfloat16"):
        gram_newton_schulz(random(2, 4), ns_triples("jordan"), dtype=torch.bfloat16)
    matrix, triples = random(4, 16), ns_triples("jordan")
    for dtype, form in ((torch.bfloat16, newton_schulz), (torch.float32, gram_newton_schulz)):
        same = polar_factor(matrix, triples, dtype=dtype) == form(matrix, triples, dtype=dtype)
        assert bool(same.all())


@given(st.lists(st.floats(0.1, 9.0), min_size=1, max_size=12), st.sampled_from(list(GAIN.values())))
def test_restarts_keep_every_step_and_bound_the_growth(slopes, limit):
    triples = [(a, 0.0, 0.0) for a in slopes]
    runs = _restarts(triples, limit)
    assert [t for run in runs for t in run] == triples
    for run in runs:
        growth = 1.0
        for a, _, _ in run:
            growth *= a
        assert len(run) == 1 or growth <= limit * (1 + 1e-12)


def test_scale_of_the_matrix_does_not_matter():
    matrix = random(6, 9)
    for dtype in (torch.float32, torch.float16):
        one = newton_schulz(matrix.float(), ns_triples("you"), eps=1e-30, dtype=dtype)
        small = newton_schulz(matrix.float() * 2**-40, ns_triples("you"), eps=1e-30, dtype=dtype)
        assert torch.equal(one, small)


def test_the_matrix_is_left_as_it_was():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        matrix = random(4, 12).to(dtype)
        old = matrix.clone()
        for form in (newton_schulz, polar_factor):
            form(matrix, ns_triples("jordan"), dtype=dtype)
        assert torch.equal(matrix, old)


def test_steps_default_to_the_set():
    assert ns_triples("jordan") == (JORDAN,) * 5
    assert len(ns_triples("deepseek_v4")) == 10 and len(ns_triples("polar_express")) == 5
    assert ns_triples([(1, 2, 3), (4, 5, 6)]) == ((1, 2, 3), (4, 5, 6))
    assert ns_triples([(1, 2, 3), (4, 5, 6)], 3)[-1] == (4, 5, 6)
    with pytest.raises(ConfigError):
        ns_triples([(1, 2, float("nan"))])


@pytest.mark.parametrize(
    ("processor", "dtype"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"avx2": True, "avx512_f": True}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_the_processor_chooses_the_precision(processor, dtype, monkeypatch):
    monkeypatch.setattr("hmpo.processor.capabilities", lambda: processor)
    assert fast_dtype("cpu") == dtype
    assert fast_dtype("mps") == torch.float32


def test_a_cuda_device_without_bfloat16_gets_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated, n=native: n)
        assert fast_dtype("cuda") == dtype
