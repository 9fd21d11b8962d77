"""Half-widths of a clip band that make a chosen share of the units clip.

On the scale of a sequence mean the right width depends on length and noise: 3e-4 for thousands of
tokens, 0.05 for ten. `ClipCalibration` watches the first rollouts. A unit (a token, or a response
with a sequence clip) counts by its excursion x from the band's centre towards the bound that is
active for its advantage, in units of that bound. If (1 - share) of the units have x < s, then
bounds s times as wide clip the chosen share.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hmpo.config.objective import ObjectiveConfig
from hmpo.config.weight import MASKING
from hmpo.objective.bounds import clamp_tokens, log_mean, measure_band, row_bounds
from hmpo.objective.means import Exponent


class ClipCalibration:
    """Bounds in force: the configured ones until `clip_rollouts` rollouts were seen, then scaled.

    Args:
        objective: with `clip_share`; without it nothing is ever changed.
    """

    def __init__(self, objective: ObjectiveConfig) -> None:
        self.share, self.rollouts = objective.clip_share, objective.clip_rollouts
        self.scales: list[float] = []
        self.scale: float | None = None

    def apply(self, objective: ObjectiveConfig) -> ObjectiveConfig:
        """The objective with calibrated half-widths, or as it is before there are any."""
        if self.scale is None:
            return objective
        return scaled_bounds(objective, self.scale)

    def observe(
        self,
        log_ratio: Float[Tensor, "N T"],
        mask: Bool[Tensor, "N T"],
        advantages: Float[Tensor, " N"],
        p: Exponent,
        objective: ObjectiveConfig,
        *,
        rollout: int,
        staleness: int,
    ) -> bool:
        """Take note of an update; True when that settles the half-widths.

        Args:
            log_ratio: token log ratios (nat), 0 on padding.
            mask: True on response tokens.
            advantages: one per response; those of 0 do not count.
            p: exponent in force.
            objective: the member with the configured half-widths.
            rollout: 0-based rollout of the update.
            staleness: updates since the weights that sampled; none means equal ratios, which tell
                nothing.
        """
        if self.share is None or self.scale is not None:
            return False
        if rollout >= self.rollouts and self.scales:
            self.scale = math.fsum(self.scales) / len(self.scales)
            return True
        if staleness > 0:
            scale = clip_scale(log_ratio, mask, advantages, p, objective, self.share)
            self.scales += [] if scale is None else [scale]
        return False

    def state_dict(self) -> dict[str, Any]:
        """What was seen and settled."""
        return {"scales": list(self.scales), "scale": self.scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self.scales = list(state.get("scales", []))
        self.scale = state.get("scale")


@torch.no_grad()
def clip_scale(
    log_ratio: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    advantages: Float[Tensor, " N"],
    p: Exponent,
    objective: ObjectiveConfig,
    share: float,
) -> float | None:
    """Factor on the log half-widths that makes `share` of these units clip; None if none can.

    Units whose active bound is infinite count as never clipped.

    Args:
        log_ratio: token log ratios (nat), 0 on padding.
        mask: True on response tokens.
        advantages: one per response; those of 0 do not count.
        p: exponent in force.
        objective: the member with the configured half-widths.
        share: wanted share of clipped units, in (0, 1).
    """
    lengths = mask.sum(1).to(log_ratio.dtype)
    clamped = clamp_tokens(log_ratio, objective)
    band = measure_band(clamped, mask, p, objective) if objective.needs_band else None
    low, high = row_bounds(advantages, objective, band, lengths)
    centre = torch.zeros_like(low)
    if band is not None and objective.clip_center == "drift":
        centre = centre + band.center
    width = torch.where(advantages > 0, high - centre, low - centre)
    rows = mask.any(1) & (advantages != 0)
    if objective.clip_level == "sequence":
        value = log_mean(clamped, mask, p, objective)
        excursion = ((value - centre) / width)[rows]
    else:
        counted = mask & rows.unsqueeze(1)
        excursion = ((log_ratio - centre.unsqueeze(1)) / width.unsqueeze(1))[counted]
    if len(excursion) == 0:
        return None
    rank = math.ceil((1 - share) * len(excursion))
    scale = float(excursion.sort().values[max(rank, 1) - 1])
    return scale if math.isfinite(scale) and scale > 0 else None


def scaled_bounds(objective: ObjectiveConfig, scale: float) -> ObjectiveConfig:
    """The objective with both log half-widths multiplied by `scale`, in its own clip space.

    A space that bounds no ratio has its two thresholds multiplied.
    """
    if objective.clip_space in MASKING:
        low, high = (scale * width for width in (objective.clip_low, objective.clip_high))
        return dataclasses.replace(objective, clip_low=low, clip_high=high)
    low, high = (scale * bound for bound in objective.log_bounds)
    if objective.clip_space == "log":
        return dataclasses.replace(objective, clip_low=-low, clip_high=high)
    if objective.clip_space == "k3":
        low, high = (math.expm1(bound) - bound for bound in (low, min(high, 13.0)))
        return dataclasses.replace(objective, clip_low=low, clip_high=high)
    return dataclasses.replace(
        objective, clip_low=-math.expm1(low), clip_high=min(math.expm1(high), 1e30)
    )
