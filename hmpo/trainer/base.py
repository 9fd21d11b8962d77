"""What every trainer does around its mathematics: rollouts, minibatches, steps, faults, state.

`Trainer.update_step` is the algorithm in flow order. `begin_rollout` and `next_update` are its
two parts, so that a run can save its state between any two updates, also inside a rollout. The
mathematics stands in three methods of the trainer at hand: `advantages` of a rollout, `gradient`
of a minibatch, and `measure` of an update.
"""

import dataclasses
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hmpo.config import TrainerConfig
from hmpo.engines.protocol import RolloutEngine
from hmpo.environments import Environments
from hmpo.models.chat import PromptOptions
from hmpo.models.evaluation import evaluating
from hmpo.models.policy import bare_policy, load_trained_state, trained_state
from hmpo.optim import MuonClip, MuonClipConfig, discard_qk_readings, with_qk_clip
from hmpo.optim.state import clip_metrics, join_clip_state, split_clip_state
from hmpo.ranks.shard import device_of, gathered, shards_of, whole_tree
from hmpo.ranks.world import Ranks
from hmpo.rewards import Rewards
from hmpo.stopwatch import section
from hmpo.trainer.conversation_rewards import environments_of, rewards_of
from hmpo.trainer.faults import (
    Fault,
    UpdateCheck,
    check_update,
    fault_text,
    known_to_all,
    ratio_fault,
    skip_error,
    spoilt_error,
    step_fault,
)
from hmpo.trainer.fit import fit
from hmpo.trainer.lag import Lag
from hmpo.trainer.learning import (
    check_apart,
    check_gradients,
    check_trainable,
    clip_gradients,
    differentiable,
    total_norm,
)
from hmpo.trainer.prompts import Prompts, with_tokens
from hmpo.trainer.rates import LearningRates
from hmpo.trainer.refill import Columns, Refill
from hmpo.trainer.rollout import Collected, Collector
from hmpo.trainer.rows import minibatch_rows, refuse_different
from hmpo.trainer.scored import of_all_updates
from hmpo.trainer.sharded import own_part
from hmpo.types import Batch, Event, Metrics, MinibatchGradient

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=TrainerConfig)


