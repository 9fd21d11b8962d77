"""What one attention layer's calls come to: running maxima of values and of bounds, by tiers.

Cheapest first, each only for what the one before leaves above tau:

1. "weights": with QK-norm, a bound that needs no activations at all;
2. "norms": Cauchy-Schwarz from the row norms of queries and keys;
3. "lse": the log-sum-exp that the attention kernel computed anyway;
4. "exact": the maximum itself, by branch and bound over the log-sum-exps, or block by block;
   "projections" where only projections can be read, in compiled graphs outside the interface.

On an accelerator asking which heads are left would stall the queue, so calls are kept, within a
budget, until the step asks once for all layers.
"""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hmpo.attention.gain_bound import GainBound
from hmpo.attention.logits import (
    AttentionCall,
    SeenScores,
    exact_max,
    logit_bound,
    real_rows,
    unmasked_bound,
)
from hmpo.attention.lse import kernel_error, lse_bound, reduced_precision
from hmpo.attention.search import max_by_lse
from hmpo.stopwatch import section

KEEP_BYTES = 256 << 20
"""Queries and keys that one tracker keeps for `consume()` on an accelerator."""
CHEAP_SCORES = 1 << 15
"""Calls with no more scores than this are read exactly: a bound would cost the same."""
SETTLED = 0.9
"""An accelerator's layer skips its activations while its weights' bound is below this part of
tau; checked at each `consume()`."""
SOURCES = ("auto", "lse", "exact", "bound")
TIERS = ("weights", "norms", "lse", "exact")


@dataclass
class Budget:
    """Bytes that may still be kept."""

    left: int

    def take(self, size: int) -> bool:
        """Is there room for `size` bytes? They are then taken."""
        if size > self.left:
            return False
        self.left -= size
        return True


@dataclass(frozen=True, eq=False, kw_only=True)
class KeptCall:
    """A call whose undecided heads wait for the host."""

    over: Bool[Tensor, " H"]
    """Heads that no bound certifies."""
    slack: Float[Tensor, " H"]
    """How far a row's log-sum-exp may be below its true value, see `max_by_lse`."""
    call: AttentionCall


