"""Whether the elementwise part of log-probs runs as Triton kernels on a device."""

import importlib
import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)

_FOUND: dict[torch.device, Any] = {}
"""What was found for each device, so that one message tells of a fallback."""


def triton_kernels(device: torch.device) -> Any | None:
    """`hmpo.logprobs.triton_fold` where its kernels run, else None: torch's operations serve.

    On CUDA the kernels are tried once on two rows; that they cannot run (no Triton, no compiler
    for its launcher, a card that it does not know) is logged once. Elsewhere Triton is not even
    imported.

    Args:
        device: where the logits are.
    """
    if device.type != "cuda":
        return None
    if device not in _FOUND:
        _FOUND[device] = _tried(device)
    return _FOUND[device]


def _tried(device: torch.device) -> Any | None:
    try:
        kernels = importlib.import_module("hmpo.logprobs.triton_fold")
        logits = torch.zeros(2, 3, dtype=torch.bfloat16, device=device)
        targets = torch.zeros(2, dtype=torch.long, device=device)
        picked, lse, entropy = kernels.fold(logits, targets)
        kernels.gradient_in_place(logits, targets, lse, entropy, picked, picked)
        torch.cuda.synchronize(device)
    except Exception as error:
        # Whatever a compiler's tool chain raises is a reason not to use it, and it is told.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.warning("log-probs on %s without Triton kernels, slower (%s)", device, reason)
        return None
    return kernels
