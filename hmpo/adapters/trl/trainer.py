"""Any member of the power-mean family inside TRL's `GRPOTrainer`, without a copy of its loss.

TRL's loss reads per-token advantages. While it computes its own log-probs we put the advantages
there whose token sums have our gradient (`hmpo.adapters.surrogate`) and take its ratio to 1, so
that generation, rewards, KL, entropy bonus, masks, vLLM's correction, denominators and gradient
accumulation remain TRL's. Only the value that TRL prints as the loss is not the objective's; that
one is logged as `pg_loss`.
"""

import dataclasses
import functools
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hmpo.errors import (
    CheckpointError,
    ConfigError,
    MissingDependencyError,
    NonFiniteError,
    require,
)

try:
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import TrainerCallback
    from trl import GRPOTrainer
except ImportError as error:
    raise MissingDependencyError(
        f"hmpo.adapters.trl needs TRL ({error}): pip install 'hmpo[trl]'"
    ) from error

from hmpo.adapters.surrogate import surrogate_advantages
from hmpo.adapters.trl.config import PowerMeanGRPOConfig
from hmpo.adapters.trl.log import Rows, TelemetryLog, gather_rows, join_rows, rollout_metrics
from hmpo.checkpoint import load_checkpoint, save_checkpoint
from hmpo.objective.in_force import ObjectiveInForce
from hmpo.objective.metrics import objective_metrics
from hmpo.optim import MuonClipConfig, with_qk_clip
from hmpo.optim.state import clip_metrics
from hmpo.types import Metrics

logger = logging.getLogger(__name__)

__all__ = ["PowerMeanGRPOConfig", "PowerMeanGRPOTrainer"]

STATE_FOLDER = "hmpo"
"""In a checkpoint folder: what the exponent has learned, and the length of the log."""


class PowerMeanGRPOTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer` with an objective of the power-mean family.

    Takes the arguments of `GRPOTrainer`, with a `PowerMeanGRPOConfig` as `args`.

    Raises:
        ConfigError: `args` is no `PowerMeanGRPOConfig`.

    A callback may read `last_record` from `on_step_end` on: the telemetry of the update just done.

    Example:
        args = PowerMeanGRPOConfig("out", objective="hmpo", num_iterations=2)
        trainer = PowerMeanGRPOTrainer(model, reward_fn, args=args, train_dataset=dataset)
        trainer.train()
    """

    _tag_names = ["trl", "grpo", "hmpo"]  # noqa: RUF012

    args: PowerMeanGRPOConfig  # type: ignore[bad-override-mutable-attribute]
    model: Any

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, **more: Any) -> None:
        if args is None:
            args = PowerMeanGRPOConfig("trainer_output")
        if not isinstance(args, PowerMeanGRPOConfig):
            expected = "a PowerMeanGRPOConfig"
            raise ConfigError(f"args: got {type(args).__name__}, expected {expected}")
        if args.updates_per_generation <= 1:
            warnings.warn(
                "one update per generation (num_iterations = 1, and steps_per_generation no more "
                "than gradient_accumulation_steps): every importance ratio is 1, so the exponent p "
                "and the clip have no effect; raise num_iterations or steps_per_generation",
                stacklevel=2,
            )
        self._loss_inputs: dict[str, Any] | None = None
        self._window: list[Rows] = []
        self._losses: list[Tensor] = []
        self._grad_norm: Tensor | float | None = None
        self._rollout: Metrics = {}
        self._rollouts = self._staleness = 0
        self.last_record: Metrics = {}
        self.resumed_from: str | None = None
        """Checkpoint folder that training goes on from."""
        super().__init__(model, reward_funcs, args=args, **more)
        # The objective's own means and bounds stand in the advantages; of TRL's loss there remain
        # the denominator and a ratio without bounds.
        self.loss_type, self._factor = args.host_loss
        self.beta *= self._factor
        self.importance_sampling_level = "token"
        self.epsilon_low = self.epsilon_high = float("inf")
        self.telemetry = TelemetryLog(args)
        self.add_callback(_AfterStep(self))
        if args.telemetry:
            self.add_callback(self.telemetry)

    # ---------------------------------------------------------------------------- the objective

    @functools.cached_property
    def in_force(self) -> ObjectiveInForce:
        """The objective as it stands; made when training starts, as a schedule needs its length."""
        device = self.accelerator.device
        return ObjectiveInForce(self.args.resolved_objective, device, self.state.max_steps or None)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss on a copy of `inputs`, which it uses again in later iterations."""
        self._loss_inputs = dict(inputs)
        loss = super()._compute_loss(model, self._loss_inputs)
        self._loss_inputs = None
        if self.model.training:
            self._losses.append(loss.detach())
        return loss

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **options: Any) -> Any:
        """TRL's log-probs; inside the loss they also decide the per-token advantages."""
        output = super()._get_per_token_logps_and_entropies(model, *args, **options)
        if self._loss_inputs is not None:
            self._weigh(self._loss_inputs, output[0].detach(), output[1].detach())
        return output

    def _weigh(self, inputs: dict[str, Any], logprobs: Tensor, entropy: Tensor) -> None:
        """Put our per-token advantages in place of TRL's per-response ones."""
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        old = inputs.get("old_per_token_logps")
        rows = Rows(
            logprobs=logprobs,
            old_logprobs=logprobs if old is None else old,
            mask=mask,
            advantages=inputs["advantages"],
            entropy=entropy,
            ref_logprobs=inputs.get("ref_per_token_logps"),
        )
        objective, exponent = self.in_force.at(self.state.global_step)
        weights = surrogate_advantages(
            rows.logprobs, rows.old_logprobs, rows.mask, rows.advantages, objective, exponent
        )
        if not bool(weights.isfinite().all()):
            row, token = (~weights.isfinite()).nonzero()[0].tolist()
            raise NonFiniteError(
                f"update {self.state.global_step}: the gradient of response {row} is not finite "
                f"(token {token}): log-prob {logprobs[row, token]:g}, before "
                f"{rows.old_logprobs[row, token]:g}, advantage {rows.advantages[row]:g}; resume "
                "from the last checkpoint with a lower learning rate"
            )
        if self.beta == 0:
            # A ratio of exactly 1 cannot overflow; the off-policy mask keeps the true distance.
            inputs.setdefault("sampling_per_token_logps", rows.old_logprobs)
            inputs["old_per_token_logps"] = logprobs
        else:  # TRL may weigh the KL term by the true ratio
            weights = weights * torch.exp(rows.old_logprobs - logprobs)
        inputs["advantages"] = self._factor * weights
        if self.model.training:
            self._window.append(rows)

    def _calculate_rewards(self, *args: Any, **options: Any) -> Tensor:
        """TRL's rewards, of which a reward-adaptive exponent takes note."""
        rewards = super()._calculate_rewards(*args, **options)
        if self.model.training:
            self._rollouts, self._staleness = self._rollouts + 1, 0
            scored = ~rewards.isnan().all(1)
            total = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
            self.in_force.observe(total[scored])
        return rewards

    # ------------------------------------------------------------------- after an optimizer step

    def after_optimizer_step(self) -> None:
        """Measure the update, let a learnable exponent follow it, and log both."""
        rows = gather_rows(join_rows(self._window), self.accelerator)
        self._window = []
        objective, exponent = self.in_force.at(self.state.global_step)
        measured = objective_metrics(
            rows.logprobs,
            rows.old_logprobs,
            rows.mask,
            rows.advantages,
            dataclasses.replace(objective, kl_coef=0.0),
            ref_logprobs=rows.ref_logprobs,
            exponent=exponent,
        )
        metrics: Metrics = {name: float(value) for name, value in measured.items()}
        if self.beta != 0:
            metrics.pop("kl_loss", None)  # TRL's term, in TRL's log; absent where no row counts
        tokens = max(1, int(rows.mask.sum()))
        metrics["entropy"] = float((rows.entropy * rows.mask).sum(dtype=torch.float64)) / tokens
        skipped = bool(self.accelerator.optimizer_step_was_skipped)
        if not skipped:
            learned, _ = self.in_force.follow(
                rows.logprobs,
                rows.old_logprobs,
                rows.mask,
                rows.advantages,
                update=self.state.global_step,
                rollout=self._rollouts - 1,
                staleness=self._staleness,
            )
            metrics |= learned
            metrics |= clip_metrics(self._bare_optimizer) if self.args.qk_clip else {}
        self._log_update(metrics, skipped)
        self._staleness += 1

    def _log_update(self, metrics: Metrics, skipped: bool) -> None:
        """Hand the numbers of one update to TRL's log and to ours."""
        buffers = self._metrics["train"]
        for name in [name for name in buffers if name.startswith("clip_ratio/")]:
            del buffers[name]  # of TRL's own clip, which is open: clip/* says what ours does
        self._rollout |= rollout_metrics(buffers)
        self.last_record = {
            "step": self.state.global_step,
            "rollout": max(0, self._rollouts - 1),
            "staleness": self._staleness,
            "loss": float(self.accelerator.gather(torch.stack(self._losses).sum()).mean()),
            "lr": self._bare_optimizer.param_groups[0]["lr"],
            "update_skipped": skipped,
            "nonfinite": int(skipped),
            **self._rollout,
            **metrics,
        }
        if self._grad_norm is not None:
            self.last_record["grad_norm"] = float(self._grad_norm)
        self._losses = []
        for name, value in metrics.items():
            if name != "entropy":  # TRL logs it under the same name
                buffers[name].append(float(value))
        self.telemetry.write(self.last_record)

    def _clip_grad_norm(self, model: Any) -> Any:
        """The host's; its result is logged."""
        self._grad_norm = super()._clip_grad_norm(model)
        return self._grad_norm

    # ------------------------------------------------------------------------ optimizer and state

    @property
    def _bare_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer itself, without accelerate around it."""
        optimizer = self.optimizer
        if isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        assert optimizer is not None, "the host makes it before the first update"
        return optimizer

    def create_optimizer(self, *args: Any, **options: Any) -> torch.optim.Optimizer:
        """The host's, with QK-clip after each of its steps.

        Raises:
            ConfigError: `qk_clip` with weights or readings spread over processes.
        """
        optimizer = super().create_optimizer(*args, **options)
        if self.args.qk_clip:
            spread = self.accelerator.num_processes > 1
            spread = spread or self.is_fsdp_enabled or self.is_deepspeed_enabled
            require(not spread, "qk_clip", True, "False: it does not yet work across processes")
            config = MuonClipConfig(max_qk_score=self.args.max_qk_score)
            with_qk_clip(self._bare_optimizer, self.model, config)
        return optimizer

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The host's checkpoint, with what the exponent has learned."""
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial))
            state = {
                **self.in_force.state_dict(),
                "rollouts": self._rollouts,
                "telemetry": self.telemetry.offset(),
            }
            step = self.state.global_step
            save_checkpoint(folder / f"checkpoint-{step}" / STATE_FOLDER, step, state, keep=1)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The host's state, and ours.

        Raises:
            CheckpointError: the exponent has a state, and the checkpoint none of it.
        """
        super()._load_optimizer_and_scheduler(checkpoint)
        self.resumed_from = checkpoint
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE_FOLDER
        saved = load_checkpoint(path)
        if saved is not None:
            state = saved.state
            self.in_force.load_state_dict(state)
            self._rollouts = state["rollouts"]
            self.telemetry.resume_at = state["telemetry"]
        elif self.in_force.state_dict()["exponent"]:
            raise CheckpointError(
                f"{path}: missing, expected the state of the exponent; resume from a checkpoint of "
                "PowerMeanGRPOTrainer"
            )


class _AfterStep(TrainerCallback):
    """Calls the trainer between an optimizer's step and the next batch."""

    def __init__(self, trainer: PowerMeanGRPOTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.after_optimizer_step()
