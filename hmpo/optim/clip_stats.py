"""What one clip saw and did, as numbers."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hmpo.attention.tracker import MaxLogits
from hmpo.optim.adapter_clip import AdapterClip


@dataclass(frozen=True, kw_only=True)
class ClipStats:
    """What one clip saw and did. Logits are those of the weights before the optimizer step."""

    max_logit: float
    """Largest finite logit over all heads; NaN if nothing was read."""
    max_by_layer: dict[str, float]
    """The same for each layer that was read."""
    max_by_head: dict[str, tuple[float, ...]]
    """The reading of each head of each layer, finite or not."""
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
    negative: int
    """Heads whose largest logit is below 0; they are never scaled."""
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
    tiers: dict[str, int] = field(default_factory=dict)
    """Readings (one for each forward pass and head) by what settled them, see `LogitTracker`."""
    fallbacks: tuple[str, ...] = ()
    """Layers that nobody can read, scaled by a bound from their weights where that is allowed."""
    reread_heads: int = 0
    """Heads above tau in layers with LoRA that, run again without dropout, are not above it."""
    seconds: float = field(default=0.0, compare=False)
    """Host time of the clip and of the readings it used; not part of the state."""

    def state(self) -> dict[str, Any]:
        """Plain containers, for a checkpoint."""
        state = dataclasses.asdict(self)
        del state["seconds"]
        for name in ("unclippable", "fallbacks"):
            state[name] = [*state[name]]
        return state | {"max_by_head": {k: [*v] for k, v in self.max_by_head.items()}}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "ClipStats":
        """What `state()` gave."""
        texts = {name: tuple(state[name]) for name in ("unclippable", "fallbacks")}
        heads = {name: tuple(row) for name, row in state["max_by_head"].items()}
        values: dict[str, Any] = state | texts | {"max_by_head": heads}
        return cls(**values)


def stats_of(
    readings: dict[str, MaxLogits],
    reasons: dict[str, str],
    adapted: dict[str, AdapterClip],
    unread: list[str],
    tau: float,
) -> ClipStats:
    """What a clip saw and did.

    Args:
        readings: of each layer.
        reasons: why a layer cannot be scaled; the others can.
        adapted: what was done in layers with LoRA above tau.
        unread: layers that nobody can read, as "name: reason".
        tau: the threshold.
    """
    values = {name: r.value.tolist() for name, r in readings.items()}
    exact = [known for r in readings.values() for known in r.exact.tolist()]
    able, reread = [], []
    for name, row in values.items():
        clip = adapted.get(name)
        able += [name not in reasons] * len(row) if clip is None else clip.clipped.tolist()
        reread += [False] * len(row) if clip is None else clip.reread.tolist()
    reasons = reasons | {name: clip.reason for name, clip in adapted.items() if clip.reason}
    flat = [value for row in values.values() for value in row]
    finite, over = [math.isfinite(v) for v in flat], [math.isfinite(v) and v > tau for v in flat]
    clipped = [v for v, high, can in zip(flat, over, able, strict=True) if high and can]
    missed = [h and not (can or r) for h, can, r in zip(over, able, reread, strict=True)]
    silent = flat.count(-math.inf)
    by_layer = {name: _largest(row) for name, row in values.items()}
    return ClipStats(
        max_logit=_largest(flat),
        max_by_layer={name: top for name, top in by_layer.items() if not math.isnan(top)},
        max_by_head={name: tuple(row) for name, row in values.items()},
        heads=len(flat),
        exact_heads=sum(f and e for f, e in zip(finite, exact, strict=True)),
        bound_heads=sum(f and not e for f, e in zip(finite, exact, strict=True)),
        unread_heads=silent,
        nonfinite=len(flat) - sum(finite) - silent,
        negative=sum(f and v < 0 for f, v in zip(finite, flat, strict=True)),
        clipped_heads=len(clipped),
        missed_heads=sum(missed),
        reread_heads=sum(map(bool, reread)),
        clip_rate=len(clipped) / max(1, len(flat)),
        min_scale=tau / max(clipped) if clipped else 1.0,
        unclippable=(*unread, *(f"{name}: {why}" for name, why in reasons.items())),
    )


def _largest(values: Iterable[float]) -> float:
    return max((v for v in values if math.isfinite(v)), default=math.nan)
