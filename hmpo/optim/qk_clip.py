"""QK-clip: after a step, scale down the query and key weights of heads whose logits are too large.

Source: Kimi K2 (arXiv 2507.20534), algorithm 1: gamma = min(1, tau / S) for each head, then
W_q *= gamma^alpha and W_k *= gamma^(1 - alpha). Deviations: biases are scaled with their
weights (else the logits are not), and where several query heads share a key head the factors are
chosen so that every head of the group gets exactly its own gamma (`head_factors`).
"""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hmpo.config import require
from hmpo.optim.logit_tracker import LogitTracker, MaxLogits
from hmpo.optim.sites import AttentionSite, ClipTarget, HeadRows

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ClipStats:
    """What one clip saw and did. Logits are those of the weights before the optimizer step."""

    max_logit: float
    """Largest finite logit over all heads; NaN if nothing was read."""
    max_by_layer: dict[str, float]
    """The same for each layer that was read."""
    heads: int
    """Query heads watched."""
    exact_heads: int
    """Heads whose maximum is known exactly."""
    bound_heads: int
    """Heads of which an upper bound is known."""
    unread_heads: int
    """Heads with no reading: no forward pass with gradients ran since the last clip."""
    nonfinite: int
    """Heads whose reading is NaN or +inf; they are never scaled."""
    clipped_heads: int
    """Heads above tau that were scaled."""
    missed_heads: int
    """Heads above tau that could not be scaled, see `unclippable`."""
    clip_rate: float
    """clipped_heads / heads, 0 without heads."""
    min_scale: float
    """Smallest gamma applied; 1 if none was."""
    unclippable: tuple[str, ...]
    """Attention layers where QK-clip cannot act, as "name: reason"."""


def head_factors(
    gamma: Float[Tensor, " H"], kv_heads: int, alpha: float, gqa: str
) -> tuple[Float[Tensor, " H"], Float[Tensor, " G"]]:
    """Factors for each query head and key head whose product is gamma for each query head.

    "query" leaves the keys alone. "balanced" moves both sides by the least weighted sum of
    squared log changes, weight 1 - alpha on queries and alpha on keys: with g = log gamma and n
    query heads on a key head, log c_k = (1 - alpha) sum(g) / (n (1 - alpha) + alpha), and
    c_q = gamma / c_k. For n = 1 that is K2's gamma^alpha, gamma^(1 - alpha); for alpha = 1/2 it is
    c_k = prod(gamma)^(1 / (n + 1)). Heads under tau in such a group keep their logits, through
    c_q > 1. A group with gamma = 1 throughout gets exactly 1.

    Args:
        gamma: wanted factor of each head's logits, in (0, 1], float64.
        kv_heads: key heads G; H is a multiple of it.
        alpha: share of the queries, in [0, 1].
        gqa: the rule.
    """
    if gqa == "query":
        return gamma, gamma.new_ones(kv_heads)
    logs = gamma.log().view(kv_heads, -1)
    weight = (1 - alpha) / (logs.shape[1] * (1 - alpha) + alpha)
    key = (weight * logs.sum(1)).exp()
    return gamma / key.repeat_interleave(logs.shape[1]), key


