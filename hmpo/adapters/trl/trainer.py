"""Any member of the power-mean family inside TRL's `GRPOTrainer`, without a copy of its loss.

TRL's loss reads per-token advantages. While it computes its own log-probs we put the advantages
there whose token sums have our gradient (`hmpo.adapters.surrogate`) and take its ratio to 1, so
that generation, rewards, KL, entropy bonus, masks, vLLM's correction, denominators and gradient
accumulation remain TRL's. Only the value that TRL prints as the loss is not the objective's; that
one is logged as `pg_loss`.
"""

import dataclasses
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hmpo.errors import ConfigError, MissingDependencyError, require

try:
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import TrainerCallback
    from trl import GRPOTrainer
except ImportError as error:
    raise MissingDependencyError(
        f"hmpo.adapters.trl needs TRL ({error}): pip install 'hmpo[trl]'"
    ) from error

from hmpo.adapters.surrogate import surrogate_advantages
from hmpo.adapters.trl.card import describe, paper_of
from hmpo.adapters.trl.config import PowerMeanGRPOConfig
from hmpo.adapters.trl.finite import finite_norm, near_old_logprobs, refuse_bad_tokens
from hmpo.adapters.trl.log import Rows, TelemetryLog, gather_rows, join_rows, rollout_metrics
from hmpo.adapters.trl.state import load_state, save_state
from hmpo.objective.exponent import exponent_source
from hmpo.objective.in_force import ObjectiveInForce
from hmpo.objective.metrics import objective_metrics
from hmpo.optim import MuonClipConfig, with_qk_clip
from hmpo.optim.state import clip_metrics
from hmpo.types import Metrics

logger = logging.getLogger(__name__)

__all__ = ["PowerMeanGRPOConfig", "PowerMeanGRPOTrainer"]

