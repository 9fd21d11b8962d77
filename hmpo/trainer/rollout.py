"""From prompts to scored responses: everything of a rollout that precedes its advantages."""

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hmpo.config import TrainerConfig
from hmpo.config.rollout import COLDEST
from hmpo.engines.check import refuse_other_weights
from hmpo.engines.protocol import RolloutEngine
from hmpo.environments import Environments
from hmpo.errors import ConfigError, require
from hmpo.logprobs.responses import token_logprobs
from hmpo.models.chat import PromptOptions
from hmpo.models.policy import autocast
from hmpo.models.probe import policy_facts
from hmpo.randomness import keyed_generator, keyed_seed
from hmpo.ranks.world import Ranks
from hmpo.rewards import Rewards
from hmpo.sampling.options import SamplingOptions
from hmpo.stopwatch import section
from hmpo.trainer.conversation import Conversations, converse
from hmpo.trainer.conversation_rewards import environment_events, refuse_given, scored_parts
from hmpo.trainer.prompts import Prompts
from hmpo.trainer.refill import Columns, Refill, counted_rows, filled, with_attempts
from hmpo.trainer.responses import completions_of, repeated_columns, reward_events
from hmpo.trainer.rows import ALONE, joined, rows_of_rank
from hmpo.trainer.sampled import EngineTurn, sampled
from hmpo.trainer.scored import ScoredResponses, describe, samples_of
from hmpo.types import Batch, Event, Metrics, Rollout

logger = logging.getLogger(__name__)


def sample_and_score(
    policy: nn.Module,
    prompts: Prompts,
    columns: Mapping[str, Sequence[Any]],
    *,
    config: TrainerConfig,
    options: SamplingOptions,
    rewards: Rewards,
    group_size: int,
    generator: torch.Generator,
    tokenizer: Any = None,
    step: int = 0,
    reward_seed: int | None = None,
    prompt_options: PromptOptions | None = None,
    environments: Environments | None = None,
    ranks: Ranks = ALONE,
    engine: EngineTurn | None = None,
) -> ScoredResponses:
    """Sample responses and score them, for a rollout or an evaluation.

    Args:
        policy: a Hugging Face causal LM, or a causal module from ids (N, S) to logits (N, S, V).
        prompts: B of them.
        columns: per-prompt values handed to the reward functions.
        config: the precision of the policy's forward passes.
        options: how responses are drawn.
        rewards: what scores them.
        group_size: G, responses per prompt; rows of one prompt are adjacent.
        generator: source of randomness.
        tokenizer: for prompts given as text or messages, and to decode the responses.
        step: updates done, for messages and events.
        reward_seed: of random numbers that time-limited reward functions draw; None takes `step`.
        prompt_options: how prompts given as text or messages become ids.
        environments: what the policy talks with; None for one turn a response.
        ranks: that share the prompts; rewards are given once, and so are conversations had.
        engine: what draws the responses; None for the sampler of this package.

    Raises:
        ConfigError: no prompts, text without a tokenizer, or a column of another length.
        RewardError: a reward function gave something unusable, and that is not to be skipped.
        ConversationError: an environment did.
        EngineError: the engine failed, or drew from other weights.
    """
    shared = (policy, prompts, config, options, group_size, generator)
    told = {"step": step, "seed": reward_seed}
    if environments is not None:
        talk = functools.partial(_talked, *shared, columns, environments, prompt_options)
        parts = ranks.once(lambda: scored_parts(talk(), columns, group_size, rewards, **told))
        return ScoredResponses(**parts)
    rollout, asked = sampled(*shared, tokenizer, prompt_options, ranks, engine)
    with section("rewards"):
        repeated = [prompt for prompt in asked.given for _ in range(group_size)]
        completions, token_ids = completions_of(rollout, tokenizer, options.stop, asked)
        by_response = repeated_columns(columns, len(asked.given), group_size)
        result = ranks.once(lambda: rewards(repeated, completions, token_ids, by_response, **told))
    given = {"prompts": repeated, "completions": completions, "columns": by_response}
    total = torch.tensor(result.total, device=rollout.finished.device)
    return ScoredResponses(rollout=rollout, rewards=total, result=result, **given)


def _talked(
    policy: nn.Module,
    prompts: Any,
    config: TrainerConfig,
    options: SamplingOptions,
    group_size: int,
    generator: torch.Generator,
    columns: Mapping[str, Sequence[Any]],
    environments: Environments,
    prompt_options: PromptOptions | None,
) -> Conversations:
    """A conversation for each response."""
    refuse_given(columns, environments, prompt_options)
    return converse(
        policy,
        list(prompts),
        columns,
        environments=environments,
        config=config,
        options=options,
        group_size=group_size,
        generator=generator,
        prompt_options=prompt_options,
    )


