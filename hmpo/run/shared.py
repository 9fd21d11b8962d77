"""A run's folder where several ranks train: the first one writes, the others read.

What only the first rank can know or do is done there, and what came of it, an error too, is told
to all of them. Writing is not waited for.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

from hmpo.checkpoint import Checkpoint, load_checkpoint
from hmpo.config import RunConfig
from hmpo.ranks.world import Ranks
from hmpo.run.files import RunFiles
from hmpo.run.folder import Place


class _Nowhere:
    """A log, or a lock, that takes everything and keeps nothing."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def beat(self) -> None: ...


class SharedFiles(RunFiles):
    """The folder of a run of several ranks.

    Args:
        config: the run.
        place: its folder, which all ranks see.
        ranks: that train together.
    """

    def __init__(self, config: RunConfig, place: Place, ranks: Ranks) -> None:
        super().__init__(config, place)
        self.ranks = ranks
        self._taken: Checkpoint | None = None

    def take(self, stack: contextlib.ExitStack, **how: bool) -> Checkpoint | None:
        """Take the folder; every rank loads the checkpoint that the first one has chosen."""

        def chosen() -> int | None:
            self._taken = super(SharedFiles, self).take(stack, **how)
            return None if self._taken is None else self._taken.step

        step = self.ranks.once(chosen)
        if self._leads:
            return self._taken
        self.lock = _Nowhere()  # type: ignore[assignment]
        return None if step is None else load_checkpoint(self.folder / "checkpoints", step=step)

    def check_room(self, state: Mapping[str, Any]) -> None:
        """Refuse a disk without room for the checkpoints, on every rank."""
        self.ranks.once(lambda: super(SharedFiles, self).check_room(state))

    def header(self, base: Mapping[str, Any], saved: Checkpoint | None) -> dict[str, Any]:
        """The first record of the log, the same on every rank."""
        record = self.ranks.once(lambda: super(SharedFiles, self).header(base, saved))
        self.run_id = record["run_id"]
        return record

    def _new_header(self, base: Mapping[str, Any]) -> dict[str, Any]:
        return super()._new_header(base) | {"world_size": self.ranks.size}

    def open(
        self, stack: contextlib.ExitStack, header: Mapping[str, Any], saved: Checkpoint | None
    ) -> None:
        """Open the logs, on the first rank."""
        self.ranks.once(lambda: super(SharedFiles, self).open(stack, header, saved))
        if not self._leads:
            self.telemetry = _Nowhere()  # type: ignore[assignment]

    def publish(self, record: Mapping[str, Any]) -> None:
        """A record for the logs, from the first rank."""
        if self._leads:
            super().publish(record)

    def write_completion(self, record: Mapping[str, Any]) -> None:
        """One response, from the first rank."""
        if self._leads:
            super().write_completion(record)

    def write_time(self, step: int, seconds: Mapping[str, Any]) -> None:
        """A record of the clock, of the first rank."""
        if self._leads:
            super().write_time(step, seconds)

    def note(self, step: int, name: str, data: Mapping[str, Any]) -> None:
        """An event of this process alone, where it is the first rank."""
        if self._leads:
            super().note(step, name, data)

    def logs(self) -> dict[str, tuple[int, str]]:
        """Bytes and SHA-256 of the logs; nothing on ranks that write none."""
        return super().logs() if self._leads else {}

    def check(self) -> None:
        """Insist that the folder is what it was, on the rank that writes there."""
        if self._leads:
            super().check()

    def save(self, step: int, state: Mapping[str, Any], best: int | None = None) -> None:
        """A checkpoint, written once."""
        if self._leads:
            super().save(step, state, best)

    @property
    def _leads(self) -> bool:
        return self.ranks.rank == 0
