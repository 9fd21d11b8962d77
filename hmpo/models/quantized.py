"""4-bit weights below LoRA adapters (QLoRA, arXiv 2305.14314), by bitsandbytes.

On a CPU bitsandbytes 0.50 repacks 4-bit weights in evaluation mode for a product without a
gradient, and log-probs are taken in that mode: the gradient would be wrong without a word. So a GPU
it is.
"""

from typing import Any

import torch

from hmpo.config import PolicyConfig
from hmpo.errors import ModelError, require_installed


def refuse_quantized(config: PolicyConfig, place: torch.device) -> None:
    """Refuse 4-bit weights where they cannot be, before anything is read or downloaded.

    Raises:
        ModelError: no GPU.
        MissingDependencyError: bitsandbytes is not installed.
    """
    if config.quantize == "none":
        return
    if place.type != "cuda":
        raise ModelError(
            f"policy.quantize: got {config.quantize!r} on {place}, expected 'none': 4-bit weights "
            'train on a GPU only; leave it out, or halve the memory by policy.dtype = "bfloat16"'
        )
    require_installed("bitsandbytes", f'policy.quantize = "{config.quantize}"', "quant")


def quantization(config: PolicyConfig, dtype: torch.dtype, place: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is told of 4-bit weights; nothing without them.

    Args:
        config: the policy.
        dtype: of what is not quantized (embeddings, norms, the head), and of the products.
        place: where the weights are quantized, and stay.
    """
    if config.quantize == "none":
        return {}
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": settings, "device_map": {"": place}}