def sampling_options(config: TrainerConfig, stop: Sequence[str]) -> SamplingOptions:
    """How the rollouts of a trainer are drawn, of its configuration `with_tokens`.

    `stop` needs a tokenizer.
    """
    return SamplingOptions(
        max_length=config.max_length,
        eos_tokens=config.stop_tokens,
        pad_token=config.pad_token or 0,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        decoder=config.decoder,
        dtype=torch.bfloat16 if config.sampling_dtype == "bfloat16" else None,
        stop=tuple(stop),
    )


@dataclass(frozen=True, kw_only=True)
class Collected:
    """One rollout with its rewards.

    Example: 2 prompts, groups of 4: `rewards` (8,), 8 samples, metrics such as
    `{"reward/mean": 0.25, "len/mean": 11.0}`.
    """

    rollout: Rollout
    rewards: Float[Tensor, " N"]
    """Total rewards; NaN where dropped."""
    valid: Bool[Tensor, " N"]
    """False for rows left out of the loss: dropped reward, masked truncation."""
    ref_logprobs: Float[Tensor, "N T"] | None
    """Log-probs under the frozen reference, where there is one."""
    metrics: Metrics
    """Metrics of the rollout by telemetry name."""
    samples: list[dict[str, Any]]
    """Prompt, completion, reward and `finished` of each response that was drawn."""
    tokens: int
    """Of prompts and responses that were drawn."""
    events: list[Event]
    """Reward faults."""
    by_function: dict[str, list[float]]
    """Unweighted rewards by function, N each; NaN where one does not apply, or was dropped."""
    weights: tuple[float, ...]
    """Of these functions in the total."""

    def batch(
        self,
        advantages: Float[Tensor, " N"] | Float[Tensor, "N T"],
        weights: Float[Tensor, " N"] | Float[Tensor, "N T"] | None,
    ) -> Batch:
        """What updates learn from: the rollout with its advantages and corrections."""
        return Batch(
            rollout=self.rollout,
            rewards=self.rewards,
            advantages=advantages,
            valid=self.valid,
            ref_logprobs=self.ref_logprobs,
            weights=weights,
        )


