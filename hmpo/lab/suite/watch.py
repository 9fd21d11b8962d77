"""What whoever watches a suite is told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hmpo.lab.study.outcomes import Outcome
from hmpo.lab.suite.cells import Cell


class Watcher:
    """Watches a suite; every method does nothing until a child overrides it."""

    def on_begin(
        self, runs: Sequence[tuple[Cell, int]], done: Mapping[tuple[str, int], str], jobs: int
    ) -> None:
        """The suite begins: the chosen runs, the status of those done, and how many go at once."""

    def on_run(self, cell: str, seed: int, message: Mapping[str, Any]) -> None:
        """A run goes on: `event` is start, update, evaluation, died or ended."""

    def on_tick(self) -> None:
        """Some time has passed."""

    def on_stop(self, number: int) -> None:
        """A signal asked for the end; the workers finish what they must."""


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """What running a suite came to.

    Example: `run_suite(read_suite("suite.toml")).finished`.
    """

    folder: Path
    finished: int = 0
    """Runs with an outcome that is no failure, of the chosen ones."""
    failed: list[tuple[str, int, str]] = field(default_factory=list)
    """Cell, seed and reason of runs that failed, which is an outcome too."""
    committed: int = 0
    """Runs left out because their outcome is committed."""
    left: int = 0
    """Runs that have no outcome yet."""
    exploratory: int = 0
    """Of those with an outcome here, the ones that no unchanged protocol had decided on."""
    signal: int | None = None
    """The signal that stopped the suite."""
    keeps: bool = True
    """Whether runs that were under way go on where they were."""
    problem: str = ""
    """Why the suite could not go on; nothing that is done is lost."""
    compared: list[str] = field(default_factory=list)
    """Under `again`, the lines that say which final numbers equal the committed ones."""
    outcomes: Mapping[tuple[str, int], Outcome] = field(default_factory=dict)
    """By cell and seed, of the chosen runs that have one here."""
