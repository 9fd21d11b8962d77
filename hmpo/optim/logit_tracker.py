"""Reading a model's largest attention logit, per layer and query head, while it trains.

Values are those of the weights that made them: the maxima over every forward pass with
gradients enabled since the last `consume()`, so gradient accumulation needs no care. The
forward pass and its gradients stay bit-identical.

Two tiers. The Cauchy-Schwarz bound costs next to nothing and certifies a head whose bound is at
most tau. The exact maximum, about half an attention forward, is taken for the heads that are
left. On a CPU it is taken at once, and for every head while the sequence is no longer than the
model is wide: there it costs less than a twentieth of the layer. On an accelerator asking which
heads are left would stall the queue, so queries and keys are kept, up to `KEEP_BYTES`, until
`consume()` asks once for all layers; calls beyond that get the exact maximum of all their heads
at once.
"""

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hmpo.config import require
from hmpo.errors import CheckpointError
from hmpo.optim.attention_max import AttentionCall, exact_max, logit_bound
from hmpo.optim.attention_tap import listen
from hmpo.optim.sites import AttentionSite, find_sites

logger = logging.getLogger(__name__)

KEEP_BYTES = 256 << 20
"""Queries and keys that one tracker keeps for `consume()` on an accelerator."""


@dataclass(frozen=True, eq=False)
class MaxLogits:
    """One layer's reading.

    Example: `value` [112.4, 31.0], `exact` [True, False]: head 0 reached 112.4, head 1 stayed
    at or below 31.0.
    """

    value: Float[Tensor, " H"]
    """Largest logit of each query head, or an upper bound of it; -inf where nothing was read."""
    exact: Bool[Tensor, " H"]
    """True where `value` is the maximum itself, False where it is an upper bound."""


