"""Muon: momentum, orthogonalised by Newton-Schulz iterations, for matrices.

Sources: K. Jordan's Muon (iteration and coefficients), Moonlight (arXiv 2502.16982: decoupled
weight decay, update RMS 0.2 * sqrt(max(n, m)) so that AdamW's learning rates carry over), Polar
Express (arXiv 2505.16932: coefficients). The momentum is torch.optim.Muon's moving average; the
iteration does not see its scale. Deviation: equally shaped small matrices are iterated as one
batch.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from hmpo.config import require
from hmpo.errors import ConfigError, ShapeError

Triple = tuple[float, float, float]

NS_COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    "jordan": ((3.4445, -4.7750, 2.0315),),
    "you": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "polar_express": tuple(
        (a / 1.01, b / 1.01**3, c / 1.01**5)
        for a, b, c in (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845749518, 0.4188073119525673),
        )
    ),
}
"""Named (a, b, c) of x -> a x + b (x x') x + c (x x')^2 x; the last triple repeats."""

BATCH_ELEMENTS = 1 << 22
"""Elements of equally shaped matrices that are iterated together. One larger matrix goes alone."""


def ns_triples(coefficients: str | Sequence[Any], steps: int) -> tuple[Triple, ...]:
    """One triple for each step, from a name, one triple, or a sequence of triples.

    Raises:
        ConfigError: unknown name, or not triples of numbers.
    """
    require(isinstance(steps, int) and 0 < steps < 100, "ns_steps", steps, "an integer in 1..99")
    if isinstance(coefficients, str):
        known = ", ".join(NS_COEFFICIENTS)
        require(coefficients in NS_COEFFICIENTS, "ns_coefficients", coefficients, f"one of {known}")
        triples = NS_COEFFICIENTS[coefficients]
    elif coefficients and all(isinstance(c, (int, float)) for c in coefficients):
        triples = (tuple(coefficients),)
    else:
        triples = tuple(tuple(t) for t in coefficients)
    if not triples or any(len(t) != 3 for t in triples):
        raise ConfigError(f"ns_coefficients: got {coefficients!r}, expected triples (a, b, c)")
    return tuple(triples[min(i, len(triples) - 1)] for i in range(steps))


def newton_schulz(
    matrices: Float[Tensor, "... n m"],
    triples: Sequence[Triple],
    eps: float = 1e-7,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "... n m"]:
    """Approximate the orthogonal polar factor U V' of each matrix U S V'.

    Args:
        matrices: one matrix (n, m) or a batch (b, n, m).
        triples: coefficients, one triple for each iteration.
        eps: least Frobenius norm to divide by.
        dtype: precision of the iteration and of the result.
    """
    x = matrices.to(dtype, copy=True)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x.div_(torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps))
    addmm = torch.addmm if x.ndim == 2 else torch.baddbmm
    for a, b, c in triples:
        gram = x @ x.mT
        x = addmm(x, addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(Optimizer):
    """Muon for 2-D parameters (hidden linear layers); anything else belongs to AdamW.

    Args:
        params: matrices, or parameter groups of them.
        lr: learning rate; with the default `update_rms`, AdamW's values fit.
        weight_decay: decoupled, multiplied by `lr`.
        momentum: decay of the moving average of gradients.
        nesterov: look ahead by mixing the gradient in once more.
        ns_coefficients: "jordan", "you", "polar_express", one triple, or one triple per step.
        eps: least norm to divide by.
        ns_steps: Newton-Schulz iterations.
        update_rms: the orthogonalised update is multiplied by update_rms * sqrt(max(n, m)), so
            that its root mean square is about `update_rms` at full rank (and smaller for
            gradients of low rank, which five iterations do not lift to 1).
        ns_dtype: precision of the iterations; None means bfloat16 on CUDA, float32 elsewhere
            (deterministic, and bfloat16 is slow on CPUs without instructions for it).

    Raises:
        ConfigError: a setting is out of range.
        ShapeError: a parameter is no matrix.
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
        ns_steps: int = 5,
        update_rms: float = 0.2,
        *,
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
            "ns_dtype": None if ns_dtype is None else str(ns_dtype).removeprefix("torch."),
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of matrices; its settings are checked like the constructor's."""
        super().add_param_group(param_group)
        try:
            check_muon_group(self.param_groups[-1])
        except (ConfigError, ShapeError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        muon_update(group, self.state)


def check_muon_group(group: dict[str, Any]) -> None:
    """Raise `ConfigError` or `ShapeError` for a group that Muon cannot train."""
    for name in ("lr", "weight_decay", "momentum", "eps", "update_rms"):
        value = float(group[name])
        require(math.isfinite(value) and value >= 0, name, group[name], "a finite number >= 0")
    require(float(group["momentum"]) < 1, "momentum", group["momentum"], "a number < 1")
    ns_triples(group["ns_coefficients"], group["ns_steps"])
    known = ("float16", "bfloat16", "float32", "float64", None)
    require(group["ns_dtype"] in known, "ns_dtype", group["ns_dtype"], f"one of {known}")
    for parameter in group["params"]:
        if parameter.ndim != 2 or parameter.is_complex():
            raise ShapeError(
                f"Muon: got a {parameter.dtype} parameter of shape {tuple(parameter.shape)}, "
                "expected real matrices; use split_param_groups to give the rest to AdamW"
            )


def _fast_dtype(device: torch.device) -> str:
    return "bfloat16" if device.type == "cuda" else "float32"


@torch.no_grad()
def muon_update(group: dict[str, Any], state: dict[Tensor, dict[str, Any]]) -> None:
    """Update the parameters of one group in place, with their momentum in `state`."""
    buckets: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for parameter in group["params"]:
        grad = parameter.grad
        if grad is None:
            continue
        if grad.is_sparse:
            raise ShapeError("Muon: got a sparse gradient, expected dense; use AdamW for it")
        own = state[parameter]
        if "momentum_buffer" not in own:
            own["momentum_buffer"] = torch.zeros_like(grad)
        buffer = own["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        mixed = grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        buckets[mixed.shape, mixed.device, mixed.dtype].append((parameter, mixed))
    triples = ns_triples(group["ns_coefficients"], group["ns_steps"])
    lr, decay = float(group["lr"]), 1 - float(group["lr"]) * group["weight_decay"]
    for (shape, device, _), entries in buckets.items():
        dtype = getattr(torch, group["ns_dtype"] or _fast_dtype(device))
        scale = -lr * group["update_rms"] * math.sqrt(max(shape))
        size = max(1, BATCH_ELEMENTS // max(1, shape.numel()))
        for start in range(0, len(entries), size):
            chunk = entries[start : start + size]
            if len(chunk) == 1:
                updates = [newton_schulz(chunk[0][1], triples, group["eps"], dtype)]
            else:
                batch = torch.stack([mixed for _, mixed in chunk])
                updates = newton_schulz(batch, triples, group["eps"], dtype).unbind()
            for (parameter, _), update in zip(chunk, updates, strict=True):
                parameter.mul_(decay).add_(update, alpha=scale)
