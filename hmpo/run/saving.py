"""What a run can go on from at any instant, and when it is saved."""

import contextlib
import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hmpo.errors import NonFiniteError, RunFolderError, StorageError
from hmpo.optim import discard_qk_readings
from hmpo.randomness import random_state, random_state_kept, restore_random_state
from hmpo.run.best import beats, best_evaluation, keeps_best, logged_evaluations
from hmpo.run.build import Trainer
from hmpo.run.ending import failure_text
from hmpo.run.evidence import Evidence
from hmpo.run.files import RunFiles
from hmpo.run.inputs import changed_inputs, refuse_changed
from hmpo.run.place import saved_steps
from hmpo.run.steering import Steering
from hmpo.types import Event

logger = logging.getLogger(__name__)

SHARE = 0.02
"""Of a run's time that saving may take where `checkpoint.every` is auto."""
SOONEST_S, LATEST_S = 10.0, 1800.0
"""Bounds of the time between two such saves."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A moment between two updates, whose records are in the logs: all of its state but weights.

    A run takes one after each rollout, update and evaluation. Together with the weights and the
    optimizer's state, which change in a step alone, it is what a checkpoint holds; so whatever
    fails afterwards, a run can be saved as it was then.

    Example: `Mark(trainer={"step": 3, ...}, steering={"drawn": 9, ...}, random={...},
    before={...}, passed=3, counts={...}, logs={"telemetry": (2048, "9f2c..."), ...})`.
    """

    trainer: Mapping[str, Any]
    """Counters and the rollout in use."""
    steering: Mapping[str, Any]
    random: Mapping[str, Any]
    """The global random states."""
    before: Mapping[str, Any] | None
    """The record of the evaluation before the first update."""
    passed: int
    """Updates after which what was due after them (an evaluation) is done."""
    counts: Mapping[str, int]
    """What the run had to learn from so far."""
    logs: Mapping[str, tuple[int, str]]
    """Bytes and SHA-256 of each log."""

    def state(self, run_id: str) -> dict[str, Any]:
        """The run's own part of a checkpoint."""
        return {
            "run_id": run_id,
            "before": self.before,
            "offsets": {name: end for name, (end, _) in self.logs.items()},
            "sha256": {name: digest for name, (_, digest) in self.logs.items()},
            "rng": self.random,
            "steering": self.steering,
            "passed": self.passed,
            "counts": dict(self.counts),
        }


