"""Settings of the processes that train together."""

from dataclasses import dataclass

from hmpo.config.checks import within_reason
from hmpo.errors import require

LONGEST_S = 604800
"""Largest `distributed.timeout`: a week."""


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How several ranks train together; how many there are is not in a run's settings."""

    timeout: float = 600.0
    """Seconds that a rank waits for another one, which is taken for stopped then; what the first
    rank does alone, such as scoring a rollout or saving, must be done in that time. One process
    waits for nobody."""

    def __post_init__(self) -> None:
        within_reason(self)
        expected = f"seconds, from 1 to {LONGEST_S} (a week)"
        require(1 <= self.timeout <= LONGEST_S, "timeout", self.timeout, expected)
