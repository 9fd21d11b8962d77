"""Group Sequence Policy Optimization, written from its paper.

Zheng et al. (2025), arXiv 2507.18071. For the G responses y_i to a prompt, with rewards R_i:

    A_i = (R_i - mean(R)) / std(R)                                                  (eq. 4)
    s_i = (pi(y_i) / pi_old(y_i)) ^ (1 / |y_i|) = exp(mean_t d_it)                  (eq. 7)
    J   = E[ 1/G sum_i min(s_i A_i, clip(s_i, 1 - eps_low, 1 + eps_high) A_i) ]     (eq. 5)

This is the independent witness of the power-mean family: of hmpo it uses sampling, rewards and
log-probs, and none of the means, advantages or objectives. One deviation: a group whose rewards
are all equal has advantage 0, where the paper's formula is 0/0.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hmpo.config import GSPOConfig
from hmpo.errors import NonFiniteError
from hmpo.logprobs.responses import token_logprobs_and_entropy
from hmpo.models.policy import autocast, load_trained_state, trained_state
from hmpo.optim import MuonClip, MuonClipConfig, discard_qk_readings, with_qk_clip
from hmpo.optim.state import clip_metrics, join_clip_state, split_clip_state
from hmpo.rewards import Rewards
from hmpo.sampling.responses import minibatch_rows
from hmpo.stopwatch import section
from hmpo.trainer.faults import (
    Fault,
    fault_text,
    forward_fault,
    gradient_fault,
    optimizer_fault,
    weights_fault,
)
from hmpo.trainer.rollout import Collector, Prompts
from hmpo.types import Batch, Event, Metrics

logger = logging.getLogger(__name__)


class GSPOTrainer:
    """Trains a policy with GSPO; the methods are those of `PowerMeanTrainer`.

    Args:
        policy_model: a Hugging Face causal LM, or a causal `nn.Module` from ids to logits.
        ref_model: only measured (`kl/ref`); GSPO has no KL term. May be None.
        optimizer: wrapped in QK-clip unless `config.qk_clip` is off.
        config: `GSPOConfig`.
        reward_fn: TRL's signature, or a `Rewards`.
        tokenizer: for prompts given as text.
        stop: strings that end a completion's text.
    """

    def __init__(
        self,
        policy_model: nn.Module,
        ref_model: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        config: GSPOConfig,
        reward_fn: Callable[..., Any] | Rewards,
        *,
        tokenizer: Any = None,
        stop: Sequence[str] = (),
    ) -> None:
        self.policy, self.config = policy_model, config
        if not isinstance(reward_fn, Rewards):
            reward_fn = Rewards(
                reward_fn, on_error=config.on_reward_error, timeout=config.reward_timeout
            )
        self.collector = Collector(
            policy=policy_model,
            ref=ref_model,
            config=config,
            rewards=reward_fn,
            tokenizer=tokenizer,
            stop=tuple(stop),
        )
        if config.qk_clip and not isinstance(optimizer, MuonClip):
            clip = MuonClipConfig(max_qk_score=config.max_qk_score)
            optimizer = with_qk_clip(optimizer, policy_model, clip)
        config.lr_factor(0)
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.step = self.rollouts = self.cursor = self.skipped_in_a_row = 0
        self.totals = {"nonfinite_total": 0, "optim/skipped_total": 0, "num_tokens": 0}
        self.batch: Batch | None = None
        self.rollout_metrics: Metrics = {}
        self.samples: list[dict[str, Any]] = []
        self.events: list[Event] = []

    def update_step(self, prompts: Prompts, **columns: Sequence[Any]) -> Metrics:
        """One rollout and all its updates; returns the metrics of the last one."""
        self.begin_rollout(prompts, columns)
        record: Metrics = {}
        while self.pending_updates:
            record = self.next_update()
        return record

    @property
    def pending_updates(self) -> int:
        """Updates that the rollout in use still serves."""
        return 0 if self.batch is None else self.config.updates_per_rollout - self.cursor

    def begin_rollout(self, prompts: Prompts, columns: Mapping[str, Sequence[Any]]) -> None:
        """Sample responses, score them, and form advantages."""
        found = self.collector.collect(prompts, columns, index=self.rollouts, step=self.step)
        with section("rewards"):
            advantages = self._advantages(found.rewards, found.valid)
        self.batch = Batch(
            rollout=found.rollout,
            rewards=found.rewards,
            advantages=advantages,
            valid=found.valid,
            ref_logprobs=found.ref_logprobs,
        )
        self.cursor = 0
        self.rollouts += 1
        self.samples, self.events = found.samples, self.events + found.events
        self.rollout_metrics = found.metrics
        self.totals["num_tokens"] += int(found.rollout.attention_mask.sum())

    def next_update(self) -> Metrics:
        """One optimizer update; returns its metrics by telemetry name.

        Raises:
            NonFiniteError: under `on_nonfinite="stop"`, after `max_nonfinite` skips in a row, or
                where a step itself made the weights or the optimizer's state non-finite.
        """
        assert self.batch is not None and self.pending_updates, "begin_rollout comes first"
        config = self.config
        epoch = self.cursor // config.minibatches
        parts = minibatch_rows(
            len(self.batch.rewards),
            config.minibatches,
            seed=config.seed,
            rollout=self.rollouts - 1,
            epoch=epoch,
        )
        batch = self.batch.select(
            parts[self.cursor % config.minibatches].to(self.batch.valid.device)
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * config.lr_factor(self.step)
        with section("backward"):  # less the sections inside
            metrics, logprobs = self._backward(batch)
        with section("optimizer"):
            norm, fault = self._step_optimizer(batch, torch.tensor(metrics["loss"]), logprobs)
        record = {
            "step": self.step,
            "rollout": self.rollouts - 1,
            "epoch_in_rollout": epoch,
            "minibatch": self.cursor % config.minibatches,
            "staleness": self.cursor,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": float(norm),
            "update_skipped": int(fault is not None),
            "nonfinite": int(fault is not None),
            **metrics,
            **self.rollout_metrics,
        }
        if fault is None:
            record |= clip_metrics(self.optimizer)
        self.cursor += 1
        self._count(fault)
        self.step += 1
        if not self.pending_updates:
            self.batch = None
        return record | self.totals

    def drain_events(self) -> list[Event]:
        """Events since the last call, oldest first."""
        events, self.events = self.events, []
        return events

    def _advantages(self, rewards: Tensor, valid: Tensor) -> Tensor:
        """Equation 4, one group after the other."""
        advantages = torch.zeros_like(rewards)
        group = self.config.group_size
        for start in range(0, len(rewards), group):
            rows = [i for i in range(start, start + group) if valid[i]]
            values = rewards[rows].double()
            if len(rows) < 2 or bool((values == values[0]).all()):
                continue
            centred = values - values.mean()
            if self.config.advantage_scale == "std":
                centred = centred / values.std(correction=self.config.std_ddof)
            advantages[rows] = centred.to(rewards.dtype)
        return advantages

    def _backward(self, batch: Batch) -> tuple[Metrics, Tensor]:
        """Gradient of -J (equations 5 and 7) over one minibatch; also the log-probs (M, T)."""
        config, rollout = self.config, batch.rollout
        counted = max(1, int(batch.valid.sum()))
        size = config.micro_batch_size or len(batch.rewards)
        total, clipped, ratios, logprobs, entropy_sum = 0.0, 0, [], [], 0.0
        for start in range(0, len(batch.rewards), size):
            rows = slice(start, start + size)
            with section("logprobs"), autocast(rollout.response_ids.device, config):
                result = token_logprobs_and_entropy(
                    self.policy,
                    rollout.input_ids[rows],
                    rollout.attention_mask[rows],
                    rollout.response_ids.shape[1],
                    temperature=config.temperature,
                    chunk=config.logprob_chunk,
                )
            new = result.logprobs
            with section("objective"):
                mask = rollout.response_mask[rows].to(new.dtype)
                log_s = ((new - rollout.old_logprobs[rows]) * mask).sum(1) / mask.sum(1)
                s = log_s.exp()
                advantage = batch.advantages[rows].to(s.dtype) * batch.valid[rows]
                bounded = s.clamp(1 - config.epsilon_low, 1 + config.epsilon_high)
                surrogate = torch.minimum(s * advantage, bounded * advantage)
                loss = -surrogate.sum() / counted
            loss.backward()
            total += float(loss.detach())
            clipped += int((bounded * advantage < s * advantage).sum())
            ratios.append(log_s.detach())
            logprobs.append(new.detach())
            entropy_sum += float((result.entropy.detach() * mask).sum())
        log_g = torch.cat(ratios)
        metrics: Metrics = {
            "loss": total,
            "pg_loss": total,
            "n_seq": counted,
            "n_tokens": int(rollout.response_mask.sum()),
            "clip/frac": clipped / counted,
            "ratio/logG": float(log_g.mean()),
            "ratio/m_mean": float(log_g.exp().mean()),
            "ratio/p": 0.0,
            "entropy": entropy_sum / max(1, int(rollout.response_mask.sum())),
        }
        return metrics, torch.cat(logprobs)

    def _step_optimizer(
        self, batch: Batch, loss: Tensor, logprobs: Tensor
    ) -> tuple[Tensor, Fault | None]:
        """Clip the gradient and step, unless something is not finite; returns norm and fault."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.config.max_grad_norm is not None and norm.isfinite():
            nn.utils.clip_grads_with_norm_(parameters, self.config.max_grad_norm, norm)
        fault = (
            forward_fault(batch, loss, logprobs)
            or gradient_fault(self.policy, norm)
            or optimizer_fault(self.policy, self.optimizer)
        )
        if fault is None:
            self.optimizer.step()
            self._check_step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, fault

    def _check_step(self) -> None:
        """Stop at once if the step spoilt weights or state."""
        fault = weights_fault(self.policy) or optimizer_fault(self.policy, self.optimizer)
        if fault is None:
            return
        self.totals["nonfinite_total"] += 1
        self.events.append(Event(name="nonfinite", step=self.step, data=fault))
        raise NonFiniteError(
            f"update {self.step}: not finite after the step at {fault_text(fault)}; resume from "
            "the last checkpoint with a lower learning rate"
        )

    def _count(self, fault: Fault | None) -> None:
        """Count a skipped update, and stop where the configuration says so."""
        if fault is None:
            self.skipped_in_a_row = 0
            return
        discard_qk_readings(self.optimizer)
        self.skipped_in_a_row += 1
        self.totals["nonfinite_total"] += 1
        self.totals["optim/skipped_total"] += 1
        self.events.append(Event(name="nonfinite", step=self.step, data=fault))
        where = fault_text(fault)
        logger.warning("update %d skipped: not finite at %s", self.step, where)
        stop = self.config.on_nonfinite == "stop"
        if stop or self.skipped_in_a_row >= self.config.max_nonfinite:
            raise NonFiniteError(
                f"update {self.step}: not finite at {where}; {self.skipped_in_a_row} update(s) "
                "skipped in a row; lower the learning rate or resume from the last checkpoint"
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything a bit-identical continuation needs, as plain values and tensors."""
        names = ("step", "rollouts", "cursor", "skipped_in_a_row", "totals", "rollout_metrics")
        mine = {name: getattr(self, name) for name in names}
        mine["batch"] = None if self.batch is None else self.batch.state_dict()
        return {
            "model": trained_state(self.policy),
            **split_clip_state(self.optimizer),
            "trainer": mine,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        load_trained_state(self.policy, state["model"])
        join_clip_state(self.optimizer, state)
        for name, value in state["trainer"].items():
            if name != "batch":
                setattr(self, name, value)
        batch = state["trainer"]["batch"]
        device = self.collector.device
        self.batch = None if batch is None else Batch.from_state_dict(batch, device)