_OF_THE_SURROGATE = ("clip_ratio/", "policy_loss")
"""TRL's metrics of its own clip, which is open, and of a loss of which only the gradient counts."""


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

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: Any = None, *more: Any, **options: Any
    ) -> None:
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
        self._in_force: ObjectiveInForce | None = None
        self.save_with: list[Callable[[Path], None]] = []
        """Called with each new checkpoint folder before TRL may push it."""
        self._forget()
        super().__init__(model, reward_funcs, args, *more, **options)
        # The objective's own means and bounds stand in the advantages; of TRL's loss there remain
        # the denominator and a ratio without bounds.
        self.loss_type, self._factor = args.host_loss
        self.beta *= self._factor
        self.importance_sampling_level = "token"
        self.epsilon_low = self.epsilon_high = float("inf")
        objective = args.resolved_objective
        self._name = f"the power-mean objective {describe(objective)} of hmpo"
        self._paper = paper_of(objective)
        self.telemetry = TelemetryLog(args)
        self.add_callback(_AfterStep(self))
        if args.telemetry:
            self.add_callback(self.telemetry)

    def train(self, *args: Any, **options: Any) -> Any:
        """TRL's training, begun without anything left over from one before it.

        Weights, optimizer and what the objective has learned stay, as in TRL. However it ends, the
        log says so.
        """
        self._forget()
        self.telemetry.resume_at = None
        self._step, self._buffered_inputs, self._current_train_step_time = 0, None, 0.0
        for pending in (self._metrics["train"], self._pending_metrics, self._pending_extra_logs):
            pending.clear()
        if self.use_vllm:
            self._last_loaded_step = -1
        if self._in_force is not None and self._in_force.calibration.scale is None:
            self._in_force.calibration.scales.clear()
        try:
            return super().train(*args, **options)
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt)
            self.telemetry.end(self.state.global_step, "interrupted" if stopped else "failed")
            raise

    def _forget(self) -> None:
        """Start without micro-batches, rollouts and a record."""
        self._window: list[Rows] = []
        self._window_tokens: Tensor | None = None
        self._losses: list[Tensor] = []
        self._grad_norm: Tensor | float | None = None
        self._rollout: Metrics = {}
        self._rollouts = self._staleness = 0
        self.last_record: Metrics = {}
        self.resumed_from: str | None = None
        """Checkpoint folder that training goes on from."""

    # ---------------------------------------------------------------------------- the objective

    @property
    def in_force(self) -> ObjectiveInForce:
        """The objective as it stands; a schedule has the length of the training that goes on."""
        objective, device = self.args.resolved_objective, self.accelerator.device
        updates = self.state.max_steps or None  # before the first training nobody knows
        per = self.args.updates_per_rollout
        if self._in_force is None:
            self._in_force = ObjectiveInForce(objective, device, updates or 2 * per, per)
            self._updates = updates
        elif updates != self._updates and objective.exponent.kind == "linear":
            self._in_force.source = exponent_source(objective, device, updates, per)
            self._updates = updates
        return self._in_force

    @property
    def _update(self) -> int:
        """The update whose exponent is in force: this one, or the first of the generation in use.

        A training that goes on from within a generation samples anew, so that the number of an
        update does not tell which generation it is of.
        """
        held = self.in_force.source.objective.exponent.per == "rollout"
        return self.state.global_step - (self._staleness if held else 0)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss on a copy of `inputs`, which it uses again in later iterations."""
        training = self.model.training
        given = dict(inputs)
        if training:
            self._count_window(given)
        self._loss_inputs = given
        try:
            loss = super()._compute_loss(model, given)
        finally:
            self._loss_inputs = None
        buffers = self._metrics["train" if training else "eval"]
        for name in [name for name in buffers if name.startswith(_OF_THE_SURROGATE)]:
            del buffers[name]
        if training:
            self._losses.append(loss.detach())
        return loss

    def _count_window(self, inputs: dict[str, Any]) -> None:
        """Have TRL's token mean divide by the tokens of this accumulation window.

        TRL divides by the mean over the micro-batches of a generation, which differs where one
        generation serves several windows.
        """
        steps, parts = self.args.steps_per_generation or 1, self.current_gradient_accumulation_steps
        if self.loss_type != "dapo" or steps == parts or self._buffered_inputs is None:
            return
        if not self._window:
            chosen = [self._buffered_inputs[(self._step + part) % steps] for part in range(parts)]
            count = torch.stack([_counted(batch).sum() for batch in chosen]).sum()
            self._window_tokens = self.accelerator.reduce(count, reduction="sum")
        assert self._window_tokens is not None
        inputs["num_items_in_batch"] = self._window_tokens * steps / parts

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **options: Any) -> Any:
        """TRL's log-probs; inside the loss they also decide the per-token advantages."""
        output = super()._get_per_token_logps_and_entropies(model, *args, **options)
        if self._loss_inputs is not None:
            self._weigh(self._loss_inputs, output[0].detach(), output[1].detach())
        return output

    def _weigh(self, inputs: dict[str, Any], logprobs: Tensor, entropy: Tensor) -> None:
        """Put our per-token advantages in place of TRL's per-response ones."""
        old = inputs.get("old_per_token_logps")
        rows = Rows(
            logprobs=logprobs,
            old_logprobs=logprobs if old is None else old,
            mask=_counted(inputs),
            advantages=inputs["advantages"],
            entropy=entropy,
            ref_logprobs=inputs.get("ref_per_token_logps"),
        )
        objective, exponent = self.in_force.at(self._update)
        weights = surrogate_advantages(
            rows.logprobs, rows.old_logprobs, rows.mask, rows.advantages, objective, exponent
        )
        too_far = torch.zeros_like(rows.mask)
        inputs.setdefault("sampling_per_token_logps", rows.old_logprobs)  # for the off-policy mask
        if self.beta == 0 or not self.args.use_bias_correction_kl:
            inputs["old_per_token_logps"] = logprobs  # a ratio of exactly 1 cannot overflow
        else:  # TRL weighs the KL term by the true ratio
            inputs["old_per_token_logps"], too_far = near_old_logprobs(rows)
            weights = weights * torch.exp(inputs["old_per_token_logps"] - logprobs)
        weights = self._factor * weights
        unknown = rows.mask & (rows.logprobs - rows.old_logprobs).isnan()  # a clip may hide it
        bad = ~weights.isfinite() | too_far | unknown
        refuse_bad_tokens(bad, rows, self.state.global_step, self.accelerator)
        inputs["advantages"] = weights
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
        objective, exponent = self.in_force.at(self._update)
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
                update=self._update,
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
        """The host's; its result is logged.

        Raises:
            NonFiniteError: it is NaN or infinite; the weights are as they were.
        """
        self._grad_norm = super()._clip_grad_norm(model)
        return self._finite_norm(self._grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The host's, also where nothing is clipped.

        Raises:
            NonFiniteError: it is NaN or infinite; the weights are as they were.
        """
        return self._finite_norm(super()._get_grad_norm(model, grad_norm=grad_norm))

    def _finite_norm(self, norm: Any) -> Any:
        """The norm, if the step that follows may be taken; a loss scaler skips steps by itself."""
        scaled = self.accelerator.mixed_precision == "fp16" or self.is_deepspeed_enabled
        return norm if scaled else finite_norm(norm, self.state.global_step)

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
            ConfigError: `qk_clip` with weights that have no rows of heads: FSDP1, DeepSpeed.
        """
        optimizer = super().create_optimizer(*args, **options)
        if self.args.qk_clip:
            plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
            flat = self.is_fsdp_enabled and getattr(plugin, "fsdp_version", 1) != 2
            expected = (
                "False with FSDP1 and DeepSpeed, which flatten weights; FSDP2 and DDP keep them"
            )
            require(not (flat or self.is_deepspeed_enabled), "qk_clip", True, expected)
            config = MuonClipConfig(max_qk_score=self.args.max_qk_score)
            with_qk_clip(self._bare_optimizer, self.model, config)
        return optimizer

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The host's checkpoint, with what the exponent has learned; the host pushes it last."""
        step = self.state.global_step
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{step}"
            folder.mkdir(parents=True, exist_ok=True)
            objective = self.args.resolved_objective
            save_state(folder, step, objective, self.in_force, self.telemetry, self._rollouts)
            for save in self.save_with:
                save(folder)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The host's state, and ours.

        Raises:
            CheckpointError: the objective has a state and the checkpoint none of it, or another.
        """
        super()._load_optimizer_and_scheduler(checkpoint)
        self.resumed_from = checkpoint
        if checkpoint is not None:
            objective = self.args.resolved_objective
            self._rollouts = load_state(Path(checkpoint), objective, self.in_force, self.telemetry)


def _counted(inputs: dict[str, Any]) -> Tensor:
    """Mask (N, T) of the tokens that TRL's loss counts."""
    mask = inputs["completion_mask"].bool()
    return mask & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask


class _AfterStep(TrainerCallback):
    """Calls the trainer between an optimizer's step and the next batch."""

    def __init__(self, trainer: PowerMeanGRPOTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.after_optimizer_step()
