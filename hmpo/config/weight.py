"""Settings of constant weights: what multiplies each log-prob under `gate = "detached"`.

Standard library only, as everything in `hmpo.config`.
"""

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hmpo.config.checks import within_reason
from hmpo.errors import require, require_positive

if TYPE_CHECKING:
    from hmpo.config.objective import ObjectiveConfig

MASKING = ("tv", "kl")
"""Clip spaces that say which tokens drop out, and bound no ratio."""


@dataclass(frozen=True, kw_only=True)
class WeightConfig:
    """The constant weight of each log-prob under `gate = "detached"` (`hmpo.objective.weights`)."""

    kind: Literal["ratio", "inverse", "gamma"] = "ratio"
    """Of the ratio R of `level`: R itself; 1 / min(R, upper bound) for advantages >= 0 and R for
    those < 0 (ASPO); or R^power e^(decay (1 - R)) (VESPO)."""
    level: Literal["token", "prefix", "sequence"] = "token"
    """R is the ratio of the token, of all tokens of the response up to it, or of all of them:
    products over tokens, not means."""
    bound: Literal["cap", "mask"] = "cap"
    """What the clip does: cut a weight to the bound, on both sides whatever the advantage's sign
    (CISPO); or take out the tokens that lie beyond the bound of their sign (PPO)."""
    cap: float | None = None
    """No weight is larger than this; a token there keeps its gradient. None sets no limit."""
    power_positive: float = 2.0
    """kind = "gamma": power for advantages >= 0."""
    power_negative: float = 3.0
    """kind = "gamma": power for advantages < 0."""
    decay_positive: float = 3.0
    """kind = "gamma": decay for advantages >= 0."""
    decay_negative: float = 2.0
    """kind = "gamma": decay for advantages < 0."""

    def __post_init__(self) -> None:
        within_reason(self)
        if self.cap is not None:
            require_positive("cap", self.cap)
        for name in ("power_positive", "power_negative", "decay_positive", "decay_negative"):
            value = getattr(self, name)
            require(0 <= value <= 1e3, name, value, "a number in [0, 1000]")


def check_weight(config: "ObjectiveConfig") -> None:
    """Refuse what a weight, its clip and its proximal term leave without effect.

    Raises:
        ConfigError: one line that names the field.
    """
    weight, level, space = config.weight, config.clip_level, config.clip_space
    detached, masks = config.gate == "detached", config.weight.bound == "mask"
    if space in MASKING and level != "none":
        fits = detached and masks and (weight.kind, weight.level) == ("ratio", "token")
        expected = 'another unit without the constant weight of a token that weight.bound = "mask"'
        require(fits, "clip_space", space, expected)
    if config.clip_width == "sqrt":
        fits = detached and level == "token" and weight.level != "token" and space == "log"
        expected = 'another width without a weight of level "prefix" or "sequence" in log space'
        require(fits, "clip_width", config.clip_width, expected)
    if detached:
        require(level != "none" or not masks, "weight.bound", weight.bound, '"cap" without a clip')
        free = level == "none" or weight.kind != "gamma"
        require(free, "clip_level", level, '"none" with weight.kind = "gamma"')
        fits = masks or weight.kind != "inverse"
        require(fits, "weight.bound", weight.bound, '"mask" with weight.kind = "inverse"')
        plain = config.clip_share is None or weight == WeightConfig()
        require(plain, "clip_share", config.clip_share, "None with a weight of its own")
    coef = config.proximal_coef
    require(math.isfinite(coef) and coef >= 0, "proximal_coef", coef, ">= 0")


@functools.lru_cache
def k3_bounds(low: float, high: float) -> tuple[float, float]:
    """The negative x with e^x - 1 - x = low, and the positive one with e^x - 1 - x = high (nat).

    Newton's method from outside: the function is convex, so it never overshoots.
    """
    starts = -1 - low, min(math.sqrt(2 * high), math.log(2 * (1 + high)))
    return _k3_root(starts[0], low), _k3_root(starts[1], high)


def _k3_root(x: float, target: float) -> float:
    for _ in range(200):
        step = (math.expm1(x) - x - target) / math.expm1(x)
        if abs(step) <= 1e-15 * abs(x):
            break
        x -= step
    return x
