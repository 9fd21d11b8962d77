"""The trainer of the whole family: one rollout, then every optimizer update it serves.

The way of the data is `hmpo.trainer.base`; here stands what the power-mean objective adds to it.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hmpo.config import HMPOConfig, PowerMeanConfig
from hmpo.config.objective import ObjectiveConfig
from hmpo.engines.protocol import RolloutEngine
from hmpo.environments import Environments
from hmpo.errors import ConfigError
from hmpo.models.chat import PromptOptions
from hmpo.objective.entropy import entropy_bonus
from hmpo.objective.in_force import ObjectiveInForce
from hmpo.objective.metrics import objective_metrics
from hmpo.objective.mismatch import mismatch_metrics, mismatch_weights
from hmpo.ranks.shard import device_of
from hmpo.rewards import Rewards
from hmpo.stopwatch import section
from hmpo.trainer.advantages import (
    AdvantageFn,
    given_advantages,
    refuse_beside_function,
    rollout_advantages,
)
from hmpo.trainer.base import Trainer
from hmpo.trainer.gradient import accumulate, idle_rows
from hmpo.trainer.rollout import Collected
from hmpo.trainer.signal import heaviest
from hmpo.trainer.token_weights import token_weights
from hmpo.types import Batch, Metrics, MinibatchGradient, on_host


class PowerMeanTrainer(Trainer[PowerMeanConfig]):
    """Post-trains a policy with any member of the power-mean family.

    Made in a process group of `torch.distributed`, it is one of its ranks (`hmpo.ranks`): all of
    them make the same trainer and take the same calls.

    Args:
        policy_model: a Hugging Face causal LM, or a causal `nn.Module` from token ids (N, S) to
            logits (N, S, V).
        ref_model: frozen reference for a KL term and the metric `kl/ref`, or None.
        optimizer: any torch optimizer over the policy's parameters; wrapped in QK-clip unless
            `config.qk_clip` is off.
        config: settings; `HMPOConfig()` for the harmonic mean.
        reward_fn: TRL's signature `(prompts, completions, completion_ids, **columns) -> list`,
            or a `Rewards` of several.
        tokenizer: for prompts given as text or as messages; without it prompts are token ids and
            the reward function sees token ids.
        stop: strings that end a response (where `config.eos_token` is None, so do tokens that
            hold one); a completion's text ends before the first of them.
        lag: rollouts between the weights that sample and those that learn (`RolloutConfig`).
        prompt_options: how text and messages become token ids: variables of the chat template, and
            a limit of length.
        environment: a class whose instances the policy talks with (`hmpo.environments`), or TRL's
            `environment_factory`; its rewards are added, and `reward_fn` may be None beside them.
        tools: functions that the policy may call, as TRL's.
        max_turns: most turns of a conversation; None is 16.
        engine: draws the rollouts instead of `hmpo.sampling` (`hmpo.engines`); None for that.
        advantage_fn: forms the advantages of each rollout, one per response or one per token, as
            from process rewards or a value model (`AdvantageFn`); None takes `config.advantages`.

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
        advantage_fn: AdvantageFn | None = None,
    ) -> None:
        device = device_of(policy_model)
        objective = config.resolved_objective
        if objective.kl_coef > 0 and ref_model is None:
            raise ConfigError(
                f"kl_coef: got {objective.kl_coef} without a ref_model, expected a frozen "
                "reference model, or kl_coef = 0"
            )
        if advantage_fn is not None:
            refuse_beside_function(config)
        self.advantage_fn = advantage_fn
        if config.advantages.kl_in_reward > 0 and ref_model is None:
            raise ConfigError(
                f"kl_in_reward: got {config.advantages.kl_in_reward} without a ref_model, expected "
                "a frozen reference model, or kl_in_reward = 0"
            )
        self.in_force = ObjectiveInForce(
            objective, device, config.total_updates, config.updates_per_rollout
        )
        """The objective as it stands, and what controllers may set of it."""
        if config.updates_per_rollout == 1 and not lag:
            warnings.warn(
                "one update per rollout (minibatches = epochs = 1): every importance ratio is 1, "
                "so the exponent p and the clip have no effect; raise minibatches, epochs or lag",
                stacklevel=2,
            )
        super().__init__(
            policy_model,
            ref_model,
            optimizer,
            config,
            reward_fn,
            tokenizer=tokenizer,
            stop=stop,
            lag=lag,
            prompt_options=prompt_options,
            environment=environment,
            tools=tools,
            max_turns=max_turns,
            engine=engine,
        )

    @property
    def objective(self) -> ObjectiveConfig:
        """The member in force; rewards, a calibration or a controller may move its bounds."""
        return self.in_force.config

    @property
    def recomputes_logprobs(self) -> bool:
        """Whether old log-probs come from the policy's own forward pass in any case."""
        return self.config.mismatch.recompute

    def advantages(
        self, found: Collected
    ) -> tuple[Float[Tensor, " N"] | Float[Tensor, "N T"], Metrics]:
        """As the settings say, or `advantage_fn`; a reward-adaptive exponent sees the rewards."""
        if self.advantage_fn is None:
            result = rollout_advantages(found, self.config)
        else:
            result = given_advantages(self.advantage_fn, found, self.objective, self.ranks)
        self.in_force.observe(found.rewards[found.valid])
        return result

    def corrections(self, found: Collected) -> tuple[Tensor | None, Metrics]:
        """Weights of a rollout where sampler and trainer may differ, and how much they do."""
        settings, truncated = self.config.mismatch, self.config.top_k > 0 or self.config.top_p < 1
        if not (self.collector.recomputes or settings.corrects or truncated):
            return None, {}
        rollout, mask = found.rollout, found.rollout.response_mask & found.valid[:, None]
        old, drawn = rollout.old_logprobs, rollout.sampling_logprobs
        weights = mismatch_weights(old, drawn, mask, settings)
        return weights, on_host(mismatch_metrics(old, drawn, mask, weights))

    def gradient(self, batch: Batch) -> MinibatchGradient:
        """Log-probs, ratios, power means, loss and its gradient, in micro-batches."""
        objective, exponent = self.in_force.at(self.step)
        return accumulate(
            self.policy, batch, self.config, objective, exponent, self.config.mismatch, self.ranks
        )

    def heaviest_tokens(self, batch: Batch, gradient: MinibatchGradient) -> list[dict[str, Any]]:
        """The tokens that a minibatch's gradient comes from most: w A, exact for each member."""
        objective, exponent = self.in_force.at(self.step)
        mismatch, tokenizer = self.config.mismatch, self.collector.tokenizer
        weights = token_weights(batch, gradient.logprobs, objective, exponent, mismatch)
        return heaviest(batch, weights, tokenizer)

    def measure(self, batch: Batch, gradient: MinibatchGradient, *, applied: bool) -> Metrics:
        """The objective over a whole minibatch, exact whatever the micro-batches."""
        rollout, mask = batch.rollout, batch.rollout.response_mask & batch.valid[:, None]
        objective, exponent = self.in_force.at(self.step)
        with section("telemetry"):
            metrics = objective_metrics(
                gradient.logprobs,
                rollout.old_logprobs,
                mask,
                batch.advantages,
                objective,
                ref_logprobs=batch.ref_logprobs,
                exponent=exponent,
            )
            metrics["update/idle_frac"] = idle_rows(batch, objective).double().mean()
            entropy = (gradient.entropy * mask).sum(dtype=torch.float64)
            metrics["entropy"] = entropy / metrics["n_tokens"].clamp(min=1)
            if objective.has_entropy_bonus:
                metrics["entropy_loss"] = -entropy_bonus(gradient.entropy, mask, objective, None)
            measured = on_host(metrics) | {"update/packed": float(gradient.packed)}
            if objective.has_entropy_bonus:
                measured["entropy_coef"] = objective.entropy_coef
        if not applied:
            return measured
        with section("objective"):
            learned, events = self.in_force.follow(
                gradient.logprobs,
                rollout.old_logprobs,
                mask,
                batch.advantages,
                update=self.step,
                rollout=self.rollouts - 1,
                staleness=self.staleness,
                entropy=measured["entropy"] if measured["n_tokens"] else math.nan,
            )
        self.events += events
        return measured | learned

    def position(self) -> dict[str, Any]:
        """The part of the state that is neither weights nor optimizer."""
        return super().position() | self.in_force.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        super().load_state_dict(state)
        self.in_force.load_state_dict(state["trainer"])


class HMPOTrainer(PowerMeanTrainer):
    """`PowerMeanTrainer` with the harmonic mean: the same trainer, another configuration."""

    def __init__(
        self,
        policy_model: nn.Module,
        ref_model: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        config: HMPOConfig,
        reward_fn: Callable[..., Any] | Rewards | None,
        **keywords: Any,
    ) -> None:
        super().__init__(policy_model, ref_model, optimizer, config, reward_fn, **keywords)
