"""Learning rates of a trainer's groups: a base that others may set, and what is in force of it."""

import logging
from collections.abc import Mapping
from typing import Any

import torch

from hmpo.config import TrainerConfig
from hmpo.errors import ConfigError

logger = logging.getLogger(__name__)


class LearningRates:
    """Puts base * factor into the groups of an optimizer before each step.

    The base is the `lr` that the optimizer came with. A value that somebody else put there since
    the last step, an outside scheduler or a hand, is the new base: it is never undone.

    Args:
        optimizer: with its base learning rates.
        config: with the schedule.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: TrainerConfig) -> None:
        self.optimizer, self.config = optimizer, config
        self.plain = config.lr_schedule == "constant" and config.warmup_updates == 0
        for group in self.groups:
            group.setdefault("initial_lr", group["lr"])
        # A scheduler made before us has its first value in force already; `initial_lr` is ours
        # where an earlier trainer's schedule set the value.
        self.bases = [group["lr" if self.plain else "initial_lr"] for group in self.groups]
        self.told = False
        self.seen = [group["lr"] for group in self.groups]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's, of which it makes a new list whenever a state is loaded."""
        return self.optimizer.param_groups

    def apply(self, update: int, scale: float) -> None:
        """Set the rates of the 0-based `update`.

        Args:
            update: updates done before.
            scale: a controller's factor.

        Raises:
            ConfigError: the schedule has ended; every further rate would be 0.
        """
        config = self.config
        ends = config.lr_schedule != "constant" and config.total_updates is not None
        if ends and update >= (config.total_updates or 0):
            raise ConfigError(
                f"total_updates: got {config.total_updates} with lr_schedule = "
                f"{config.lr_schedule!r}, expected at least the {update + 1} updates that are "
                "taken: the learning rate has come to 0"
            )
        self._follow()
        factor = config.lr_factor(update) * scale
        for group, base in zip(self.groups, self.bases):
            group["lr"] = base * factor
        self.seen = [group["lr"] for group in self.groups]

    def _follow(self) -> None:
        """Take a rate that is not the one we set last as the base."""
        for group in self.groups[len(self.bases) :]:  # added since
            group.setdefault("initial_lr", group["lr"])
            self.bases.append(group["lr"])
            self.seen.append(group["lr"])
        for i, group in enumerate(self.groups):
            if group["lr"] == self.seen[i]:
                continue
            self.bases[i] = group["lr"]
            if not self.plain and not self.told:
                self.told = True
                logger.warning(
                    "the optimizer's lr was set to %g from outside; the trainer's own schedule "
                    "(lr_schedule, warmup_updates) goes on from it as its base",
                    group["lr"],
                )

    def state_dict(self) -> dict[str, Any]:
        """Bases that are not the optimizer's own; empty where nobody set any."""
        own = [group["initial_lr"] for group in self.groups]
        return {} if self.bases == own else {"base_lrs": list(self.bases)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the optimizer's state was loaded."""
        own = [group["initial_lr"] for group in self.groups]
        self.bases = list(state.get("base_lrs", own))
        self.seen = [group["lr"] for group in self.groups]
