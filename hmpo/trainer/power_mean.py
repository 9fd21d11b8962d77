"""The trainer of the whole family: one rollout, then every optimizer update it serves.

`update_step` is the algorithm in flow order. `begin_rollout` and `next_update` are its two
halves, so that a run can save its state between any two updates, also inside a rollout.
"""

import dataclasses
import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hmpo.config import HMPOConfig, PowerMeanConfig
from hmpo.config.objective import ObjectiveConfig
from hmpo.errors import ConfigError, NonFiniteError
from hmpo.models.policy import load_trained_state, trained_state
from hmpo.objective.advantages import group_advantages, zero_variance_groups
from hmpo.objective.calibration import ClipCalibration, scaled_bounds
from hmpo.objective.exponent import exponent_source
from hmpo.objective.loss import exponent_in_force, objective_metrics, power_mean_loss
from hmpo.objective.mismatch import mismatch_metrics, mismatch_weights
from hmpo.optim import MuonClip, MuonClipConfig, discard_qk_readings, with_qk_clip
from hmpo.optim.state import clip_metrics, join_clip_state, split_clip_state
from hmpo.rewards import Rewards
from hmpo.sampling.responses import minibatch_rows
from hmpo.stopwatch import section
from hmpo.trainer.faults import Fault, Look, fault_text, look, step_fault
from hmpo.trainer.gradient import MinibatchGradient, accumulate, idle_rows
from hmpo.trainer.rollout import Collector, Prompts
from hmpo.types import Batch, Event, Metrics, Rollout, on_host

logger = logging.getLogger(__name__)


