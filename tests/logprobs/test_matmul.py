import pytest
import torch

from hmpo.errors import ConfigError
from hmpo.logprobs import matmul
from hmpo.optim.newton_schulz import fast_dtype
from hmpo.run.environment import describe_environment


@pytest.fixture(params=["mkl", "onednn"])
def library(request, monkeypatch) -> str:
    if request.param == "onednn" and not matmul.has_onednn():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setenv("HMPO_MATMUL", request.param)
    assert matmul.matmul_library() == request.param
    return request.param


def test_both_libraries_give_the_three_products(library: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(n, 48, generator=generator) for n in (20, 70))
    bias = torch.randn(70, generator=generator)
    out = torch.empty(20, 70)
    exact = x.double() @ weight.double().T
    bound = 48 * 2**-24 * float((x.abs() @ weight.abs().T + bias.abs()).max())
    assert float((matmul.project(x, weight, None, out) - exact).abs().max()) < bound
    logits = matmul.project(x, weight, bias, out)
    assert float((logits - exact - bias).abs().max()) < bound
    back = matmul.times(logits, weight)
    wanted = logits.double() @ weight.double()
    bound = 70 * 2**-24 * float((logits.abs() @ weight.abs()).max())
    assert float((back - wanted).abs().max()) < bound
    total = torch.ones(70, 48)
    matmul.add_outer(total, logits, x)
    wanted = 1 + logits.double().T @ x.double()
    bound = 22 * 2**-24 * float((1 + logits.abs().T @ x.abs()).max())
    assert float((total - wanted).abs().max()) < bound


def test_float64_never_leaves_torch(library: str) -> None:
    x, weight = torch.randn(3, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    assert torch.equal(matmul.project(x, weight, None), x @ weight.T)
    assert torch.equal(matmul.times(x @ weight.T, weight), (x @ weight.T) @ weight)


def test_a_wider_total_takes_rounded_products() -> None:
    gradient, x = torch.randn(6, 5).bfloat16(), torch.randn(6, 3).bfloat16()
    total = torch.ones(5, 3)
    matmul.add_outer(total, gradient, x)
    assert torch.equal(total, 1 + (gradient.T @ x).float())


@pytest.mark.parametrize(
    ("processor", "library"),
    [
        ({"cpu_name": "AMD EPYC 7763", "avx2": True, "avx512_f": False}, "onednn"),
        ({"cpu_name": "AMD EPYC 9654", "avx2": True, "avx512_f": True}, "mkl"),
        ({"cpu_name": "Intel Xeon", "avx2": True, "avx512_f": False}, "mkl"),
        ({}, "mkl"),
    ],
)
def test_the_processor_chooses_the_library(processor, library: str, monkeypatch) -> None:
    if not matmul.has_onednn():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.delenv("HMPO_MATMUL", raising=False)
    monkeypatch.setattr("hmpo.processor.capabilities", lambda: processor)
    assert matmul.matmul_library() == library


def test_no_clock_is_asked(monkeypatch) -> None:
    def clock() -> float:
        raise AssertionError("a choice by timing depends on what else runs")

    for name in ("time", "perf_counter", "process_time", "monotonic"):
        monkeypatch.setattr(f"time.{name}", clock)
    monkeypatch.delenv("HMPO_MATMUL", raising=False)
    assert matmul.matmul_library() in ("mkl", "onednn")
    assert fast_dtype("cpu") in (torch.bfloat16, torch.float32)


def test_without_the_operator_torch_multiplies(monkeypatch) -> None:
    def gone(*arguments: object) -> None:
        raise AttributeError("_linear_pointwise")

    matmul.has_onednn.cache_clear()
    monkeypatch.setattr(matmul, "_linear", gone)
    monkeypatch.setenv("HMPO_MATMUL", "onednn")
    assert matmul.matmul_library() == "mkl"
    matmul.has_onednn.cache_clear()


def test_the_choice_is_told_and_a_wrong_one_refused(monkeypatch) -> None:
    monkeypatch.setenv("HMPO_MATMUL", "mkl")
    assert describe_environment()["matmul"] == "mkl"
    monkeypatch.setenv("HMPO_MATMUL", "blis")
    with pytest.raises(ConfigError, match="HMPO_MATMUL: got 'blis', expected one of mkl, onednn"):
        matmul.matmul_library()
