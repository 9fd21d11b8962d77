"""One run of a suite, from its job to its outcome; the same in a worker and in a task of Ray.

A run that raises is an outcome: it failed, and why. What says nothing of the run itself is none: a
full disk, memory or a folder that another process holds, a refusal to go on with a run
whose files have changed, a signal.
"""

import errno
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hmpo.config import RunConfig
from hmpo.config.reading import run_config
from hmpo.errors import RunFolderError, StorageError
from hmpo.lab.study.outcomes import Outcome
from hmpo.lab.suite.job import Job, conclude, concluded, final_success
from hmpo.run.ending import failure_text
from hmpo.run.observer import Observer

logger = logging.getLogger(__name__)

Tell = Callable[[Mapping[str, Any]], None]
"""Takes a message of a run: `event` is start, update, evaluation or ended."""


class Reporter(Observer):
    """Tells how far a run is. A run goes on without it where nobody listens."""

    expendable = True

    def __init__(self, tell: Tell) -> None:
        self.tell = tell
        self.started = False

    def on_start(self, config: RunConfig, folder: Path, step: int) -> None:
        """The run is set up."""
        self.started = True
        self.tell({"event": "start", "step": step})

    def on_update(self, record: dict[str, Any], timing: dict[str, float]) -> None:
        """An update is done."""
        self.tell({"event": "update", "step": record["step"] + 1})

    def on_evaluation(self, step: int, name: str, evaluation: Any) -> None:
        """Held-out prompts were measured."""
        self.tell({"event": "evaluation", "step": step, "sampled": evaluation.sampled.value})


def execute(job: Job, tell: Tell) -> dict[str, Any]:
    """Make a run, or go on with it, and write its outcome.

    Returns:
        `status`: finished, failed, stopped (by a controller), interrupted (by a signal: there is
        no outcome yet) or impossible (nor here); `reason` and `raised` (whether an exception came).
    """
    from hmpo.run.loop import train

    config = run_config(job.config)
    folder = Path(job.folder)
    if (known := concluded(job, config)) is not None:  # and nobody was told of it
        return _ended(known, raised=False)
    failure, began = job.failure, time.process_time()
    known_before = (folder / "telemetry.jsonl").exists()
    reporter = Reporter(tell)
    if not failure:
        try:
            result = train(
                config,
                resume=True,
                exist_ok=True,
                folder=folder,
                observer=reporter,
                allow_changed=False,
            )
        except KeyboardInterrupt:
            return {"status": "interrupted", "reason": "", "raised": True}
        except (StorageError, RunFolderError) as error:
            return {"status": "impossible", "reason": failure_text(error), "raised": True}
        except BaseException as error:
            refused = known_before and not reporter.started  # to go on: that is no end of the run
            if refused or _of_the_machine(error):
                return {"status": "impossible", "reason": failure_text(error), "raised": True}
            logger.warning("cell %s, seed %d failed", job.cell, job.seed, exc_info=error)
            failure = failure_text(error)
        else:
            if result.status == "interrupted":
                return {"status": "interrupted", "reason": "", "raised": False}
    spent = time.process_time() - began
    try:
        outcome = conclude(job, config, failure, spent)
    except (StorageError, RunFolderError) as error:
        return {"status": "impossible", "reason": failure_text(error), "raised": True}
    return _ended(outcome, raised=bool(failure))


def _of_the_machine(error: BaseException) -> bool:
    """Whether an error says what the machine lacks, and nothing of the run."""
    import torch

    scarce = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    lacks = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return lacks or (isinstance(error, OSError) and error.errno in scarce)


def _ended(outcome: Outcome, *, raised: bool) -> dict[str, Any]:
    """What is told of a run that has an outcome."""
    return {
        "status": outcome.status,
        "reason": outcome.reason,
        "raised": raised,
        "sampled": final_success(outcome),
    }