class PowerMeanTrainer:
    """Post-trains a policy with any member of the power-mean family.

    Args:
        policy_model: a Hugging Face causal LM, or a causal `nn.Module` from token ids (N, S) to
            logits (N, S, V).
        ref_model: frozen reference for a KL term and the metric `kl/ref`, or None.
        optimizer: any torch optimizer over the policy's parameters; wrapped in QK-clip unless
            `config.qk_clip` is off.
        config: settings; `HMPOConfig()` for the harmonic mean.
        reward_fn: TRL's signature `(prompts, completions, completion_ids, **columns) -> list`,
            or a `Rewards` of several.
        tokenizer: for prompts given as text; without it prompts are token ids and the reward
            function sees token ids.
        stop: strings that end a response (their tokens belong in `config.eos_token`); a
            completion's text ends before the first of them.

    Example:
        trainer = HMPOTrainer(policy, None, optimizer, HMPOConfig(), reward_fn)
        metrics = trainer.update_step([[5, 3, 9], [7, 7, 1]])
        metrics["reward/mean"]
    """

    def __init__(
        self,
        policy_model: nn.Module,
        ref_model: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        config: PowerMeanConfig,
        reward_fn: Callable[..., Any] | Rewards,
        *,
        tokenizer: Any = None,
        stop: Sequence[str] = (),
    ) -> None:
        self.policy, self.ref, self.config = policy_model, ref_model, config
        objective = config.resolved_objective
        self.device = next(policy_model.parameters()).device
        self.exponent = exponent_source(objective, self.device, config.total_updates)
        self.calibration = ClipCalibration(objective)
        self.lr_scale = self.clip_scale = 1.0
        """Factors of whoever controls the run on the learning rate and the clip's log bounds;
        not in the state."""
        rewards = (
            reward_fn
            if isinstance(reward_fn, Rewards)
            else Rewards(reward_fn, on_error=config.on_reward_error, timeout=config.reward_timeout)
        )
        self.collector = Collector(
            policy=policy_model,
            ref=ref_model,
            config=config,
            rewards=rewards,
            tokenizer=tokenizer,
            stop=tuple(stop),
            recompute=config.mismatch.recompute,
        )
        if self.objective.kl_coef > 0 and ref_model is None:
            raise ConfigError(
                f"kl_coef: got {self.objective.kl_coef} without a ref_model, expected a frozen "
                "reference model, or kl_coef = 0"
            )
        if config.updates_per_rollout == 1:
            warnings.warn(
                "one update per rollout (minibatches = epochs = 1): every importance ratio is 1, "
                "so the exponent p and the clip have no effect; raise minibatches or epochs",
                stacklevel=2,
            )
        if config.qk_clip and not isinstance(optimizer, MuonClip):
            clip = MuonClipConfig(max_qk_score=config.max_qk_score)
            optimizer = with_qk_clip(optimizer, policy_model, clip)
        config.lr_factor(0)  # an incomplete schedule is refused now, not at the first update
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.step = 0
        self.rollouts = 0
        self.skipped_in_a_row = 0
        self.totals = {"nonfinite_total": 0, "optim/skipped_total": 0, "num_tokens": 0}
        self.batch: Batch | None = None
        self.cursor = 0
        self.rollout_metrics: Metrics = {}
        self.samples: list[dict[str, Any]] = []
        self.events: list[Event] = []

    def update_step(self, prompts: Prompts, **columns: Sequence[Any]) -> Metrics:
        """One rollout and all its optimizer updates.

        Args:
            prompts: text (with a tokenizer), lists of token ids, or ids (B, P).
            columns: per-prompt values handed to the reward function.

        Returns:
            Metrics by telemetry name: those of the last update, with `loss` and `grad_norm`
            averaged and `update_skipped` summed over the rollout's updates.
        """
        self.begin_rollout(prompts, columns)
        records = []
        while self.pending_updates:
            records.append(self.next_update())
        merged = dict(records[-1])
        for name in ("loss", "pg_loss", "grad_norm"):
            merged[name] = math.fsum(record[name] for record in records) / len(records)
        merged["update_skipped"] = sum(record["update_skipped"] for record in records)
        return merged

    @property
    def pending_updates(self) -> int:
        """Updates that the rollout in use still serves."""
        return 0 if self.batch is None else self.config.updates_per_rollout - self.cursor

    @property
    def objective(self) -> ObjectiveConfig:
        """The objective in force; rewards, a calibration or a controller may move its bounds."""
        objective = self.calibration.apply(self.exponent.objective)
        return objective if self.clip_scale == 1 else scaled_bounds(objective, self.clip_scale)

    def begin_rollout(self, prompts: Prompts, columns: Mapping[str, Sequence[Any]]) -> None:
        """Sample responses, score them, and form advantages."""
        with section("rewards"):  # less the sections inside: sampling and log-probs
            self._begin_rollout(prompts, columns)

    def _begin_rollout(self, prompts: Prompts, columns: Mapping[str, Sequence[Any]]) -> None:
        collected = self.collector.collect(prompts, columns, index=self.rollouts, step=self.step)
        advantages = group_advantages(
            collected.rewards,
            self.config.group_size,
            scale=self.config.advantage_scale,
            std_ddof=self.config.std_ddof,
            valid=collected.valid,
        )
        weights, mismatch = self._mismatch(collected.rollout, collected.valid)
        self.batch = Batch(
            rollout=collected.rollout,
            rewards=collected.rewards,
            advantages=advantages,
            valid=collected.valid,
            ref_logprobs=collected.ref_logprobs,
            weights=weights,
        )
        self.exponent.observe(collected.rewards[collected.valid])
        self.cursor = 0
        self.rollouts += 1
        dead = zero_variance_groups(
            collected.rewards, self.config.group_size, valid=collected.rewards.isfinite()
        )
        self.rollout_metrics = collected.metrics | mismatch
        self.rollout_metrics["adv/zero_frac"] = float(dead.double().mean())
        self.samples = collected.samples
        self.events += collected.events
        self.totals["num_tokens"] += int(self.batch.rollout.attention_mask.sum())

    def next_update(self) -> Metrics:
        """One optimizer update on the next minibatch of the rollout in use.

        Returns:
            Metrics by telemetry name.

        Raises:
            NonFiniteError: under `on_nonfinite="stop"`, after `max_nonfinite` skips in a row, or
                where a step itself made the weights or the optimizer's state non-finite.
        """
        assert self.batch is not None and self.pending_updates, "begin_rollout comes first"
        config = self.config
        epoch, part = divmod(self.cursor, config.minibatches)
        self._set_lr()
        p = self.exponent.value(self.step)
        exponent = None if p is None else torch.tensor(p, dtype=torch.float64)
        with section("logprobs"):
            batch = self._minibatch(epoch, part)
        with section("backward"):  # less the sections inside: log-probs and objective
            gradient = accumulate(
                self.policy, batch, config, self.objective, exponent, config.mismatch
            )
        logprobs = gradient.logprobs
        with section("optimizer"):
            seen = self._step_optimizer(batch, gradient.loss, logprobs)
        learned: Metrics = {}
        with section("objective"):
            if seen.fault is None:
                learned = self._learn_exponent(batch, logprobs)
        with section("telemetry"):
            record_of = self._objective_record(batch, gradient, exponent)
        with section("objective"):
            if seen.fault is None:
                self._calibrate(batch, logprobs, exponent)
        with section("telemetry"):
            record = {
                "step": self.step,
                "rollout": self.rollouts - 1,
                "epoch_in_rollout": epoch,
                "minibatch": part,
                "staleness": self.cursor,
                "loss": seen.loss,
                "lr": self.optimizer.param_groups[0]["lr"],
                "grad_norm": seen.norm,
                "grad_norm_clipped": min(seen.norm, config.max_grad_norm or math.inf),
                "update_skipped": int(seen.fault is not None),
                "nonfinite": int(seen.fault is not None),
                **record_of,
                **learned,
                **self.rollout_metrics,
                **(clip_metrics(self.optimizer) if seen.fault is None else {}),
            }
        self.cursor += 1
        self._after(seen.fault)
        self.step += 1
        if not self.pending_updates:
            self.batch = None
        return record | self.totals

    def drain_events(self) -> list[Event]:
        """Events since the last call, oldest first."""
        events, self.events = self.events, []
        return events

    # ------------------------------------------------------------------- the parts of an update

    def _set_lr(self) -> None:
        factor = self.config.lr_factor(self.step) * self.lr_scale
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def _learn_exponent(self, batch: Batch, logprobs: Tensor) -> Metrics:
        """Let a learnable exponent follow an applied update, by the minibatch it was made on."""
        mask = batch.rollout.response_mask & batch.valid[:, None]
        old, advantages = batch.rollout.old_logprobs, batch.advantages

        def surrogate(p: Tensor) -> Tensor:
            free = dataclasses.replace(self.objective, kl_coef=0.0)
            return power_mean_loss(logprobs, old, mask, advantages, free, exponent=p)

        log_ratio = torch.where(mask, logprobs - old, torch.zeros_like(old))
        return self.exponent.learn(log_ratio, mask, advantages, surrogate)

    def _mismatch(self, rollout: Rollout, valid: Tensor) -> tuple[Tensor | None, Metrics]:
        """Weights of a rollout where sampler and trainer may differ, and how much they do."""
        settings, sampling = self.config.mismatch, self.config.top_k > 0 or self.config.top_p < 1
        if not (self.collector.recomputes or settings.corrects or sampling):
            return None, {}
        mask = rollout.response_mask & valid[:, None]
        drawn = rollout.old_logprobs, rollout.sampling_logprobs, mask
        weights = mismatch_weights(*drawn, settings)
        metrics = mismatch_metrics(*drawn, weights)
        return weights, on_host(metrics)

    def _calibrate(self, batch: Batch, logprobs: Tensor, exponent: Tensor | None) -> None:
        """Let the clip's calibration see an applied update of the first rollouts."""
        base = self.exponent.objective
        if base.clip_share is None:
            return
        mask = batch.rollout.response_mask & batch.valid[:, None]
        log_ratio = torch.where(mask, logprobs - batch.rollout.old_logprobs, 0)
        p = exponent_in_force(log_ratio, mask, batch.advantages, base, exponent)
        settled = self.calibration.observe(
            log_ratio,
            mask,
            batch.advantages,
            p,
            base,
            rollout=self.rollouts - 1,
            staleness=self.cursor,
        )
        if settled:
            low, high = self.objective.log_bounds
            data = {"scale": self.calibration.scale, "log_low": low, "log_high": high}
            self.events.append(Event(name="clip_calibrated", step=self.step, data=data))
            logger.info("clip half-widths calibrated: log bounds %.3g and %.3g", low, high)

    def _minibatch(self, epoch: int, part: int) -> Batch:
        """Rows of the rollout in use that this update learns from, without common padding."""
        assert self.batch is not None
        rows = minibatch_rows(
            len(self.batch.rewards),
            self.config.minibatches,
            seed=self.config.seed,
            rollout=self.rollouts - 1,
            epoch=epoch,
        )[part]
        return self.batch.select(rows.to(self.device)).trimmed()

    def _step_optimizer(self, batch: Batch, loss: Tensor, logprobs: Tensor) -> Look:
        """Clip the gradient and step, unless something is not finite; no gradient is left.

        The host waits for the device once before the step, to learn whether to take it, and once
        after it.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        seen = look(self.policy, self.optimizer, batch, loss, logprobs, norm)
        if seen.fault is None:
            limit = self.config.max_grad_norm
            if limit is not None and seen.norm > 0.999 * limit:  # else the factor is exactly 1
                nn.utils.clip_grads_with_norm_(parameters, limit, norm)
            self.optimizer.step()
            self._check_step()
        self.optimizer.zero_grad(set_to_none=True)
        return seen

    def _check_step(self) -> None:
        """Stop at once if the step spoilt weights or state: there is no way back from it here."""
        fault = step_fault(self.policy, self.optimizer)
        if fault is None:
            return
        self.totals["nonfinite_total"] += 1
        self.events.append(Event(name="nonfinite", step=self.step, data=fault))
        raise NonFiniteError(
            f"update {self.step}: not finite after the step at {fault_text(fault)}; resume from "
            "the last checkpoint with a lower learning rate"
        )

    def _after(self, fault: Fault | None) -> None:
        """Count a skipped update, and stop where the configuration says so."""
        if fault is None:
            self.skipped_in_a_row = 0
            return
        discard_qk_readings(self.optimizer)
        self.skipped_in_a_row += 1
        self.totals["nonfinite_total"] += 1
        self.totals["optim/skipped_total"] += 1
        where = fault_text(fault)
        self.events.append(Event(name="nonfinite", step=self.step, data=fault))
        logger.warning("update %d skipped: not finite at %s", self.step, where)
        stop = self.config.on_nonfinite == "stop"
        if stop or self.skipped_in_a_row >= self.config.max_nonfinite:
            raise NonFiniteError(
                f"update {self.step}: not finite at {where}; {self.skipped_in_a_row} update(s) "
                "skipped in a row; lower the learning rate or resume from the last checkpoint"
            )

    def _objective_record(
        self, batch: Batch, gradient: MinibatchGradient, exponent: Tensor | None
    ) -> Metrics:
        """The objective's metrics over a whole minibatch, exact whatever the micro-batches."""
        rollout = batch.rollout
        mask = rollout.response_mask & batch.valid[:, None]
        metrics = objective_metrics(
            gradient.logprobs,
            rollout.old_logprobs,
            mask,
            batch.advantages,
            self.objective,
            ref_logprobs=batch.ref_logprobs,
            exponent=exponent,
        )
        metrics["update/idle_frac"] = idle_rows(batch, self.objective).double().mean()
        total = (gradient.entropy * mask).sum(dtype=torch.float64)
        metrics["entropy"] = total / metrics["n_tokens"].clamp(min=1)
        return on_host(metrics) | {"update/packed": float(gradient.packed)}

    # ------------------------------------------------------------------------------- the state

    def state_dict(self) -> dict[str, Any]:
        """Everything a bit-identical continuation needs, as plain values and tensors."""
        return {
            "model": trained_state(self.policy),
            **split_clip_state(self.optimizer),
            "trainer": {
                "step": self.step,
                "rollouts": self.rollouts,
                "cursor": self.cursor,
                "skipped_in_a_row": self.skipped_in_a_row,
                "totals": dict(self.totals),
                "rollout_metrics": dict(self.rollout_metrics),
                "exponent": self.exponent.state_dict(),
                "calibration": self.calibration.state_dict(),
                "batch": None if self.batch is None else self.batch.state_dict(),
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        load_trained_state(self.policy, state["model"])
        join_clip_state(self.optimizer, state)
        mine = state["trainer"]
        self.step, self.rollouts = mine["step"], mine["rollouts"]
        self.cursor, self.skipped_in_a_row = mine["cursor"], mine["skipped_in_a_row"]
        self.totals = dict(mine["totals"])
        self.rollout_metrics = dict(mine["rollout_metrics"])
        self.exponent.load_state_dict(mine.get("exponent", {}))  # absent before there were any
        self.calibration.load_state_dict(mine.get("calibration", {}))  # likewise
        self.batch = (
            None if mine["batch"] is None else Batch.from_state_dict(mine["batch"], self.device)
        )


class HMPOTrainer(PowerMeanTrainer):
    """`PowerMeanTrainer` with the harmonic mean: the same trainer, another configuration."""

    def __init__(
        self,
        policy_model: nn.Module,
        ref_model: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        config: HMPOConfig,
        reward_fn: Callable[..., Any] | Rewards,
        **keywords: Any,
    ) -> None:
        super().__init__(policy_model, ref_model, optimizer, config, reward_fn, **keywords)
