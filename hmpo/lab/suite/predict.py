"""How long a suite will take, from one measured rollout, update and evaluation of each cell."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hmpo.config import RunConfig
from hmpo.errors import HmpoError
from hmpo.lab.suite.cells import Cell
from hmpo.run.observer import Observer

MOST = 2**31
"""Held-out prompts of a task that has as many as one asks for."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Seconds of the parts of a run, measured once.

    Example: `Measured(load=0.4, rollout=0.2, update=0.1, evaluation=0.3, measured=64, most=256)`.
    """

    load: float
    rollout: float
    update: float
    """With what is logged of it."""
    evaluation: float
    measured: int
    """Held-out prompts of that evaluation."""
    most: int
    """Held-out prompts that the task has, as far as was asked."""

    def whole(self, config: RunConfig) -> float:
        """Seconds of a whole run."""
        trainer = config.trainer
        rollouts = -(-config.updates // (trainer.minibatches * trainer.epochs))
        every = config.eval.every
        during = (config.updates - 1) // every if every else 0
        # a prompt is answered twice, sampled and greedily; at the ends sampled pass_at times
        final = min(config.eval.final_prompts, self.most) * (max(1, config.eval.pass_at) + 1) / 2
        prompts = during * min(config.eval.prompts, self.most) + 2 * final
        evaluating = self.evaluation * prompts / self.measured
        return self.load + rollouts * self.rollout + config.updates * self.update + evaluating


class _Clock(Observer):
    """Takes the times of a run's parts."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.load = self.rollout = self.update = self.evaluation = 0.0
        self.measuring = 0.0
        self.prompts = 0

    def on_start(self, config: RunConfig, folder: Path, step: int) -> None:
        self.load = time.perf_counter() - self.began

    def on_measuring(self, step: int, name: str, done: int, total: int) -> None:
        if done == 0:
            self.measuring = time.perf_counter()

    def on_evaluation(self, step: int, name: str, evaluation: Any) -> None:
        self.evaluation = time.perf_counter() - self.measuring
        self.prompts = evaluation.sampled.trials

    def on_update(self, record: dict[str, Any], timing: dict[str, float]) -> None:
        self.rollout = timing.get("time/rollout_s", 0.0)
        self.update = timing["time/step_s"] - self.rollout


def measure(config: RunConfig, folder: Path) -> Measured:
    """Time one rollout, update and evaluation in a folder that is thrown away.

    Raises:
        HmpoError: the run cannot be made.
        KeyboardInterrupt: a signal came.
    """
    from hmpo.run.loop import train

    prompts = min(config.eval.prompts, config.eval.final_prompts)
    short = dataclasses.replace(
        config,
        updates=1,
        out=str(folder),
        sinks=(),
        eval=dataclasses.replace(config.eval, every=0, final_prompts=prompts, pass_at=0),
        checkpoint=dataclasses.replace(config.checkpoint, every=0),
    )
    clock, log = _Clock(), logging.getLogger("hmpo")
    level = log.level
    log.setLevel(logging.ERROR)  # one update has no signal to learn from, which is no news
    try:
        result = train(short, overwrite=True, observer=clock)
    finally:
        log.setLevel(level)
    if result.signal is not None:
        raise KeyboardInterrupt(result.signal)
    return Measured(
        load=clock.load,
        rollout=clock.rollout,
        update=clock.update,
        evaluation=clock.evaluation,
        measured=max(1, clock.prompts),
        most=clock.prompts if clock.prompts < prompts else MOST,
    )


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a suite will take.

    Example: `Prediction(cells={"grpo": 12.5}, problems={}, total=250.0)`: twenty runs on one core.
    """

    cells: Mapping[str, float]
    """Seconds of one run of each cell."""
    problems: Mapping[str, str]
    """Why a cell could not be measured: so will its runs end."""
    total: float
    """Seconds of all runs, `jobs` at once."""


def predict(
    runs: Sequence[tuple[Cell, int]], jobs: int, told: Callable[[str, float], None]
) -> Prediction:
    """Measure each cell that has runs, once, and add up.

    Runs that go on at once are taken not to slow each other down.

    Args:
        runs: what is to be made, in order.
        jobs: runs at once.
        told: called with a cell's name and the seconds of one of its runs.
    """
    cells = list({cell.name: cell for cell, _ in runs}.values())
    seconds: dict[str, float] = {}
    problems: dict[str, str] = {}
    with TemporaryDirectory(prefix="hmpo-dry-run-") as folder:
        for number, cell in enumerate(cells):
            seed = next(seed for one, seed in runs if one.name == cell.name)
            config = cell.run_config(seed, folder)
            try:
                if number == 0:
                    measure(config, Path(folder))  # what only the first run of a process pays
                seconds[cell.name] = measure(config, Path(folder)).whole(config)
            except HmpoError as error:
                problems[cell.name] = str(error)
                continue
            told(cell.name, seconds[cell.name])
    return Prediction(cells=seconds, problems=problems, total=_makespan(runs, seconds, jobs))


def _makespan(runs: Sequence[tuple[Cell, int]], seconds: Mapping[str, float], jobs: int) -> float:
    """When the last run ends, if each begins as soon as a process is free."""
    free = [0.0] * jobs
    for cell, _ in runs:
        first = free.index(min(free))
        free[first] += seconds.get(cell.name, 0.0)
    return max(free)
