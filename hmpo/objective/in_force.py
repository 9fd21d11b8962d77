"""The objective as it stands at an update: member, exponent, calibrated clip, what controllers set.

A trainer asks for it before each update, and lets it follow the update afterwards:

    config, p = objective.at(update)       the member with its present bounds, and its exponent
    ... loss, backward pass, step ...
    metrics, events = objective.follow(logprobs, old_logprobs, mask, advantages, update=update, ...)

Two things follow an update that was applied: a learnable exponent takes one step, and the
half-widths of a calibrated clip take note of the ratios. Both see the exponent that the update
used, so their order does not matter.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hmpo.config.objective import ObjectiveConfig
from hmpo.errors import ConfigError
from hmpo.objective.calibration import ClipCalibration, scaled_bounds
from hmpo.objective.entropy import EntropyCoefficient
from hmpo.objective.exponent import ControllerExponent, exponent_in_force, exponent_source
from hmpo.objective.loss import power_mean_loss
from hmpo.objective.segments import turns_of
from hmpo.objective.terms import advantages_of_rows
from hmpo.types import Event, Metrics

logger = logging.getLogger(__name__)


class ObjectiveInForce:
    """One objective over a whole training.

    Args:
        objective: the member as configured.
        device: where a learnable exponent lives.
        updates: optimizer updates of the training, for an exponent on a schedule.
        per_rollout: updates that a rollout serves, for one that is held within a rollout.

    Raises:
        ConfigError: a schedule without a length.
    """

    def __init__(
        self,
        objective: ObjectiveConfig,
        device: torch.device,
        updates: int | None,
        per_rollout: int = 1,
    ) -> None:
        self.source = exponent_source(objective, device, updates, per_rollout)
        self.calibration = ClipCalibration(objective)
        self.entropy = EntropyCoefficient(objective)
        self.clip_scale = 1.0
        """Factor of a controller on the clip's log half-widths; not in the state."""

    @property
    def config(self) -> ObjectiveConfig:
        """The member in force; rewards, a calibration or a controller may move its bounds."""
        objective = self.calibration.apply(self.source.objective)
        if self.entropy.adaptive:
            objective = dataclasses.replace(objective, entropy_coef=self.entropy.value)
        return objective if self.clip_scale == 1 else scaled_bounds(objective, self.clip_scale)

    def at(self, update: int) -> tuple[ObjectiveConfig, Float[Tensor, ""] | None]:
        """The member and its exponent at a 0-based update; None leaves p to the member."""
        p = self.source.value(update)
        return self.config, None if p is None else torch.tensor(p, dtype=torch.float64)

    def observe(self, rewards: Float[Tensor, " N"]) -> None:
        """Take note of a rollout's rewards, those of valid responses."""
        self.source.observe(rewards)

    def follow(
        self,
        logprobs: Float[Tensor, "N T"],
        old_logprobs: Float[Tensor, "N T"],
        mask: Bool[Tensor, "N T"],
        advantages: Float[Tensor, " N"] | Float[Tensor, "N T"],
        *,
        update: int,
        rollout: int,
        staleness: int,
        entropy: float = math.nan,
    ) -> tuple[Metrics, list[Event]]:
        """Learn from an update that was applied, given its whole minibatch.

        Args:
            logprobs: of the response tokens when the update was computed (nat), detached.
            old_logprobs: of the same tokens under the behaviour policy.
            mask: True on response tokens that count.
            advantages: one per response, or one per token as in the loss.
            update: 0-based update.
            rollout: 0-based rollout that it learns from.
            staleness: updates since the weights that sampled.
            entropy: token mean of the policy's (nat), which an adaptive bonus follows.

        Returns:
            Metrics of what was learned, and an event where the clip's half-widths settle.
        """
        config, exponent = self.at(update)
        self.entropy.follow(entropy)
        log_ratio = torch.where(mask, logprobs - old_logprobs, torch.zeros_like(old_logprobs))

        def surrogate(p: Tensor) -> Tensor:
            free = dataclasses.replace(config, kl_coef=0.0, entropy_coef=0.0)
            return power_mean_loss(logprobs, old_logprobs, mask, advantages, free, exponent=p)

        turns, rows = turns_of(mask, config), mask
        of_rows = advantages_of_rows(advantages, mask, config, turns)
        if turns is not None:
            log_ratio, rows = turns.tokens(log_ratio), turns.mask
        learned = self.source.learn(log_ratio, rows, of_rows, surrogate)
        base = self.source.objective
        if base.clip_share is None:
            return learned, []
        p = exponent_in_force(log_ratio, rows, of_rows, base, exponent)
        settled = self.calibration.observe(
            log_ratio, rows, of_rows, p, base, rollout=rollout, staleness=staleness
        )
        if not settled:
            return learned, []
        low, high = self.config.log_bounds
        logger.info("clip half-widths calibrated: log bounds %.3g and %.3g", low, high)
        data = {"scale": self.calibration.scale, "log_low": low, "log_high": high}
        return learned, [Event(name="clip_calibrated", step=update, data=data)]

    def set(
        self, *, p: float | None = None, weight: float | None = None, clip: float | None = None
    ) -> None:
        """What a controller decided; None leaves a value as it is.

        Args:
            p: the exponent, with `exponent.kind = "controller"`.
            weight: that of the arithmetic mean, with `mean = "ahm"`.
            clip: factor on the clip's log half-widths.

        Raises:
            ConfigError: `p` is not finite, or the objective takes its exponent from elsewhere.
        """
        if p is not None:
            if not isinstance(self.source, ControllerExponent):
                kind = self.source.objective.exponent.kind
                raise ConfigError(
                    f'exponent.kind: got {kind!r}, expected "controller" where a controller sets p'
                )
            self.source.set(p)
        if weight is not None:
            self.source.objective = dataclasses.replace(self.source.objective, ahm_weight=weight)
        if clip is not None:
            self.clip_scale = clip

    def state_dict(self) -> dict[str, Any]:
        """What was learned and settled, as plain values and tensors."""
        return {
            "exponent": self.source.state_dict(),
            "calibration": self.calibration.state_dict(),
            **self.entropy.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self.source.load_state_dict(state["exponent"])
        self.calibration.load_state_dict(state["calibration"])
        self.entropy.load_state_dict(state)