class QKClip:
    """Scales the heads whose largest logit, as read by a tracker, exceeds `tau`, down to `tau`.

    Args:
        tracker: where the readings come from. Its own tau may not be larger than `tau`:
            a bound certifies only up to the tracker's.
        tau: largest logit allowed, natural units (softmax input).
        alpha: share of the queries in a scaling, in [0, 1].
        gqa: rule for query heads that share a key head, see `head_factors`.

    Raises:
        ConfigError: a setting is out of range.

    The readings belong to the weights before the optimizer step (K2), so the next batch can
    exceed tau a little. Momentum and all other weights are left alone. Nothing of a key head's
    group changes, bit for bit, while all of its heads are at or under tau.
    """

    def __init__(
        self,
        tracker: LogitTracker,
        tau: float = 100.0,
        alpha: float = 0.5,
        gqa: str = "balanced",
    ) -> None:
        require(
            tracker.tau <= tau < math.inf,
            "tau",
            tau,
            f"a finite number >= the tracker's tau ({tracker.tau}), which its bounds certify",
        )
        require(0 <= alpha <= 1, "alpha", alpha, "a number in [0, 1]")
        require(gqa in ("balanced", "query"), "gqa", gqa, '"balanced" or "query"')
        self.tracker, self.tau, self.alpha, self.gqa = tracker, float(tau), alpha, gqa
        self._warned: set[str] = set()

    def apply(self) -> ClipStats:
        """Consume the readings, scale, and tell. One wait for the device."""
        readings = self.tracker.consume()
        targets = {site.name: site.target() for site in self.tracker.sites}
        clippable = [
            (site, readings[site.name].value.double(), target)
            for site in self.tracker.sites
            if isinstance(target := targets[site.name], ClipTarget)
        ]
        self._scale(clippable)
        reasons = {name: t for name, t in targets.items() if isinstance(t, str)}
        stats = _stats(readings, reasons, self.tracker.unread, self.tau)
        if stats.missed_heads:
            self._warn(stats.unclippable)
        return stats

    def _scale(self, clippable: list[tuple[AttentionSite, Tensor, ClipTarget]]) -> None:
        """Apply every site's factors; a parameter shared between sites is scaled once."""
        joint: dict[tuple[int, ...], Tensor] = {}
        for _, value, target in clippable:
            key = _identity(target)
            joint[key] = torch.maximum(joint.get(key, value), value)
        planned: dict[int, tuple[HeadRows, Tensor]] = {}
        for site, _, target in clippable:
            gamma = gammas(joint[_identity(target)], self.tau)
            query, key = head_factors(gamma, site.kv_heads, self.alpha, self.gqa)
            sides = [*((rows, query) for rows in target.query), *((r, key) for r in target.key)]
            for rows, factors in sides:
                _, other = planned.get(id(rows.parameter), (rows, factors))
                planned[id(rows.parameter)] = rows, torch.minimum(other, factors)
        for rows, factors in planned.values():
            if bool((factors != 1).any()):
                rows.scale(factors)

    def _warn(self, lines: Iterable[str]) -> None:
        for line in set(lines) - self._warned:
            logger.warning("a logit exceeds %g but QK-clip cannot act: %s", self.tau, line)
            self._warned.add(line)


def gammas(value: Float[Tensor, " H"], tau: float) -> Float[Tensor, " H"]:
    """Wanted factor of each head: tau / value above tau, else 1; 1 for NaN and infinities."""
    return tau / value.masked_fill(~value.isfinite(), tau).clamp_min(tau)


def _identity(target: ClipTarget) -> tuple[int, ...]:
    return tuple(id(rows.parameter) for rows in (*target.query, *target.key))


def _stats(
    readings: dict[str, MaxLogits], reasons: dict[str, str], unread: list[str], tau: float
) -> ClipStats:
    none = torch.empty(0)
    value = torch.cat([none, *(r.value for r in readings.values())])
    exact = torch.cat([none.bool(), *(r.exact for r in readings.values())])
    able = [torch.full_like(r.value, name not in reasons) for name, r in readings.items()]
    able = torch.cat([none, *able]).bool()
    silent, finite = value == -torch.inf, value.isfinite()
    over = finite & (value > tau)
    gamma = gammas(value.double(), tau)[over & able]
    by_layer = {name: _largest(r.value) for name, r in readings.items()}
    return ClipStats(
        max_logit=_largest(value),
        max_by_layer={name: top for name, top in by_layer.items() if not math.isnan(top)},
        heads=len(value),
        exact_heads=int((finite & exact).sum()),
        bound_heads=int((finite & ~exact).sum()),
        unread_heads=int(silent.sum()),
        nonfinite=int((~finite & ~silent).sum()),
        clipped_heads=int((over & able).sum()),
        missed_heads=int((over & ~able).sum()),
        clip_rate=int((over & able).sum()) / max(1, len(value)),
        min_scale=float(gamma.min()) if len(gamma) else 1.0,
        unclippable=(*unread, *(f"{name}: {why}" for name, why in reasons.items())),
    )


def _largest(value: Tensor) -> float:
    finite = value[value.isfinite()]
    return float(finite.max()) if len(finite) else math.nan
