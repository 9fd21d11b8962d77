"""The Triton kernels, run by Triton's interpreter and compiled for an H100 without one at hand."""

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hmpo.logprobs.fold import triton_kernels

CASES = Path(__file__).with_name("triton_cases.py")
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hmpo.logprobs.triton_fold import _fold_kernel, _gradient_kernel

scalars = {"stride": "i64", "targets": "*i64", "width": "i32", "inverse": "fp32", "cap": "fp32"}
for kernel, settings in (
    (_fold_kernel, {"ENTROPY": True, "SOFTCAP": True, "BLOCK": 4096}),
    (_gradient_kernel, {"ENTROPY": True, "SOFTCAP": True, "BLOCK": 4096}),
):
    for tile in ("*bf16", "*fp32"):
        types = scalars | dict.fromkeys(settings, "constexpr") | {"logits": tile}
        signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=settings)
        target = GPUTarget("cuda", 90, 32)
        built = triton.compile(source, target=target, options={"num_warps": 8})
        assert len(built.asm["cubin"]) > 0
        print("built", kernel.__name__, tile)
"""

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed (pip install triton==3.9.0)",
)


def run(arguments: list[str], tmp_path: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own, since Triton reads its settings when it is first imported."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)} | settings
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=240
    )


@needs_triton
def test_kernels_agree_with_the_loops(tmp_path: Path) -> None:
    settings = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)], tmp_path, **settings)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@needs_triton
def test_kernels_compile_for_an_h100(tmp_path: Path) -> None:
    done = run(["-c", COMPILE], tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("built") == 4


@pytest.mark.parametrize("missing", [True, False])
def test_without_a_working_triton_one_message_tells_of_the_fallback(
    missing: bool, monkeypatch, caplog
) -> None:
    if not missing and torch.cuda.is_available():
        pytest.skip("Triton may well work here")
    if missing:
        monkeypatch.setitem(sys.modules, "hmpo.logprobs.triton_fold", None)
    device = torch.device("cuda", 0)
    triton_kernels.cache_clear()
    with caplog.at_level(logging.WARNING, "hmpo.logprobs.fold"):
        assert triton_kernels(device) is None
        assert triton_kernels(device) is None
    triton_kernels.cache_clear()
    assert len(caplog.records) == 1
    assert "log-probs on cuda:0 without Triton kernels" in caplog.text


def test_a_cpu_never_imports_triton() -> None:
    code = (
        "import sys, torch, hmpo, hmpo.logprobs.head, hmpo.logprobs.fold as fold\n"
        "assert fold.triton_kernels(torch.device('cpu')) is None\n"
        "assert 'triton' not in sys.modules and 'hmpo.logprobs.triton_fold' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
