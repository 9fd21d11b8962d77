"""The adaptive controllers inside TRL: a callback that decides after every optimizer step.

The learning rate of TRL's schedule is multiplied by the factor in force, for schedules that do
not build on the rate of the step before, which all of transformers' but reduce_lr_on_plateau are.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hmpo.adapters.trl.trainer import PowerMeanGRPOTrainer
from hmpo.agm.control import Control
from hmpo.config.control import ControlConfig
from hmpo.errors import CheckpointError, require
from hmpo.telemetry.records import step_record

STATE_FILE = "hmpo_agm.json"
"""In a checkpoint folder: the state of the controllers."""
CONTROLS = ("lr", "p", "stop")
"""What can be set inside TRL."""
UNREAD = {
    "uncertainty": "TRL logs no variance of the rewards within a group",
    "gating": "TRL logs no variance of the rewards within a group",
    "first_level": "TRL's prompts have no levels",
    "stop.target": "TRL's evaluations do not reach the controllers",
    "stop.min_delta_sd": "TRL's evaluations do not reach the controllers",
    "stop.min_steps": "TRL's evaluations do not reach the controllers",
    "stop.halflife": "TRL's evaluations do not reach the controllers",
    "stop.mode": "TRL's evaluations do not reach the controllers",
}
"""Tables and settings of the controllers that nothing reads inside TRL, and why."""


class AGMCallback(TrainerCallback):
    """Runs the controllers on a `PowerMeanGRPOTrainer`, by its telemetry records.

    Decisions go to `output_dir/telemetry.jsonl`. A checkpoint holds the controllers' state.

    Args:
        trainer: the trainer that this is a callback of.
        config: settings; under `apply` the controls may be lr, p (with `exponent="controller"`)
            and stop.

    Raises:
        ConfigError: controls that cannot be set inside TRL, or settings that nothing reads there.

    Example:
        trainer = PowerMeanGRPOTrainer(model, reward_fn, args=args, train_dataset=dataset)
        trainer.add_callback(AGMCallback(trainer, ControlConfig(mode="apply")))
        trainer.train()
    """

    def __init__(self, trainer: PowerMeanGRPOTrainer, config: ControlConfig) -> None:
        foreign = [name for name in config.controls if name not in CONTROLS]
        able = config.mode != "apply" or not foreign
        require(able, "agm.controls", foreign, f"some of {', '.join(CONTROLS)} inside TRL")
        _refuse_unread(config, ControlConfig(), "")
        config.check("power_mean", trainer.args.resolved_objective)
        schedule = getattr(trainer.args.lr_scheduler_type, "value", trainer.args.lr_scheduler_type)
        steers = config.mode == "apply" and "lr" in config.controls
        fits = not (steers and schedule == "reduce_lr_on_plateau")
        require(fits, "lr_scheduler_type", schedule, 'another with "lr" among agm.controls')
        self.trainer, self.config = trainer, config
        self.control: Control | None = None
        trainer.save_with.append(self.save)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the controllers, or load those of the checkpoint that training goes on from."""
        if self.config.mode == "off":
            return
        self.control = Control(self.config, self.trainer.telemetry.header(args))
        if self.trainer.resumed_from is None:
            return
        path = Path(self.trainer.resumed_from) / STATE_FILE
        if not path.is_file():
            raise CheckpointError(
                f"{path}: missing, expected the state of the controllers; resume from a checkpoint "
                "of a run with this callback, or without it"
            )
        self.control.load_state_dict(json.loads(path.read_bytes()))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Decide on the update just done, log it, and set what it changes."""
        if self.control is None:
            return control
        log = self.trainer.telemetry
        action = self.control.observe(step_record(log.run_id, self.trainer.last_record))
        if log.sink is not None:
            log.sink.write(action.record)
        if "p" in action.changes:
            self.trainer.in_force.set(p=float(action.changes["p"]))
        if self.config.mode == "apply" and "lr" in self.config.controls:
            factor = float(self.control.force["lr"])
            groups = kwargs["optimizer"].param_groups
            for group, lr in zip(groups, kwargs["lr_scheduler"].get_last_lr(), strict=True):
                group["lr"] = lr * factor
        if self.control.stopped is not None:
            control.should_training_stop = True
        return control

    def save(self, folder: Path) -> None:
        """Put the controllers' state into a new checkpoint folder, beside TRL's own."""
        if self.control is None:
            return
        text = json.dumps(self.control.state_dict(), sort_keys=True)
        (folder / STATE_FILE).write_text(text, encoding="utf-8")


def _refuse_unread(config: Any, plain: Any, path: str, why: str | None = None) -> None:
    """Refuse settings of `UNREAD` that differ from the defaults."""
    for field in dataclasses.fields(config):
        name = f"{path}{field.name}"
        value, default = getattr(config, field.name), getattr(plain, field.name)
        reason = UNREAD.get(name, why)
        if dataclasses.is_dataclass(value):
            _refuse_unread(value, default, f"{name}.", reason)
        elif reason is not None:
            require(value == default, f"agm.{name}", value, f"{default!r} inside TRL: {reason}")
