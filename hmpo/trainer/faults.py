"""Where an update stopped being finite: one fault that names its site, or None.

Sites: logprob, old_logprob, advantage, loss (before the backward pass), gradient (after it),
optimizer_state and weights. The trainers skip the update or stop; nothing is repaired.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hmpo.errors import NonFiniteError
from hmpo.ranks.shard import Shards, local
from hmpo.ranks.world import Ranks
from hmpo.types import Batch

RATIO_LIMIT = 20.0
"""Magnitude (nat) beyond which a log ratio of a token is told as an event."""
Fault = dict[str, Any]
"""`site`, and with it `where` (a tensor's name) or `sequence` and `token` (in the minibatch)."""


@dataclass(frozen=True, kw_only=True)
class UpdateCheck:
    """What the host learns of an update before its step.

    Example: `UpdateCheck(loss=-0.03, norm=0.8, fault=None)`.
    """

    loss: float
    norm: float
    """Global L2 norm of the gradient, before clipping."""
    fault: Fault | None


def check_update(
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    loss: Tensor,
    logprobs: Tensor,
    norm: Tensor,
) -> UpdateCheck:
    """Loss, gradient norm and the first fault of an update, at one wait for the device.

    Only where something is not finite it is looked for, one place after the other.

    Args:
        policy: the model with its gradients.
        optimizer: before its step.
        batch: the minibatch.
        loss: of the whole minibatch.
        logprobs: of its response tokens (M, T).
        norm: global L2 norm of the gradient.
    """
    old, mask = batch.rollout.old_logprobs, batch.rollout.response_mask
    probes = [(of_tokens.isfinite() | ~mask).all() for of_tokens in (logprobs, old)]
    probes += [batch.advantages.isfinite().all()]
    probes += probe([tensor for _, tensor in _state_tensors(policy, optimizer)])
    numbers = [loss, norm, *probes]
    home = loss.device
    values = torch.stack([n.to(home, torch.float64) for n in numbers]).tolist()
    fault = None
    if not (math.isfinite(values[0]) and math.isfinite(values[1]) and all(values[2:])):
        fault = (
            forward_fault(batch, loss, logprobs)
            or gradient_fault(policy, norm)
            or optimizer_fault(policy, optimizer)
        )
    return UpdateCheck(loss=values[0], norm=values[1], fault=fault)


def ratio_fault(record: Mapping[str, Any]) -> Fault | None:
    """Log ratios that no training gives: old log-probs that are not of these tokens, most likely.

    Args:
        record: of an update, by telemetry name.
    """
    names = ("ratio/d_min", "ratio/d_max", "kl/k1")
    found = {n: record[n] for n in names if abs(record.get(n, 0.0)) > RATIO_LIMIT}
    if not found:
        return None
    return {"expected": f"log ratios within {RATIO_LIMIT:g} nat; check the old log-probs", **found}


def step_fault(policy: nn.Module, optimizer: torch.optim.Optimizer) -> Fault | None:
    """The first weight or optimizer state that a step has left not finite, at one wait."""
    state = [tensor for _, tensor in _state_tensors(policy, optimizer)]
    weights = [local(p.detach()) for p in policy.parameters() if p.requires_grad]
    if seem_finite(weights + state):
        return None
    return weights_fault(policy) or optimizer_fault(policy, optimizer)


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
        if parameter.grad is not None and not local(parameter.grad).isfinite().all():
            return {"site": "gradient", "where": name}
    return {"site": "gradient", "where": "norm"}


def optimizer_fault(policy: nn.Module, optimizer: torch.optim.Optimizer) -> Fault | None:
    """The first tensor of the optimizer's state that is not finite."""
    where = _first_bad(_state_tensors(policy, optimizer))
    return None if where is None else {"site": "optimizer_state", "where": where}


def weights_fault(policy: nn.Module) -> Fault | None:
    """The first trainable parameter that is not finite."""
    held = ((n, p.detach()) for n, p in policy.named_parameters() if p.requires_grad)
    where = _first_bad((name, local(value)) for name, value in held)
    return None if where is None else {"site": "weights", "where": where}


def known_to_all(fault: Fault | None, shards: Shards | None, ranks: Ranks) -> Fault | None:
    """A fault that any rank has found in its part of a sharded policy, the same on each.

    Args:
        fault: that this rank has found.
        shards: of the policy; None where every rank has looked at all of it.
        ranks: that hold the parts.
    """
    if shards is None:
        return fault
    named = None if fault is None or fault.get("where") == "norm" else fault
    return ranks.first(named) or ranks.first(fault)


def fault_text(fault: Fault) -> str:
    """A fault in words: `site gradient, where lm_head.weight`."""
    return ", ".join(f"{key} {value}" for key, value in fault.items())


def _state_tensors(policy: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """Tensors of the optimizer's state by name, without its step counts; this rank's part."""
    names: dict[Tensor, str] = {p: name for name, p in policy.named_parameters()}
    return [
        (f"{names.get(parameter, 'unnamed')}.{key}", local(value))
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor) and key != "step" and value.is_floating_point()
    ]


def probe(tensors: Sequence[Tensor]) -> list[Tensor]:
    """One flag () for each device and dtype: True only if all these tensors are finite.

    A norm passes over a tensor once and is finite where its elements are, short of an overflow;
    so False means to look closer.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.device, tensor.dtype].append(tensor)
    return [torch.stack(torch._foreach_norm(group)).isfinite().all() for group in groups.values()]


def seem_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no norm of these tensors is NaN or infinite, at one wait for each device."""
    flags: dict[torch.device, list[Tensor]] = defaultdict(list)
    for flag in probe(tensors):
        flags[flag.device].append(flag)
    return all(bool(torch.stack(group).all()) for group in flags.values())


def _first_bad(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first floating tensor with a NaN or infinity, at one wait for each device."""
    tensors = [(name, value) for name, value in named if value.is_floating_point()]
    if seem_finite([value for _, value in tensors]):
        return None
    return next((name for name, value in tensors if not value.isfinite().all()), None)


def spoilt_error(step: int, fault: Fault) -> NonFiniteError:
    """What ends a run whose step has spoilt weights or state."""
    return NonFiniteError(
        f"update {step}: not finite after the step at {fault_text(fault)}; resume from the last "
        "checkpoint with a lower learning rate"
    )


def skip_error(step: int, where: str, in_a_row: int) -> NonFiniteError:
    """What ends a run that has skipped too many updates."""
    return NonFiniteError(
        f"update {step}: not finite at {where}; {in_a_row} update(s) skipped in a row; lower the "
        "learning rate: `hmpo train --from RUN --set optimizer.lr=...` goes on in a new run from "
        "the weights of a run's checkpoint"
    )
