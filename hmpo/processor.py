"""What the processor can do, as it says itself: the same at every start, whatever else runs."""

import functools
from typing import Any

import torch

BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
"""Instructions that multiply in bfloat16, any of which makes its products faster than float32's."""


@functools.cache
def capabilities() -> dict[str, Any]:
    """Instruction sets and name, as torch reports them; an older torch tells less."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    if ask is not None:
        return dict(ask())
    return {"avx512_f": torch.backends.cpu.get_cpu_capability().startswith("AVX512")}


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products in bfloat16."""
    return any(capabilities().get(name, False) for name in BFLOAT16)


def is_slow_under_mkl() -> bool:
    """Whether MKL is known to leave half of the processor unused: AMD's without AVX-512."""
    found = capabilities()
    return "AMD" in str(found.get("cpu_name", "")) and not found.get("avx512_f", False)
