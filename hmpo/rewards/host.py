"""What TRL hands its reward functions besides the samples, for those that ask for it by name.

trainer_state   `global_step` updates done of `max_steps`
log_extra       log_extra(column, values): a column for completions.jsonl, a value a sample
log_metric      log_metric(name, value): a number for the log, averaged over its calls
"""

import math
import numbers
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

SUPPLIED = ("trainer_state", "log_extra", "log_metric")
"""Names of parameters that are supplied, beside the samples and the columns."""


@dataclass(frozen=True, kw_only=True)
class RewardTrainerState:
    """How far the training is, by the names of transformers' `TrainerState`.

    Example: `RewardTrainerState(global_step=40, max_steps=400)`.
    """

    global_step: int
    """Updates done."""
    max_steps: int = 0
    """Updates of the whole training; 0 where nobody knows."""


class Notes:
    """What one call of a reward function logs.

    Args:
        count: samples of the call.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.extras: dict[str, list[Any]] = {}
        """By column, a value for each sample."""
        self.told: dict[str, list[float]] = {}

    def log_extra(self, column: str, values: Any) -> None:
        """Keep a column.

        Raises:
            ValueError: not one value a sample.
        """
        values = values.tolist() if hasattr(values, "tolist") else list(values)
        if len(values) != self.count:
            raise ValueError(
                f"log_extra({column!r}): got {len(values)} values, expected {self.count}"
            )
        self.extras[str(column)] = values

    def log_metric(self, name: str, value: Any) -> None:
        """Keep a number.

        Raises:
            ValueError: something else than a number.
        """
        value = value.item() if hasattr(value, "item") else value
        if not isinstance(value, numbers.Real):
            raise ValueError(f"log_metric({name!r}): got {value!r}, expected a number")
        self.told.setdefault(str(name), []).append(float(value))

    @property
    def metrics(self) -> dict[str, float]:
        """By name, the mean over the calls; NaN where one was not finite."""
        return {
            name: sum(values) / len(values) if all(map(math.isfinite, values)) else math.nan
            for name, values in self.told.items()
        }

    def supply(self, asked: Collection[str], state: RewardTrainerState) -> dict[str, Any]:
        """The arguments by those names."""
        every = {
            "trainer_state": state,
            "log_extra": self.log_extra,
            "log_metric": self.log_metric,
        }
        return {name: value for name, value in every.items() if name in asked}