class LogitTracker:
    """Per-head maxima of the attention logits of a Hugging Face causal language model.

    Args:
        model: any module; one without readable attention gives no layers (see `unread`).
        tau: logit up to which a bound is as good as the value.
        source: "exact" reads every head exactly, "bound" only bounds, "auto" reads exactly
            every head that its bound does not certify to be at most `tau`.

    Raises:
        ConfigError: `tau` is not a positive number or `source` is unknown.

    Usable as a context manager; `close()` restores the attention functions. Source: the
    maximum S of Kimi K2 (arXiv 2507.20534, algorithm 1), signed, per query head.
    """

    def __init__(self, model: nn.Module, tau: float = 100.0, source: str = "auto") -> None:
        require(0 < tau < torch.inf, "tau", tau, "a finite number > 0")
        require(
            source in ("auto", "exact", "bound"), "source", source, '"auto", "exact" or "bound"'
        )
        self.tau, self.source = float(tau), source
        self.sites: list[AttentionSite]
        """Layers that are read."""
        self.unread: list[str]
        """Attention modules that cannot be read, as "name: reason"."""
        self.sites, self.unread = find_sites(model)
        self._model = weakref.ref(model)
        budget = _Budget(KEEP_BYTES)
        self._readings = {s.name: _Reading(s.heads, self.tau, source, budget) for s in self.sites}
        ends = [
            listen(module, self._readings[site.name].record)
            for site in self.sites
            if (module := site.module()) is not None
        ]
        self._close = weakref.finalize(self, _call_all, ends)
        for line in self.unread:
            logger.warning("attention not read, QK-clip cannot act here: %s", line)
        if not self.sites and not self.unread:
            logger.warning("no attention found in %s: nothing to read", type(model).__name__)

    @property
    def model(self) -> nn.Module | None:
        """The model, or None once it is gone; the tracker does not keep it alive."""
        return self._model()

    def consume(self) -> dict[str, MaxLogits]:
        """The maxima since the last call, on the CPU, by layer name; starts afresh.

        Waits for the device once for the undecided heads and once for the values.
        """
        values = self._values()
        self.reset()
        return values

    def reset(self) -> None:
        """Forget everything read since the last `consume()`."""
        for reading in self._readings.values():
            reading.reset()

    def close(self) -> None:
        """Stop reading and restore the attention functions; calling it twice does no harm."""
        self._close()

    def __enter__(self) -> "LogitTracker":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """What was read since the last `consume()`: per layer, "exact" and "bound" (H,)."""
        _resolve(self._readings.values())
        return {
            name: {"exact": r.exact.cpu().clone(), "bound": r.bound.cpu().clone()}
            for name, r in self._readings.items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continue from `state_dict()`.

        Raises:
            CheckpointError: the state belongs to a model with other layers or heads.
        """
        own = {name: (r.heads,) for name, r in self._readings.items()}
        given = {name: tuple(layer["exact"].shape) for name, layer in state.items()}
        if own != given:
            raise CheckpointError(
                f"QK-clip state is for layers {given}, this model has {own}; "
                "resume with the model of the checkpoint"
            )
        for name, layer in state.items():
            self._readings[name].reset()
            self._readings[name].exact = layer["exact"].clone()
            self._readings[name].bound = layer["bound"].clone()

    def _values(self) -> dict[str, MaxLogits]:
        _resolve(self._readings.values())
        flat = [t for r in self._readings.values() for t in (r.exact, r.bound)]
        host = iter(_to_host(flat))
        values = {}
        for name in self._readings:
            exact, bound = next(host), next(host)
            values[name] = MaxLogits(torch.maximum(exact, bound), ~(exact < bound))
        return values


@dataclass
class _Budget:
    """Bytes that may still be kept."""

    left: int

    def take(self, size: int) -> bool:
        if size > self.left:
            return False
        self.left -= size
        return True


class _Reading:
    """Running maxima of one layer. It must not hold the module (see `listen`)."""

    def __init__(self, heads: int, tau: float, source: str, budget: _Budget) -> None:
        self.heads, self.tau, self.source, self.budget = heads, tau, source, budget
        self.kept: list[tuple[Tensor, AttentionCall]] = []
        self.reset()

    def reset(self) -> None:
        for _, call in self.kept:
            self.budget.left += call.nbytes
        self.kept = []
        self.exact = torch.full((self.heads,), -torch.inf)
        """Maxima of what was read exactly."""
        self.bound = torch.full((self.heads,), -torch.inf)
        """Maxima of the bounds of the rest."""

    @torch.no_grad()
    def record(self, call: AttentionCall) -> None:
        if self.source == "exact" or (self.source == "auto" and _cheap(call)):
            self._add_exact(exact_max(call))
            return
        bound = logit_bound(call)
        if self.source == "auto":
            over = ~(bound <= self.tau)
            bound = bound.masked_fill(over, -torch.inf)
            if _host_reads_are_free(call.query.device) or self.budget.take(call.nbytes):
                self.kept.append((over, call))
            else:
                self._add_exact(exact_max(call))
        self.bound = torch.maximum(self.bound.to(bound.device), bound)
        if _host_reads_are_free(call.query.device):
            for over, kept in self.kept:
                self.decide(over, kept)
            self.kept = []

    def decide(self, over: Bool[Tensor, " H"], call: AttentionCall) -> None:
        """Read the heads marked `over` exactly; `over` is on the host."""
        heads = over.nonzero().flatten()
        if len(heads):
            heads = heads.to(call.query.device)
            found = torch.full((self.heads,), -torch.inf, device=call.query.device)
            found[heads] = exact_max(call, heads)
            self._add_exact(found)

    def _add_exact(self, found: Float[Tensor, " H"]) -> None:
        self.exact = torch.maximum(self.exact.to(found.device), found)


def _cheap(call: AttentionCall) -> bool:
    """Exact maxima are a small part of a CPU's layer while sequences are shorter than it is wide.

    Exact: K * width multiplications a token, half of them useless. The layer: 24 * width^2.
    """
    width = call.query.shape[1] * call.query.shape[3]
    return _host_reads_are_free(call.query.device) and call.key.shape[2] <= width


def _host_reads_are_free(device: torch.device) -> bool:
    return device.type == "cpu"


@torch.no_grad()
def _resolve(readings: Iterable[_Reading]) -> None:
    """Decide everything that was kept, with one wait for the device."""
    kept = [(reading, over, call) for reading in readings for over, call in reading.kept]
    host = _to_host([over for _, over, _ in kept])
    for (reading, _, call), over in zip(kept, host, strict=True):
        reading.decide(over, call)
        reading.budget.left += call.nbytes
    for reading, _, _ in kept:
        reading.kept = []


def _to_host(tensors: list[Tensor]) -> list[Tensor]:
    """Copies on the CPU, with one transfer for each device."""
    host: dict[int, Tensor] = {}
    for device in {t.device for t in tensors}:
        mine = [i for i, t in enumerate(tensors) if t.device == device]
        flat = torch.cat([tensors[i] for i in mine]).cpu()
        host.update(zip(mine, flat.split([len(tensors[i]) for i in mine]), strict=True))
    return [host[i] for i in range(len(tensors))]


def _call_all(ends: list[Callable[[], Any]]) -> None:
    for end in ends:
        end()
