"""Where an update stopped being finite: one fault that names its site, or None.

Sites: logprob, old_logprob, advantage, loss (before the backward pass), gradient (after it),
optimizer_state and weights. The trainers skip the update or stop; nothing is repaired.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hmpo.types import Batch

Fault = dict[str, Any]
"""`site`, and with it `where` (a tensor's name) or `sequence` and `token` (in the minibatch)."""


def forward_fault(batch: Batch, loss: Tensor, logprobs: Tensor) -> Fault | None:
    """The first place of a forward pass, in the order of computation, that is not finite."""
    mask = batch.rollout.response_mask
    for site, values in (("logprob", logprobs), ("old_logprob", batch.rollout.old_logprobs)):
        bad = (mask & ~values.isfinite()).nonzero()
        if len(bad):
            return {"site": site, "sequence": int(bad[0, 0]), "token": int(bad[0, 1])}
    bad = (~batch.advantages.isfinite()).nonzero()
    if len(bad):
        return {"site": "advantage", "sequence": int(bad[0, 0])}
    return None if bool(loss.isfinite()) else {"site": "loss"}


def gradient_fault(policy: nn.Module, norm: Tensor) -> Fault | None:
    """The first parameter whose gradient is not finite, given the global norm."""
    if bool(norm.isfinite()):
        return None
    for name, parameter in policy.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return {"site": "gradient", "where": name}
    return {"site": "gradient", "where": "norm"}


def optimizer_fault(policy: nn.Module, optimizer: torch.optim.Optimizer) -> Fault | None:
    """The first tensor of the optimizer's state that is not finite."""
    names: dict[Tensor, str] = {p: name for name, p in policy.named_parameters()}
    named = (
        (f"{names.get(parameter, 'unnamed')}.{key}", value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor) and key != "step"
    )
    where = _first_bad(named)
    return None if where is None else {"site": "optimizer_state", "where": where}


def weights_fault(policy: nn.Module) -> Fault | None:
    """The first trainable parameter that is not finite."""
    where = _first_bad((n, p.detach()) for n, p in policy.named_parameters() if p.requires_grad)
    return None if where is None else {"site": "weights", "where": where}


def fault_text(fault: Fault) -> str:
    """A fault in words: `site gradient, where lm_head.weight`."""
    return ", ".join(f"{key} {value}" for key, value in fault.items())


def _first_bad(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first floating tensor with a NaN or infinity, at one look per device."""
    tensors = [(name, value) for name, value in named if value.is_floating_point()]
    sums: dict[torch.device, list[Tensor]] = defaultdict(list)
    for _, value in tensors:
        wide = torch.float64 if value.dtype == torch.float64 else torch.float32
        sums[value.device].append(value.sum(dtype=wide).double())
    # Sums of finite numbers are finite, short of an overflow; so look closer only if one is not.
    if all(bool(torch.stack(group).isfinite().all()) for group in sums.values()):
        return None
    return next((name for name, value in tensors if not value.isfinite().all()), None)