class Trainer(ABC, Generic[C]):
    """The plumbing of `PowerMeanTrainer` and `GSPOTrainer`; see there for the arguments."""

    notes_tokens = False
    """Whether each update leaves the tokens that its gradient came from most in `heaviest`."""
    heaviest: Sequence[dict[str, Any]] = ()

    def __init__(
        self,
        policy_model: nn.Module,
        ref_model: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        config: C,
        reward_fn: Callable[..., Any] | Rewards | None,
        *,
        tokenizer: Any = None,
        stop: Sequence[str] = (),
        lag: int = 0,
        prompt_options: PromptOptions | None = None,
        environment: Callable[[], Any] | Environments | None = None,
        tools: Sequence[Callable[..., Any]] = (),
        max_turns: int | None = None,
        engine: RolloutEngine | None = None,
    ) -> None:
        policy_model = bare_policy(policy_model)
        ref_model = None if ref_model is None else bare_policy(ref_model)
        check_trainable(policy_model, optimizer)
        check_apart(policy_model, ref_model)
        config = with_tokens(config, policy_model, tokenizer, stop)
        self.policy, self.ref, self.config = policy_model, ref_model, config
        self.ranks = Ranks.of_processes()
        refuse_different(self.ranks, policy_model, config)
        self.device, self.shards = device_of(policy_model), shards_of(policy_model)
        talks = environments_of(environment, tools, max_turns, tokenizer)
        with gathered(policy_model) as sampling:
            self.collector = Collector(
                policy=sampling,
                ref=ref_model,
                config=config,
                rewards=rewards_of(reward_fn, talks, config),
                tokenizer=tokenizer,
                stop=tuple(stop),
                prompt_options=prompt_options,
                environments=talks,
                ranks=self.ranks,
                recompute=self.recomputes_logprobs,
                engine=engine,
            )
        config.lr_factor(0)  # an incomplete schedule is refused now, not at the first update
        if config.qk_clip and not isinstance(optimizer, MuonClip):
            clip = MuonClipConfig(max_qk_score=config.max_qk_score)
            optimizer = with_qk_clip(optimizer, policy_model, clip)
        self.optimizer = optimizer
        self.rates = LearningRates(optimizer, config)
        """Base learning rates, which an outside scheduler or a hand may set in the optimizer."""
        self.lr_scale = 1.0
        """Factor of whoever controls the run on the learning rate; not in the state."""
        self.lag = Lag(policy_model, lag)
        """Which weights sample, and those of earlier rollouts."""
        self._counted = True
        self.step = self.rollouts = self.cursor = self.skipped_in_a_row = 0
        self.totals = {"nonfinite_total": 0, "optim/skipped_total": 0, "num_tokens": 0}
        self.batch: Batch | None = None
        self.rollout_metrics: Metrics = {}
        self.samples: list[dict[str, Any]] = []
        self.events: list[Event] = []

    # ---------------------------------------------------------------------- the way of the data

    def update_step(self, prompts: Prompts, **columns: Sequence[Any]) -> Metrics:
        """One rollout and all its optimizer updates.

        Args:
            prompts: text or messages (with a tokenizer), token ids (lists, or (B, P)), or
                (ids, mask).
            columns: per-prompt values handed to the reward function.

        Returns:
            Metrics by telemetry name: those of the last update, with `loss`, `pg_loss` and
            `grad_norm` averaged and `update_skipped` summed over the rollout's updates.
        """
        self.begin_rollout(prompts, columns)
        records = []
        while self.pending_updates:
            records.append(self.next_update())
        return of_all_updates(records)

    fit = fit

    @differentiable()
    @section("rewards")  # less the sections inside: sampling and log-probs
    def begin_rollout(
        self, prompts: Prompts, columns: Columns, refill: Refill | None = None
    ) -> None:
        """Sample, score, form advantages; arguments and errors are `Collector.collect`'s."""
        place: Any = {"index": self.rollouts, "step": self.step}
        with self.lag.sampling(self.rollouts, self.step), gathered(self.policy):
            found = self.collector.collect(prompts, columns, refill=refill, **place)
        advantages, told = self.advantages(found)
        weights, mismatch = self.corrections(found)
        self.batch = found.batch(advantages, weights)
        self.cursor = 0
        self.rollouts += 1
        self.lag.settle()
        self.rollout_metrics = found.metrics | mismatch | told
        self.samples = found.samples
        self.events += found.events
        self.totals["num_tokens"] += found.tokens

    @differentiable()
    def next_update(self) -> Metrics:
        """One optimizer update on the next minibatch of the rollout in use.

        Returns:
            Metrics by telemetry name.

        Raises:
            NonFiniteError: under `on_nonfinite="stop"`, after `max_nonfinite` skips in a row, or
                where a step itself made the weights or the optimizer's state non-finite.
        """
        batch = self.minibatch()
        self.optimizer.zero_grad(set_to_none=True)  # what somebody else left there is not ours
        with section("backward"), evaluating(self.policy):  # less the sections inside
            gradient = self.gradient(batch)
        if self.shards is None:  # else its backward pass has added them up
            self.ranks.add_gradients(p for p in self.policy.parameters() if p.requires_grad)
        check_gradients(self.optimizer)
        self.heaviest = self.heaviest_tokens(batch, gradient) if self.notes_tokens else ()
        check = self._step_optimizer(batch, gradient)
        measured = self.measure(batch, gradient, applied=check.fault is None)
        record = self._record(check, measured)
        if check.fault is None and (odd := ratio_fault(measured)) is not None:
            self.events.append(Event(name="ratio_out_of_range", step=self.step, data=odd))
        self.cursor += 1
        self._count(check.fault)
        self.step += 1
        if not self.pending_updates:
            self.batch = None
        self._counted = True
        return record | self.totals

    @property
    def pending_updates(self) -> int:
        """Updates that the rollout in use still serves."""
        return 0 if self.batch is None else self.config.updates_per_rollout - self.cursor

    @property
    def staleness(self) -> int:
        """Updates between the weights that sampled the rollout in use and the present ones."""
        return self.step - self.lag.sampled[1] if self.lag.rollouts else self.cursor

    @property
    def whole(self) -> bool:
        """Whether weights, optimizer state and counters are of one moment.

        They are not from the begin of a step until it is counted, nor while old weights sample.
        """
        return self._counted and not self.lag.swapped

    def drain_events(self) -> list[Event]:
        """Events since the last call, oldest first."""
        events, self.events = self.events, []
        return events

    # ------------------------------------------------------------------------- the mathematics

    @property
    def recomputes_logprobs(self) -> bool:
        """Whether old log-probs come from the policy's own forward pass in any case."""
        return False

    @abstractmethod
    def advantages(
        self, found: Collected
    ) -> tuple[Float[Tensor, " N"] | Float[Tensor, "N T"], Metrics]:
        """Advantages of a rollout's responses, and what they say of its groups."""

    def corrections(self, found: Collected) -> tuple[Tensor | None, Metrics]:
        """Weights (N,) or (N, T) where sampler and trainer may differ, and how much they do."""
        return None, {}

    def heaviest_tokens(self, batch: Batch, gradient: MinibatchGradient) -> list[dict[str, Any]]:
        """The tokens that a minibatch's gradient comes from most; none where nobody knows."""
        return []

    @abstractmethod
    def gradient(self, batch: Batch) -> MinibatchGradient:
        """Put a minibatch's gradient into the parameters' `grad`."""

    @abstractmethod
    def measure(self, batch: Batch, gradient: MinibatchGradient, *, applied: bool) -> Metrics:
        """Metrics of an update; what learns from updates that were applied does so here."""

    # ------------------------------------------------------------------- the parts of an update

    @section("logprobs")
    def minibatch(self) -> Batch:
        """Rows of the rollout in use that the next update learns from, without common padding."""
        assert self.batch is not None and self.pending_updates, "begin_rollout comes first"
        epoch, part = divmod(self.cursor, self.config.minibatches)
        rows = minibatch_rows(
            len(self.batch.rewards),
            self.config.minibatches,
            seed=self.config.seed,
            rollout=self.rollouts - 1,
            epoch=epoch,
        )[part]
        return self.batch.select(rows.to(self.device)).trimmed()

    @section("optimizer")
    def _step_optimizer(self, batch: Batch, gradient: MinibatchGradient) -> UpdateCheck:
        """Clip the gradient and step, unless something is not finite; no gradient is left.

        The host waits for the device once before the step, to learn whether to take it, and once
        after it.
        """
        self.rates.apply(self.step, self.lr_scale)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = total_norm(gradients, None if self.shards is None else self.ranks.total)
        check = check_update(
            self.policy, self.optimizer, batch, gradient.loss, gradient.logprobs, norm
        )
        check = dataclasses.replace(check, fault=known_to_all(check.fault, self.shards, self.ranks))
        if check.fault is None:
            limit = self.config.max_grad_norm
            if limit is not None and check.norm > 0.999 * limit:  # else the factor is exactly 1
                clip_gradients(parameters, limit, norm)
            self._counted = False
            self.optimizer.step()
            self._check_step()
        self.optimizer.zero_grad(set_to_none=True)
        return check

    def _check_step(self) -> None:
        """Stop at once if the step spoilt weights or state: there is no way back from it here."""
        fault = known_to_all(step_fault(self.policy, self.optimizer), self.shards, self.ranks)
        if fault is None:
            return
        self.totals["nonfinite_total"] += 1
        self.events.append(Event(name="nonfinite", step=self.step, data=fault))
        raise spoilt_error(self.step, fault)

    @section("telemetry")
    def _record(self, check: UpdateCheck, measured: Metrics) -> Metrics:
        """The record of this update by telemetry name."""
        epoch, part = divmod(self.cursor, self.config.minibatches)
        skipped = check.fault is not None
        return {
            "step": self.step,
            "rollout": self.rollouts - 1,
            "epoch_in_rollout": epoch,
            "minibatch": part,
            "staleness": self.staleness,
            **self.lag.metrics(self.rollouts - 1),
            "loss": check.loss,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": check.norm,
            "grad_norm_clipped": min(check.norm, self.config.max_grad_norm or math.inf),
            "update_skipped": int(skipped),
            "nonfinite": int(skipped),
            **measured,
            **self.rollout_metrics,
            **({} if skipped else clip_metrics(self.optimizer)),
        }

    def _count(self, fault: Fault | None) -> None:
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
        told = {"event": "nonfinite"}  # for whoever shows events by other means
        logger.warning("update %d skipped: not finite at %s", self.step, where, extra=told)
        stop = self.config.on_nonfinite == "stop"
        if stop or self.skipped_in_a_row >= self.config.max_nonfinite:
            raise skip_error(self.step, where, self.skipped_in_a_row)

    # ------------------------------------------------------------------------------- the state

    def state_dict(self, position: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Everything a bit-identical continuation needs, as plain values and tensors.

        Args:
            position: as `position` gave it at these weights; None asks now.

        Returns:
            The state. Of a sharded policy the first rank gets it whole, in the memory of the host,
            and the others get None for each tensor of it; all of them must call this.
        """
        state = {
            "model": trained_state(self.policy),
            **split_clip_state(self.optimizer),
            "trainer": self.position() if position is None else dict(position),
        }
        return state if self.shards is None else whole_tree(state, keep=self.ranks.rank == 0)

    def position(self) -> dict[str, Any]:
        """The part of the state that is neither weights nor optimizer: counters, rollout in use."""
        return {
            "step": self.step,
            "rollouts": self.rollouts,
            "cursor": self.cursor,
            "skipped_in_a_row": self.skipped_in_a_row,
            "totals": dict(self.totals),
            **self.rates.state_dict(),
            "rollout_metrics": dict(self.rollout_metrics),
            "batch": None if self.batch is None else self.batch.state_dict(),
            **self.lag.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken, over as many ranks or others."""
        if self.shards is not None:
            state = own_part(state, self.shards, self.optimizer)
        saved = state["trainer"]
        self.lag.load_state_dict(saved)  # refuses before anything has changed
        load_trained_state(self.policy, state["model"])
        join_clip_state(self.optimizer, state)
        self.rates.load_state_dict(saved)
        self.step, self.rollouts = saved["step"], saved["rollouts"]
        self.cursor, self.skipped_in_a_row = saved["cursor"], saved["skipped_in_a_row"]
        self.totals = dict(saved["totals"])
        self.rollout_metrics = dict(saved["rollout_metrics"])
        batch = saved["batch"]
        self.batch = None if batch is None else Batch.from_state_dict(batch, self.device)
