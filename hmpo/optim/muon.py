"""Muon: momentum, orthogonalised by Newton-Schulz iterations, for matrices.

Sources: K. Jordan's Muon, Moonlight (arXiv 2502.16982: decoupled weight decay, update RMS
0.2 * sqrt(max(n, m)) so that AdamW's learning rates carry over), Kimi K2 (arXiv 2507.20534: the
momentum as a sum), GLM-5 and Kimi K3 (the blocks of heads orthogonalised apart).
Deviation: equally shaped small matrices are iterated as one batch. Sharded matrices (DTensor) are
gathered once each, and every rank iterates on them.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from hmpo.errors import ConfigError, ShapeError, require
from hmpo.optim.newton_schulz import fast_dtype, ns_triples, polar_factor

logger = logging.getLogger(__name__)

LAYOUT: dict[str, Any] = {"split_sizes": None, "split_repeats": 1, "transposed": False}
"""How the matrices of a group divide into maps of their own; `Muon` says what each key means."""

CPU_MATRIX, CPU_BATCH = 1 << 16, 1 << 19
"""On a CPU: elements up to which a matrix is batched, and of a batch (it should fit a cache)."""
DEVICE_BATCH = 1 << 24
"""Elements of a batch elsewhere, where it saves launches."""


class Muon(Optimizer):
    """Muon for 2-D parameters (hidden linear layers); anything else belongs to AdamW.

    Args:
        params: matrices, or parameter groups of them.
        lr: learning rate; with the default `update_rms`, AdamW's values fit.
        weight_decay: decoupled, multiplied by `lr`.
        momentum: decay of the gradients' average or sum.
        nesterov: look ahead by mixing the gradient in once more.
        ns_coefficients: "jordan", "you", "polar_express", "cans", "deepseek_v4", one triple, or
            one triple per step.
        eps: least norm to divide by.
        ns_steps: Newton-Schulz iterations; None means 5, 10 for "deepseek_v4", and the length of
            a list.
        update_rms: root mean square that an update should have, before `lr`.
        momentum_form: "ema", torch.optim.Muon's moving average, or "sum", K2's. The iteration
            does not see the scale, so at a constant `momentum` both give the same updates.
        update_scale: "formula" multiplies by update_rms * sqrt(max(n, m)), right where all
            singular values become 1, and too little for gradients of low rank, which five steps
            do not lift to 1 (0.4 of it on a power law). "measured" divides by the update's own
            root mean square. "original" is Jordan's sqrt(max(1, outputs / inputs)), without
            `update_rms`.
        ns_dtype: precision of the iterations; None takes what the machine has instructions for
            (`fast_dtype`) when a group is added. The answer is kept in the group and its
            `state_dict`, so that a run goes on with it elsewhere.

    A group may say how its matrices divide: `split_sizes`, numbers of output rows that are
    orthogonalised apart (heads; query, key and value), as a pattern that comes `split_repeats`
    times, the same part of every repeat being one map; and `transposed`, for weights whose outputs
    are columns. `split_param_groups` fills these in.

    Raises:
        ConfigError: a setting is out of range.
        ShapeError: a parameter is no matrix, or does not divide as its group says.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: str | Sequence[Any] = "jordan",
        eps: float = 1e-7,
        ns_steps: int | None = None,
        update_rms: float = 0.2,
        *,
        momentum_form: Literal["ema", "sum"] = "ema",
        update_scale: Literal["formula", "measured", "original"] = "formula",
        ns_dtype: torch.dtype | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "update_rms": update_rms,
            "momentum_form": momentum_form,
            "update_scale": update_scale,
            "ns_dtype": None if ns_dtype is None else _dtype_name(ns_dtype),
        }
        super().__init__(params, defaults | LAYOUT)

    _told = False
    """Whether it has been said that weight decay is lost."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of matrices; its settings are checked like the constructor's."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_muon_group(group)
        except (ConfigError, ShapeError):
            self.param_groups.pop()
            raise
        if group["ns_dtype"] is None:
            group["ns_dtype"] = _dtype_name(fast_dtype(group["params"][0].device.type))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update(group)
        if not self._told:
            self._told = tell_lost_decay(self.param_groups)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        muon_update(group, self.state)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_muon_group(group: dict[str, Any]) -> None:
    """Raise `ConfigError` or `ShapeError` for a group that Muon cannot train."""
    for name in ("lr", "weight_decay", "momentum", "eps", "update_rms"):
        value = float(group[name])
        require(math.isfinite(value) and value >= 0, name, group[name], "a finite number >= 0")
    require(float(group["momentum"]) < 1, "momentum", group["momentum"], "a number < 1")
    form, scale = group["momentum_form"], group["update_scale"]
    require(form in ("ema", "sum"), "momentum_form", form, '"ema" or "sum"')
    scales = ("formula", "measured", "original")
    require(scale in scales, "update_scale", scale, " or ".join(scales))
    ns_triples(group["ns_coefficients"], group["ns_steps"])
    known = ("float16", "bfloat16", "float32", "float64", None)
    require(group["ns_dtype"] in known, "ns_dtype", group["ns_dtype"], f"one of {known}")
    sizes, repeats = group["split_sizes"], group["split_repeats"]
    for parameter in group["params"]:
        shape = tuple(parameter.shape)
        if parameter.ndim != 2 or parameter.is_complex():
            raise ShapeError(
                f"Muon: got a {parameter.dtype} parameter of shape {shape}, "
                "expected real matrices; use split_param_groups to give the rest to AdamW"
            )
        rows = shape[1] if group["transposed"] else shape[0]
        if sizes is not None and (min(sizes, default=0) < 1 or sum(sizes) * repeats != rows):
            raise ShapeError(
                f"split_sizes: got {tuple(sizes)} x {repeats} for a parameter of shape {shape}, "
                f"expected positive numbers that sum to its {rows} outputs"
            )


def tell_lost_decay(groups: Iterable[dict[str, Any]]) -> bool:
    """Warn where weight decay is lost in the rounding of the weights; whether it was said.

    A step multiplies by 1 - lr * weight_decay; a change below half a unit of the weights' last
    place rounds away, whatever their size: 0.002 in bfloat16, where 1e-3 * 0.1 is usual.
    """
    for group in groups:
        shrink = float(group["lr"]) * float(group["weight_decay"])
        for parameter in group["params"]:
            least = torch.finfo(parameter.dtype).eps / 4  # of weights just below a power of two
            if parameter.grad is not None and 0 < shrink < least:
                logger.warning(
                    "weight decay has no effect: lr * weight_decay = %.2g is lost in the rounding "
                    "of %s weights; train float32 weights (under autocast they cost no speed), or "
                    "set weight_decay to 0",
                    shrink,
                    _dtype_name(parameter.dtype),
                )
                return True
    return False


Entry = tuple[Tensor, Tensor, Tensor | None]
"""A block of a parameter, of its gradient (or its direction), and of its momentum (or None)."""


@torch.no_grad()
def muon_update(group: dict[str, Any], state: dict[Tensor, dict[str, Any]]) -> None:
    """Update the parameters of one group in place, with their momentum in `state`."""
    buckets: dict[tuple[Any, ...], list[Entry]] = defaultdict(list)
    sharded = _ShardedStep(group)
    for parameter in group["params"]:
        grad = parameter.grad
        if grad is None:
            continue
        if grad.is_sparse:
            raise ShapeError("Muon: got a sparse gradient, expected dense; use AdamW for it")
        own = state[parameter]
        if "momentum_buffer" not in own:
            own["momentum_buffer"] = torch.zeros_like(grad)
        if isinstance(parameter, DTensor):
            sharded.take(parameter, grad, own["momentum_buffer"])
            continue
        parts = (_blocks(x, group) for x in (parameter, grad, own["momentum_buffer"]))
        for entry in zip(*parts, strict=True):
            buckets[entry[0].shape, grad.device, grad.dtype].append(entry)
    for entries in buckets.values():
        _orthogonal_step(group, entries)
    sharded.finish()


def _blocks(matrix: Tensor, group: dict[str, Any]) -> list[Tensor]:
    """Views of the maps in a matrix, outputs first: (n, m), or (repeats, n, m) if they repeat."""
    x = matrix.mT if group["transposed"] else matrix
    sizes, repeats = group["split_sizes"], group["split_repeats"]
    if sizes is None:
        return [x]
    if repeats == 1:
        return list(x.split(list(sizes)))
    return list(x.unflatten(0, (repeats, sum(sizes))).split(list(sizes), 1))


def _advance(group: dict[str, Any], grad: Tensor, buffer: Tensor, out: Tensor) -> Tensor:
    """Advance the momentum; returns what is to be orthogonalised: `out`, overwritten, or it."""
    decay = group["momentum"]
    if group["momentum_form"] == "ema":
        buffer.lerp_(grad, 1 - decay)
        return torch.lerp(grad, buffer, decay, out=out) if group["nesterov"] else buffer
    buffer.mul_(decay).add_(grad)
    return torch.add(grad, buffer, alpha=decay, out=out) if group["nesterov"] else buffer


def _orthogonal_step(group: dict[str, Any], entries: Sequence[Entry]) -> None:
    """Decay each block and subtract lr * scale * its polar factor; all blocks have one shape."""
    triples = ns_triples(group["ns_coefficients"], group["ns_steps"])
    dtype = getattr(torch, group["ns_dtype"])
    lr, measured = float(group["lr"]), group["update_scale"] == "measured"
    shape, grad = entries[0][0].shape, entries[0][1]
    rows, columns = shape[:-1].numel(), shape[-1]
    size = _batch_size(rows * columns, grad.device)
    # Filled matrix by matrix: stacking would pass over everything twice more.
    # float16 has no range for gradients: they are cast only after the division by their norm.
    wide = grad.dtype if dtype == torch.float16 else dtype
    batch = grad.new_empty((min(size, len(entries)), *shape), dtype=wide)
    scratch = grad.new_empty(shape)
    for start in range(0, len(entries), size):
        chunk = entries[start : start + size]
        for place, (_, part, buffer) in zip(batch, chunk, strict=False):
            place.copy_(part if buffer is None else _advance(group, part, buffer, scratch))
        x = batch[: len(chunk)].reshape(len(chunk), rows, columns)
        single = len(chunk) == 1
        updates = polar_factor(x[0] if single else x, triples, group["eps"], dtype)
        updates = updates.reshape(len(chunk), *shape)
        updates = _of_rms(updates, group["update_rms"]) if measured else updates
        for (target, _, _), update in zip(chunk, updates, strict=True):
            target.mul_(1 - lr * group["weight_decay"])
            target.add_(update, alpha=-lr * _scale(group, rows, columns))


def _scale(group: dict[str, Any], rows: int, columns: int) -> float:
    if group["update_scale"] == "formula":
        return group["update_rms"] * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns)) if group["update_scale"] == "original" else 1.0


def _batch_size(elements: int, device: torch.device) -> int:
    """Matrices that are iterated together: on CPUs only small ones gain."""
    if device.type != "cpu":
        return max(1, DEVICE_BATCH // max(1, elements))
    return CPU_BATCH // max(1, elements) if elements <= CPU_MATRIX else 1


def _of_rms(updates: Tensor, rms: float) -> Tensor:
    """Scaled so that the root mean square of each is `rms`; zeros stay zeros."""
    wide = updates if updates.dtype == torch.float64 else updates.float()
    axes = tuple(range(1, wide.ndim))
    own = wide.square().mean(axes, keepdim=True).sqrt()
    return wide * (rms / own.clamp(min=torch.finfo(wide.dtype).tiny))


class _ShardedStep:
    """Matrices of which each rank has some rows: gathered once each, in batches as whole ones are.

    Every rank iterates on them, so that each has the bits of one process, and keeps its own rows of
    the update. A matrix that is iterated alone is in memory as long as that lasts.
    """

    def __init__(self, group: dict[str, Any]) -> None:
        self.group = group
        self.buckets: dict[tuple[Any, ...], list[tuple[Entry, int]]] = defaultdict(list)
        """Blocks that wait, each with the number of its matrix."""
        self.open: dict[int, tuple[DTensor, Tensor, int]] = {}
        """By number a parameter, the change that it gets, and how many blocks of it are due."""

    def take(self, parameter: DTensor, grad: Tensor, buffer: Tensor) -> None:
        """Gather a matrix, and step with what has come to a batch."""
        direction = _advance(self.group, grad, buffer, torch.empty_like(grad))
        assert isinstance(direction, DTensor), "a sharded parameter has a sharded gradient"
        whole, number = direction.full_tensor(), id(parameter)
        change = torch.zeros_like(whole, dtype=torch.promote_types(whole.dtype, torch.float32))
        targets, parts = _blocks(change, self.group), _blocks(whole, self.group)
        self.open[number] = parameter, change, len(targets)
        for target, part in zip(targets, parts, strict=True):
            kind = target.shape, grad.device, grad.dtype
            self.buckets[kind].append(((target, part, None), number))
            if len(self.buckets[kind]) >= _batch_size(target.numel(), whole.device):
                self._step(self.buckets.pop(kind))

    def finish(self) -> None:
        """Step with the rest."""
        for entries in self.buckets.values():
            self._step(entries)

    def _step(self, entries: Sequence[tuple[Entry, int]]) -> None:
        _orthogonal_step(self.group, [entry for entry, _ in entries])
        for _, number in entries:
            parameter, change, due = self.open.pop(number)
            if due > 1:
                self.open[number] = parameter, change, due - 1
                continue
            mesh = parameter.device_mesh
            copies = DTensor.from_local(change, mesh, [Replicate()] * mesh.ndim, run_check=False)
            parameter.mul_(1 - float(self.group["lr"]) * self.group["weight_decay"])
            parameter.add_(copies.redistribute(mesh, parameter.placements))