@dataclass(frozen=True, kw_only=True)
class Collector:
    """Samples and scores rollouts of one policy."""

    policy: nn.Module
    ref: nn.Module | None
    config: TrainerConfig
    rewards: Rewards
    tokenizer: Any = None
    stop: tuple[str, ...] = ()
    prompt_options: PromptOptions | None = None
    environments: Environments | None = None
    """What the policy talks with."""
    ranks: Ranks = ALONE
    """That share the work."""
    recompute: bool = False
    """Whether old log-probs come from the policy's own forward pass even where the sampler's are
    exact to float32 rounding."""
    engine: RolloutEngine | None = None
    """What draws the responses; None for the sampler of this package."""

    def __post_init__(self) -> None:
        if self.engine is not None:
            self._refuse_with_engine()
        policy_facts(self.policy)  # asked before anything listens to its attention
        if self.config.sampling_dtype == "bfloat16" and not _fast_at_bfloat16(self.device):
            logger.warning(
                "sampling_dtype = bfloat16: this machine (%s) has no fast bfloat16 products, "
                'expect slower rollouts than with "model"',
                self.device.type,
            )

    @property
    def recomputes(self) -> bool:
        """Whether old log-probs come from the policy's own forward pass.

        A token's log-prob in bfloat16 depends on the shape of the batch, by about 0.01 nat: more
        than a tight clip (GSPO: 3e-4) bears, so the sampler's are not taken for the trainer's.
        """
        return self.recompute or self.engine is not None or self._rounded

    @property
    def _rounded(self) -> bool:
        """Whether policy or sampler computes in 16 bits."""
        config = self.config
        rounded = config.autocast == "bfloat16" or config.sampling_dtype == "bfloat16"
        half = (torch.bfloat16, torch.float16)
        return rounded or any(p.dtype in half for p in self.policy.parameters())

    @property
    def options(self) -> SamplingOptions:
        """How its rollouts are drawn."""
        return sampling_options(self.config, () if self.tokenizer is None else self.stop)

    @property
    def device(self) -> torch.device:
        """Where the policy's weights are."""
        return next(self.policy.parameters()).device

    def collect(
        self,
        prompts: Prompts,
        columns: Columns,
        *,
        index: int,
        step: int,
        refill: Refill | None = None,
    ) -> Collected:
        """One rollout.

        Args:
            prompts: text or messages (with a tokenizer), lists of token ids, or ids (B, P).
            columns: per-prompt values handed to the reward function.
            index: of the rollout; together with the seed it fixes the randomness.
            step: updates done, for events.
            refill: replaces prompts whose groups carry no signal; None for none.

        Raises:
            ConfigError: `refill` beside environments, or no reward function to judge by.
        """
        config = self.config
        talks = self.environments is not None
        require(refill is None or not talks, "refill", refill, "None with an environment")
        scored, rows, samples, batch = self._drawn(prompts, columns, index, step, refill)
        tokens, by_function = int(scored.rollout.attention_mask.sum()), scored.result.by_function
        rollout, rewards, valid = scored.rollout, scored.rewards, counted_rows(scored, config)
        if rows is not None:
            rollout, rewards, valid = rollout.select(rows), rewards[rows], valid[rows]
            kept = rows.tolist()
            by_function = {n: [v[i] for i in kept] for n, v in by_function.items()}
        if self.recomputes:
            rollout = dataclasses.replace(
                rollout, old_logprobs=self._logprobs(self.policy, rollout)
            )
        if self.engine is not None:
            refuse_other_weights(
                rollout.old_logprobs,
                rollout.sampling_logprobs,
                rollout.response_mask,
                rounded=self._rounded,
            )
        return Collected(
            rollout=rollout,
            rewards=rewards,
            valid=valid,
            ref_logprobs=None if self.ref is None else self._logprobs(self.ref, rollout),
            tokens=tokens,
            metrics=describe(scored, config.group_size, self.rewards.success) | batch,
            samples=samples,
            events=reward_events(scored.result, step)
            + environment_events(scored.conversations, step),
            by_function=by_function,
            weights=self.rewards.weights,
        )

    def _drawn(
        self, prompts: Prompts, columns: Columns, index: int, step: int, refill: Refill | None
    ) -> tuple[ScoredResponses, Int[Tensor, " M"] | None, list[dict[str, Any]], Metrics]:
        """All that a rollout draws; which rows are trained on (None: all); samples and metrics."""

        def sample(prompts: Prompts, columns: Columns, attempt: int) -> ScoredResponses:
            return self._sampled(prompts, columns, index, step, attempt)

        if refill is None:
            scored = sample(prompts, columns, 0)
            return scored, None, samples_of(scored), {}
        scored, rows, attempts, batch = filled(sample, prompts, columns, refill, self.config)
        return scored, rows, with_attempts(samples_of(scored), attempts, rows), batch

    def _sampled(
        self, prompts: Prompts, columns: Columns, index: int, step: int, attempt: int
    ) -> ScoredResponses:
        """Responses and rewards of one attempt, whose randomness is its own."""
        config, again = self.config, f"-{attempt}" if attempt else ""
        turn = None if self.engine is None else EngineTurn(self.engine, index, not attempt)
        return sample_and_score(
            self.policy,
            prompts,
            columns,
            config=config,
            options=self.options,
            rewards=self.rewards,
            group_size=config.group_size,
            generator=keyed_generator(config.seed, f"rollout{again}", index),
            tokenizer=self.tokenizer,
            step=step,
            reward_seed=keyed_seed(config.seed, f"rewards{again}", index),
            prompt_options=self.prompt_options,
            environments=self.environments,
            ranks=self.ranks,
            engine=turn,
        )

    def _refuse_with_engine(self) -> None:
        """Refuse what an engine cannot do, as `RolloutConfig.check` does for a run.

        Raises:
            ConfigError: one line.
        """
        config = self.config
        faults = {
            f"{self.ranks.size} ranks": not self.ranks.alone,
            "an environment": self.environments is not None,
            f"top_k = {config.top_k}": config.top_k > 0,
            f"top_p = {config.top_p}": config.top_p < 1,
            f"temperature = {config.temperature}": config.temperature < COLDEST,
        }
        for fault in (name for name, there in faults.items() if there):
            raise ConfigError(
                f"engine: got one with {fault}, expected one process, one turn a response, all "
                f"tokens (top_k = 0, top_p = 1), and a temperature of at least {COLDEST}"
            )

    def _logprobs(self, model: nn.Module, rollout: Rollout) -> Tensor:
        """Log-probs of the responses by a model's own forward pass, without gradient."""
        rows, counted = rows_of_rank(rollout, self.ranks), rollout.counted
        micro = rows.split(self.config.micro_batch_size or len(rollout.finished))
        micro = [part for part in micro if len(part)]
        ids, mask = rollout.input_ids, rollout.attention_mask
        with section("logprobs"), torch.no_grad(), autocast(self.device, self.config):
            parts = [
                token_logprobs(
                    model,
                    ids[part],
                    mask[part],
                    rollout.response_ids.shape[1],
                    temperature=self.config.temperature,
                    chunk=self.config.logprob_chunk,
                    counted=None if counted is None else counted[part],
                )
                for part in micro
            ]
        return joined(parts, micro, rollout, self.ranks)


def _fast_at_bfloat16(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 matrices by instructions of its own."""
    if device.type == "cpu":
        return torch.ops.mkldnn._is_mkldnn_bf16_supported() and (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