class Cadence:
    """When a run is saved along the way; saving changes nothing but what a kill would cost.

    Args:
        every: updates between two saves; 0 saves never along the way; "auto" saves after the first
            update, and then whenever saving has taken at most `SHARE` of the time, at least
            `SOONEST_S` and at most `LATEST_S` seconds after the last one.
        clock: seconds of a clock that only goes forward.
    """

    def __init__(
        self, every: int | Literal["auto"], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.every, self._clock = every, clock
        self._next = -1.0

    def due(self, step: int) -> bool:
        """Whether to save after `step` updates."""
        if self.every == "auto":
            return self._clock() >= self._next
        return bool(self.every) and step % self.every == 0

    def saved(self, seconds: float) -> None:
        """Note that a save has taken so long."""
        pause = min(max(seconds / SHARE, SOONEST_S), LATEST_S)
        self._next = self._clock() + pause


class Saver:
    """Keeps what a run can go on from, and saves it.

    Args:
        files: of the run.
        trainer: holds weights, optimizer and counters.
        steering: holds prompts and controllers.
        evidence: counts what there was to learn from.
        every: see `Cadence`.
    """

    def __init__(
        self,
        files: RunFiles,
        trainer: Trainer,
        steering: Steering,
        evidence: Evidence,
        every: int | Literal["auto"],
    ) -> None:
        self.files, self.trainer = files, trainer
        self.steering, self.evidence = steering, evidence
        self.cadence = Cadence(every)
        self.before: dict[str, Any] | None = None
        """The record of the evaluation before the first update."""
        self.passed = 0
        """Updates after which what was due after them is done."""
        self.inputs: dict[str, str] = {}
        """Hashes of prompts, code and policy, in each checkpoint."""
        self.random = random_state()
        """Global random states from which the run draws on."""
        self.best: Mapping[str, Any] | None = None
        """The evaluation on the way that did best, whose checkpoint is kept."""
        self._better = False
        """Whether it is the last one, and not saved yet."""
        self.mark: Mark | None = None
        """Where the run can be gone on from whatever happens next."""
        self._saved: Mark | None = None
        """The last mark that was saved, or could not be."""

    def changed(self, found: dict[str, str], own: Mapping[str, Any], *, allowed: bool) -> list[str]:
        """What is not as it was when a checkpoint was made.

        Args:
            found: the inputs as they are; later checkpoints keep these.
            own: the run's part of the checkpoint.
            allowed: go on with other inputs; else that is refused.

        Raises:
            CheckpointError: one line that names them.
        """
        self.inputs = found
        if self.before is None:  # nothing came of them yet: a reward that failed is mended
            return []
        changed = changed_inputs(own.get("inputs", found), found)
        if own["before"] is None:  # nothing was asked or scored yet; the weights alone are kept
            changed = [line for line in changed if line.startswith("policy")]
        if not allowed:
            refuse_changed(self.files.folder, changed)
        return changed

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        own, done = state["run"], state["trainer"]["step"]
        self.trainer.load_state_dict(state)
        self.before, self.random = own["before"], own["rng"]
        self.passed = own.get("passed", done)  # older runs saved only where nothing was due
        self.evidence.counts |= own.get("counts", {})
        self.files.run_id = own["run_id"]  # also where the folder's name or `updates` changed
        self.steering.load_state_dict(own["steering"])

    def recall(self) -> None:
        """Find in the log, cut to where a checkpoint left it, which of the kept ones did best."""
        if not keeps_best(self.files.config):
            return
        best = best_evaluation(logged_evaluations(self.files.folder))
        if best is not None and best["step"] in saved_steps(self.files.folder):
            self.best = best

    def measured(self, record: Mapping[str, Any]) -> None:
        """Take note of an evaluation on the way: where it is the best so far, a save is due."""
        if keeps_best(self.files.config) and (self.best is None or beats(record, self.best)):
            self.best, self._better = record, True

    def note(self) -> None:
        """Mark that everything up to here is done and logged."""
        self.files.steps = self.trainer.step
        self.mark = Mark(
            trainer=self.trainer.position(),
            steering=copy.deepcopy(self.steering.state_dict()),
            random=self.random,
            before=self.before,
            passed=self.passed,
            counts=dict(self.evidence.counts),
            logs=self.files.logs(),
        )

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Random numbers that count are drawn inside: by tasks, rewards and the model.

        They go on from where the last block ended, whatever else has drawn since, and where this
        one ends is part of the next mark.
        """
        restore_random_state(self.random)
        yield
        self.random = self.trainer.ranks.once(random_state)  # rewards draw on the first rank alone

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Random numbers that do not count are drawn inside: by the rewards of an evaluation.

        They go on from where the last `drawing` block ended, also in a process that has drawn none
        yet, and leave no trace.
        """
        with random_state_kept():
            restore_random_state(self.random)
            yield

    def save(self) -> None:
        """Save the run as it was at the last mark, unless that is done.

        Raises:
            HmpoError: it cannot be saved.
        """
        mark = self.mark
        assert mark is not None, "noted when the run begins"
        if self._saved is mark:
            return
        self._saved = mark
        began = time.perf_counter()
        with random_state_kept():  # saving more often changes nothing
            state = self.trainer.state_dict(mark.trainer)
            state["run"] = mark.state(self.files.run_id)
            state["run"] |= {"inputs": self.inputs, "every": self.files.every}
            try:
                best = None if self.best is None else self.best["step"]
                self.files.save(self.trainer.step, state, best)
                self._better = False
            except NonFiniteError as error:
                fault = {"site": "checkpoint", "where": str(error).partition(":")[0]}
                event = Event(name="nonfinite", step=self.trainer.step, data=fault)
                self.trainer.events.append(event)
                raise
            spent = time.perf_counter() - began
            self.cadence.saved(spent)
            self.files.write_time(self.trainer.step, {"time/save_s": spent})

    def save_if_due(self) -> None:
        """Save where `every` asks for it, or where the policy is better than it was before."""
        due = self._better or self.cadence.due(self.trainer.step)
        if self.trainer.shards is not None:  # all ranks save together, by one clock
            due = self.trainer.ranks.once(lambda: due)
        if due:
            self.save()

    def save_sound(self, error: BaseException) -> bool:
        """Save the last mark after a failure, if the weights are still those of it.

        Returns:
            Whether the run can be gone on from the mark.
        """
        trainer, mark = self.trainer, self.mark
        if mark is None or not trainer.whole or trainer.step != mark.trainer["step"]:
            return False
        if trainer.shards is not None and not isinstance(error, NonFiniteError):
            return False  # the others, who hold the rest of the weights, may be gone
        if isinstance(error, RunFolderError):  # nothing of ours is there to be written to
            return False
        discard_qk_readings(trainer.optimizer)  # of an update that was not finished
        try:
            self.save()
        except Exception as second:
            level = logging.INFO if isinstance(error, StorageError) else logging.WARNING
            logger.log(level, "nothing could be saved: %s", failure_text(second))
            return False
        return True
