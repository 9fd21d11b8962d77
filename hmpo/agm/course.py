"""Which records carry a new value: one gap per rollout, one reward per rollout.

The log gap grows with staleness: it is 0 on the on-policy minibatch and largest on the last
one of a rollout. Records of different staleness are two populations, so only the stalest
are compared. A rollout's rewards are repeated in each of its updates, so they count once.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from hmpo.agm.protocol import Record
from hmpo.errors import TelemetryError

PLACE = ("rollout", "staleness")
"""The fields that tell where in a run a step record lies."""


class Beat(NamedTuple):
    """What is new in one step record.

    Example: `Beat(restarted=False, deeper=False, gap=True, reward=False, moved=False)`.
    """

    restarted: bool
    """The step did not go up: all history is of another course."""
    deeper: bool
    """The stalest update so far: earlier gaps cannot be compared with this one."""
    gap: bool
    """As stale as the stalest: its gap counts."""
    reward: bool
    """First record of its rollout: its rewards count."""
    moved: bool
    """`curriculum/level` changed: earlier rewards cannot be compared with these."""


class Course:
    """Follows the step records of one run."""

    NAMES = ("step", "rollout", "staleness", "level", "restarts")

    def __init__(self) -> None:
        self.step = self.rollout = self.staleness = -1
        self.level: int | None = None
        self.restarts = 0

    def follow(self, record: Record) -> Beat:
        """Place the next record.

        Raises:
            TelemetryError: rollout or staleness is no integer >= 0.
        """
        step, rollout, staleness = record["step"], record["rollout"], record["staleness"]
        if type(rollout) is not int or type(staleness) is not int or min(rollout, staleness) < 0:
            name, value = next(
                (n, record[n]) for n in PLACE if type(record[n]) is not int or record[n] < 0
            )
            raise TelemetryError(f"{name}: got {value!r}, expected an integer >= 0")
        restarted = step <= self.step
        if restarted:
            self.restarts += 1
            self.rollout = self.staleness = -1
        level = record.get("curriculum/level", self.level)
        beat = Beat(
            restarted=restarted,
            deeper=staleness > self.staleness,
            gap=staleness >= self.staleness,
            reward=rollout != self.rollout,
            moved=self.level is not None and level != self.level,
        )
        self.step, self.rollout, self.level = step, rollout, level
        self.staleness = max(self.staleness, staleness)
        return beat

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {name: getattr(self, name) for name in self.NAMES}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        for name in self.NAMES:
            setattr(self, name, state[name])
