"""One batch of a TRL training on the disk: what the loss saw at an update, for the probe.

    record_batch(trainer, "batch.safetensors", update=15)
    trainer.train()                        then: hmpo experiment probe batch.safetensors

Works for TRL's own `GRPOTrainer` as for `PowerMeanGRPOTrainer`: the trainer's loss and log-probs
are listened to, and run as before.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from hmpo.adapters.trl.log import Rows, gather_rows, join_rows
from hmpo.checkpoint import RecordedBatch, write_batch
from hmpo.errors import ConfigError, require

HEARD = (
    "_compute_loss",
    "_get_per_token_logps_and_entropies",
    "_generate_and_score_completions",
)
"""What is listened to."""


def record_batch(trainer: Any, path: Path | str, *, update: int | None = None) -> "BatchRecorder":
    """Have a trainer write one update's batch to a file as soon as it is done.

    Args:
        trainer: a TRL `GRPOTrainer`, or one of its children that keeps its `_compute_loss`.
        path: file; replaced if it is there.
        update: 0-based optimizer update of the run; None writes the last update of each
            generation, which is the stalest, anew each time, so that the newest one stays.

    Returns:
        The recorder, a callback of the trainer; `written` is None until there is a file.

    Raises:
        ConfigError: a negative `update`, or a trainer that computes its loss by other means.
    """
    require(update is None or update >= 0, "update", update, "an integer >= 0, or None")
    for name in HEARD:
        if not callable(getattr(trainer, name, None)):
            raise ConfigError(
                f"trainer: got {type(trainer).__name__} without {name}, expected a GRPOTrainer of "
                "TRL 1"
            )
    fused = bool(getattr(trainer, "use_liger_kernel", False))  # of older TRLs
    require(not fused, "use_liger_kernel", fused, "False: a fused loss has no log-probs to record")
    recorder = BatchRecorder(trainer, Path(path), update)
    trainer.add_callback(recorder)
    return recorder


class BatchRecorder(TrainerCallback):
    """Listens to a trainer's loss and writes what it saw; made by `record_batch`."""

    def __init__(self, trainer: Any, path: Path, update: int | None) -> None:
        self.trainer, self.path, self.update = trainer, path, update
        self.written: int | None = None
        """The update that the file is of."""
        self._inputs: dict[str, Any] | None = None
        self._window: list[Rows] = []
        self._generated_at = 0
        self._loss, self._logprobs, self._generated = (getattr(trainer, name) for name in HEARD)
        own = (self._compute_loss, self._get_logprobs, self._generate)
        for name, method in zip(HEARD, own, strict=True):
            setattr(trainer, name, method)

    @property
    def updates_per_generation(self) -> int:
        """Optimizer updates that one generation serves."""
        args = self.trainer.args
        steps = args.steps_per_generation or args.gradient_accumulation_steps
        return max(1, steps * args.num_iterations // args.gradient_accumulation_steps)

    @property
    def staleness(self) -> int:
        """Updates between the policy that generated and the present one."""
        return self.trainer.state.global_step - self._generated_at

    @property
    def due(self) -> bool:
        """Whether the present update is to be written."""
        if self.update is None:
            return self.staleness == self.updates_per_generation - 1
        return self.trainer.state.global_step == self.update

    def _generate(self, *args: Any, **options: Any) -> Any:
        """The trainer's; a training that goes on within a generation generates anew."""
        if self.trainer.model.training:
            self._generated_at = self.trainer.state.global_step
        return self._generated(*args, **options)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """The trainer's, with its inputs noted before anything changes them."""
        if not (self.trainer.model.training and self.due):
            return self._loss(model, inputs)
        self._inputs = dict(inputs)
        try:
            return self._loss(model, inputs)
        finally:
            self._inputs = None

    def _get_logprobs(self, *args: Any, **options: Any) -> Any:
        """The trainer's; inside of the loss they are what is recorded."""
        output = self._logprobs(*args, **options)
        inputs, self._inputs = self._inputs, None  # the first call inside is that of the policy
        if inputs is not None:
            new = output[0].detach()
            old = inputs.get("old_per_token_logps")
            mask = inputs["completion_mask"].bool()
            if "tool_mask" in inputs:
                mask = mask & inputs["tool_mask"].bool()
            rows = Rows(
                logprobs=new,
                old_logprobs=new if old is None else old.detach(),
                mask=mask,
                advantages=inputs["advantages"].detach(),
                entropy=torch.zeros_like(new),
            )
            self._window.append(rows)
        return output

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the update that was just taken, on the first process."""
        window, self._window = self._window, []
        if not window:
            return
        rows = gather_rows(join_rows(window), self.trainer.accelerator)
        self.written = state.global_step
        if not self.trainer.accelerator.is_main_process:
            return
        facts = {
            "source": f"TRL {type(self.trainer).__name__}",
            "update": state.global_step,
            "updates": state.max_steps,
            "updates_per_rollout": self.updates_per_generation,
            "staleness": self.staleness,
            "lr": float(self.trainer.optimizer.param_groups[0]["lr"]),
        }
        batch = RecordedBatch(
            logprobs=rows.logprobs.cpu(),
            old_logprobs=rows.old_logprobs.cpu(),
            mask=rows.mask.cpu(),
            advantages=rows.advantages.cpu(),
            facts=facts,
        )
        write_batch(self.path, batch)