class Reading:
    """Running maxima of one layer. It must not hold the module (see `listen`)."""

    def __init__(
        self,
        heads: int,
        tau: float,
        source: str,
        budget: Budget,
        weights: GainBound | None,
        projected: bool = False,
    ) -> None:
        self.heads, self.tau, self.source, self.budget = heads, tau, source, budget
        self.weights = weights
        """The bound from the weights, or None."""
        self.projected = projected
        """Are calls of compiled graphs read from projections? Their maxima are no exact logits."""
        self.settled = False
        """Did the weights' bound certify every head when the host last looked?"""
        self.kept: list[KeptCall] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        for kept in self.kept:
            self.budget.left += kept.call.nbytes
        self.kept = []
        self.tiers: Counter[str] = Counter()
        """Readings (one per call and head) by the tier that gave them."""
        self.seconds = 0.0
        """Host seconds spent in `record`."""
        self.exact = torch.full((self.heads,), -torch.inf)
        """Maxima of what was read exactly."""
        self.bound = torch.full((self.heads,), -torch.inf)
        """Maxima of the bounds of the rest."""

    @torch.no_grad()
    def record(self, call: AttentionCall | SeenScores) -> None:
        """Take one call in."""
        began = time.perf_counter()
        with section("qk_clip"):
            if isinstance(call, SeenScores):
                self._add_exact(call.maxima)
            elif self.source == "exact" or (self.source == "auto" and _cheap(call)):
                self._add_exact(exact_max(call), borrowed=call.borrowed)
            elif not self._by_weights(call):
                self._by_activations(call)
        self.seconds += time.perf_counter() - began

    def _by_weights(self, call: AttentionCall) -> bool:
        """Do the weights alone certify every head? They are then read."""
        if self.weights is None or self.source == "lse":
            return False
        free = host_reads_are_free(call.query.device)
        bound = self.weights(call.query.dtype) if free or self.settled else None
        if bound is None or (free and not bool((bound <= self.tau).all())):
            return False
        self._add_bound(bound, "weights")
        return True

    def _by_activations(self, call: AttentionCall) -> None:
        if call.lse is None or self.source == "bound":
            bound, tier = logit_bound(call), "norms"
            slack = bound  # not used: without a log-sum-exp nothing is searched by it
        else:
            norms, tier = unmasked_bound(call), "lse"
            error = norms * kernel_error(call.query.shape[-1])
            bound = lse_bound(call.lse, real_rows(call), error).fmin(norms)
            slack = norms * reduced_precision()
        if self.source == "auto":
            over = ~(bound <= self.tau)
            if not self._defer(over, slack, call):
                return
            bound = bound.masked_fill(over, -torch.inf)
        self._add_bound(bound, tier)

    def _defer(self, over: Tensor, slack: Tensor, call: AttentionCall) -> bool:
        """Read the undecided heads exactly, now or later; False if all heads were read."""
        if host_reads_are_free(call.query.device):
            self.decide(over, slack, call)
        elif not call.borrowed and self.budget.take(call.nbytes):
            self.kept.append(KeptCall(over=over, slack=slack, call=call))
        else:
            self._add_exact(exact_max(call), borrowed=call.borrowed)
            return False
        return True

    def decide(self, over: Tensor, slack: Tensor, call: AttentionCall) -> None:
        """Read the heads marked `over` exactly; `over` is on the host."""
        heads = over.nonzero().flatten()
        if not len(heads):
            return
        there = heads.to(call.query.device)
        if call.lse is None:
            values = exact_max(call, there)
        else:
            values, _ = max_by_lse(call, heads, slack)
        maxima = torch.full((self.heads,), -torch.inf, device=call.query.device)
        maxima[there] = values
        self._add_exact(maxima, len(heads), borrowed=call.borrowed)
        self.tiers.subtract({"norms" if call.lse is None else "lse": len(heads)})

    def _add_exact(self, maxima: Tensor, heads: int | None = None, borrowed: bool = False) -> None:
        projected = self.projected and borrowed
        if projected:
            self.bound = torch.maximum(self.bound.to(maxima.device), maxima)
        else:
            self.exact = torch.maximum(self.exact.to(maxima.device), maxima)
        tier = "projections" if projected else "exact"
        self.tiers[tier] += self.heads if heads is None else heads

    def _add_bound(self, bound: Tensor, tier: str) -> None:
        self.bound = torch.maximum(self.bound.to(bound.device), bound)
        self.tiers[tier] += self.heads


def host_reads_are_free(device: torch.device) -> bool:
    """Does reading a number of a tensor there wait for nothing?"""
    return device.type == "cpu"


def _cheap(call: AttentionCall) -> bool:
    """Is the exact maximum no dearer than a bound, whose cost is that of calling operators?"""
    batch, heads, queries, _ = call.query.shape
    scores = batch * heads * queries * call.key.shape[2]
    return host_reads_are_free(call.query.device) and scores <= CHEAP_SCORES


@torch.no_grad()
def resolve(readings: Iterable[Reading]) -> None:
    """Decide everything that was kept, with one wait for the device to learn what is left."""
    kept = [(reading, kept) for reading in readings for kept in reading.kept]
    host = to_host([k.over for _, k in kept])
    for (reading, k), over in zip(kept, host, strict=True):
        reading.decide(over, k.slack, k.call)
        reading.budget.left += k.call.nbytes
    for reading, _ in kept:
        reading.kept = []


def settle(readings: Iterable[Reading]) -> None:
    """Read the weights' bounds, with one wait for the device."""
    bounded = [r for r in readings if r.weights is not None]
    bounds = [(r, b) for r in bounded if (b := r.weights(torch.float32)) is not None]  # type: ignore[misc]
    for (reading, _), bound in zip(bounds, to_host([b for _, b in bounds]), strict=True):
        reading.settled = bool((bound <= SETTLED * reading.tau).all())


def to_host(tensors: list[Tensor]) -> list[Tensor]:
    """Copies on the CPU, with one transfer for each device."""
    host: dict[int, Tensor] = {}
    for device in {t.device for t in tensors}:
        numbers = [i for i, t in enumerate(tensors) if t.device == device]
        flat = torch.cat([tensors[i] for i in numbers]).cpu()
        host.update(zip(numbers, flat.split([len(tensors[i]) for i in numbers]), strict=True))
    return [host[i] for i in range(len(tensors))]
