"""What controllers decide, carried out in a run: learning rate, p, clip, batch, level, end."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from hmpo.agm.control import Control
from hmpo.config import RunConfig
from hmpo.errors import CheckpointError, require
from hmpo.run.prompt_records import PromptRecords
from hmpo.tasks import Example, Task, make_task
from hmpo.tasks.base import gather_columns
from hmpo.trainer.power_mean import PowerMeanTrainer
from hmpo.trainer.refill import Refill, judged
from hmpo.trainer.signal import signal_metrics
from hmpo.types import Event


class Steering:
    """Chooses a run's prompts, and sets what its controllers decide.

    Without controllers it hands out the task's prompts in order and changes nothing.

    Args:
        config: the run.
        trainer: that of the run; only a `PowerMeanTrainer` can be steered.
        task: of the configured level, the top of a curriculum.
    """

    def __init__(self, config: RunConfig, trainer: Any, task: Task) -> None:
        self.config, self.trainer, self.task = config, trainer, task
        self.control: Control | None = None
        self.levels: dict[int, Task] = {task.level: task}
        self.level: int | None = None
        """Level that is trained; None without a curriculum."""
        self.drawn = 0
        """Prompts handed out so far."""
        self.prompts = config.prompts_per_rollout
        """Prompts of the next rollout."""
        self.records = PromptRecords(config, task) if config.batch.records_prompts else None
        """Of each prompt, where they are kept."""
        trainer.notes_tokens = config.batch.describe
        self._asked: list[int | None] = []
        """Levels of the prompts of this rollout, in the order in which they were drawn."""
        settings = config.agm
        if settings.mode == "off" or "level" not in settings.controls:
            return
        require(task.levels > 1, "agm.controls", "level", "a task with levels")
        if settings.mode == "apply":
            first = settings.first_level
            require(first <= task.level, "agm.first_level", first, f"at most {task.level}")
            self.level = first
            for level in range(1, task.level):
                easier = dataclasses.replace(config.task, level=level)
                self.levels[level] = make_task(easier, config.seed)
        else:
            self.level = task.level

    def start(self, head: Mapping[str, Any]) -> None:
        """Make the controllers of the run that this `run` record is of."""
        if self.config.agm.mode == "off":
            return
        weight = None
        if isinstance(self.trainer, PowerMeanTrainer):
            objective = self.trainer.objective
            weight = objective.ahm_weight if objective.mean == "ahm" else None
        self.control = Control(self.config.agm, head, weight=weight)

    @property
    def base(self) -> dict[str, int]:
        """What a curriculum adds to the base values of the `run` record: its top level."""
        return {} if self.level is None else {"level": self.task.level}

    @property
    def stopped(self) -> str | None:
        """Why the controllers ended the run; None while it goes on."""
        return None if self.control is None else self.control.stopped

    # ----------------------------------------------------------------------------- the prompts

    def examples(self) -> list[Example]:
        """Prompts of the next rollout, those of the level below last."""
        self._asked = []
        if self.records is not None:
            self.records.begin()
        return self._next(self.prompts, self._own_prompts())

    def refill(self, between: Callable[[], object]) -> Refill | None:
        """What replaces prompts without a signal, by others of the present level; None for nothing.

        Args:
            between: called before each further attempt; may raise to leave the rollout.
        """
        if not self.config.batch.filter_groups:
            return None

        def draw(count: int) -> tuple[list[Any], Mapping[str, list[Any]]]:
            between()
            examples = self._next(count, count)
            return [example.prompt for example in examples], gather_columns(examples)

        return Refill(draw=draw, settings=self.config.batch)

    def _next(self, count: int, own: int) -> list[Example]:
        """The next prompts, the first `own` of them of the present level, the others of that below.

        What was drawn counts for good: prompts that were replaced do not come again soon.
        """
        found = []
        for i in range(count):
            level = self.level if self.level is None or i < own else self.level - 1
            task = self.task if level is None else self.levels[level]
            self._asked.append(level)
            if self.records is None:
                found.append(task.train(self.drawn))
                self.drawn += 1
                continue
            example, self.drawn = self.records.next(self.drawn, self.trainer.rollouts)
            found.append(example)
        return found

    def note_rollout(self) -> None:
        """Count successes at the present level alone: those of an easier one are no evidence."""
        if self.records is not None:
            self.records.note(self.trainer.samples, self.trainer.rollouts - 1)
            self.trainer.rollout_metrics |= self.records.metrics()
        if self.config.batch.describe:
            settings, trainer = self.config.batch, self.trainer
            alive = judged(trainer.samples, settings, self.config.trainer).alive
            trainer.rollout_metrics |= signal_metrics(trainer.batch, alive)
        if self.level is None:
            return
        group, asked = self.config.trainer.group_size, self._asked
        rows = [
            row for i, row in enumerate(self.trainer.samples) if asked[i // group] == self.level
        ]
        rewards = [row["reward"] for row in rows if row["reward"] == row["reward"]]
        self.trainer.rollout_metrics |= {
            "curriculum/level": self.level,
            "success/k": sum(reward >= self.config.eval.success for reward in rewards),
            "success/n": len(rewards),
        }

    def _own_prompts(self) -> int:
        """Prompts of a rollout that are of the present level itself."""
        if self.level is None or self.level == 1 or self.config.agm.mode != "apply":
            return self.prompts
        below = round(self.config.agm.curriculum.mix_previous * self.prompts)
        return max(1, self.prompts - below)

    # --------------------------------------------------------------------------- the decisions

    def observe(self, record: Mapping[str, Any]) -> dict[str, Any] | None:
        """Ask the controllers about a record of the log, and set what they change.

        Returns:
            The decision's record; None without controllers.
        """
        if self.control is None:
            return None
        action = self.control.observe(record)
        if action.changes:
            self._set(action.changes, action.record)
            self._tell(action.changes, action.record)
        return action.record

    def _set(self, changes: Mapping[str, Any], decided: Mapping[str, Any]) -> None:
        if "lr" in changes:
            self.trainer.lr_scale = changes["lr"]
        objective = {name: changes[name] for name in ("p", "weight", "clip") if name in changes}
        if objective:
            self.trainer.in_force.set(**objective)
        if "batch" in changes:
            self.prompts = int(decided["decision/batch"]) // self.config.trainer.group_size
        if "level" in changes:
            self.level = int(changes["level"])

    def _tell(self, changes: Mapping[str, Any], decided: Mapping[str, Any]) -> None:
        """Events of what a reader of the log would look for."""
        step, reason = decided["step"], decided["reason"]
        told = []
        if "level" in changes:
            told.append(("curriculum_changed", {"level": changes["level"]}))
        if decided.get("decision/action") == "rollback":
            told.append(("rollback", {"lr_mult": decided.get("decision/lr_mult")}))
        if "stop" in changes:
            told.append(("early_stop", {"stop": changes["stop"]}))
        for name, data in told:
            self.trainer.events.append(Event(name=name, step=step, data=data | {"reason": reason}))

    # ------------------------------------------------------------------------------- the state

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-identical continuation needs, as plain values."""
        state = {
            "drawn": self.drawn,
            "prompts": self.prompts,
            "level": self.level,
            "control": None if self.control is None else self.control.state_dict(),
        }
        return state if self.records is None else state | {"records": self.records.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken, with what was set set again.

        Raises:
            CheckpointError: the run has controllers, and the state none of theirs.
        """
        self.drawn, self.prompts, self.level = state["drawn"], state["prompts"], state["level"]
        if self.records is not None:
            self.records.load_state_dict(state["records"])
        if self.control is None:
            return
        if state["control"] is None:
            raise CheckpointError(
                "the checkpoint holds no state of controllers; resume with agm.mode = 'off'"
            )
        self.control.load_state_dict(state["control"])
        if self.config.agm.mode != "apply":
            return
        force = self.control.force
        self.trainer.lr_scale = force["lr"]
        weight = float(force["weight"]) if "weight" in force else None
        self.trainer.in_force.set(clip=force["clip"], weight=weight)  # p is in the trainer's state
