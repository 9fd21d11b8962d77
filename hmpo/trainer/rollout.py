"""From prompts to scored responses: everything of a rollout that precedes its advantages."""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hmpo.config import TrainerConfig
from hmpo.environments import Environments
from hmpo.logprobs.responses import token_logprobs
from hmpo.models.chat import PromptOptions
from hmpo.models.policy import autocast
from hmpo.models.probe import policy_facts
from hmpo.randomness import keyed_generator, keyed_seed
from hmpo.rewards import RewardResult, Rewards
from hmpo.sampling.options import SamplingOptions
from hmpo.sampling.responses import sample_rollout
from hmpo.stopwatch import section
from hmpo.trainer.conversation import Conversations, converse
from hmpo.trainer.conversation_rewards import environment_events, refuse_given, scored_parts
from hmpo.trainer.prompts import EncodedPrompts, Prompts, prompts_for
from hmpo.trainer.responses import completions_of, repeated_columns, reward_events, with_ends
from hmpo.types import Event, Metrics, Rollout

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ScoredResponses:
    """Responses to some prompts, and what the reward functions say of them.

    Example: 2 prompts, groups of 4: `rewards` (8,), 8 prompts, 8 completions.
    """

    rollout: Rollout
    rewards: Float[Tensor, " N"]
    """Total rewards; NaN where dropped."""
    prompts: list[Any]
    """As given, repeated for each response."""
    completions: list[Any]
    """Text up to the first stop string, which is the assistant's message where the prompt is a
    conversation; or token ids where there is no tokenizer."""
    columns: dict[str, list[Any]]
    """By name, a value for each response."""
    result: RewardResult
    """Rewards by function, and faults."""
    conversations: Conversations | None = None
    """Where the policy talked with environments."""


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

    Raises:
        ConfigError: no prompts, text without a tokenizer, or a column of another length.
        RewardError: a reward function gave something unusable, and that is not to be skipped.
        ConversationError: an environment did.
    """
    shared = (policy, prompts, config, options, group_size, generator)
    if environments is not None:
        talked = _talked(*shared, columns, environments, prompt_options)
        with section("rewards"):
            by_response = repeated_columns(columns, len(talked.openings) // group_size, group_size)
            parts = scored_parts(talked, by_response, rewards, step=step, seed=reward_seed)
        return ScoredResponses(**parts)
    rollout, asked = _sampled(*shared, tokenizer, prompt_options)
    with section("rewards"):
        repeated = [prompt for prompt in asked.given for _ in range(group_size)]
        completions, token_ids = completions_of(rollout, tokenizer, options.stop, asked)
        by_response = repeated_columns(columns, len(asked.given), group_size)
        result = rewards(repeated, completions, token_ids, by_response, step=step, seed=reward_seed)
    return ScoredResponses(
        rollout=rollout,
        rewards=torch.tensor(result.total, device=rollout.finished.device),
        prompts=repeated,
        completions=completions,
        columns=by_response,
        result=result,
    )


def _sampled(
    policy: nn.Module,
    prompts: Prompts,
    config: TrainerConfig,
    options: SamplingOptions,
    group_size: int,
    generator: torch.Generator,
    tokenizer: Any,
    prompt_options: PromptOptions | None,
) -> tuple[Rollout, EncodedPrompts]:
    """One turn for each response, and the prompts that were asked."""
    device = next(policy.parameters()).device
    with section("sampling"), autocast(device, config):
        asked = prompts_for(policy, prompts, tokenizer, config, prompt_options)
        rollout = sample_rollout(
            policy,
            asked.ids.to(device),
            asked.mask.to(device),
            with_ends(options, asked.ends),
            group_size=group_size,
            generator=generator,
            tokenizer=tokenizer,
        )
    return rollout, asked


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
    """Prompt, completion, reward and `finished` of each response."""
    events: list[Event]
    """Reward faults."""


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
    recompute: bool = False
    """Whether old log-probs come from the policy's own forward pass even where the sampler's are
    exact to float32 rounding."""

    def __post_init__(self) -> None:
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
        config = self.config
        rounded = config.autocast == "bfloat16" or config.sampling_dtype == "bfloat16"
        half = (torch.bfloat16, torch.float16)
        return self.recompute or rounded or any(p.dtype in half for p in self.policy.parameters())

    @property
    def options(self) -> SamplingOptions:
        """How its rollouts are drawn."""
        return sampling_options(self.config, () if self.tokenizer is None else self.stop)

    @property
    def device(self) -> torch.device:
        """Where the policy's weights are."""
        return next(self.policy.parameters()).device

    def collect(
        self, prompts: Prompts, columns: Mapping[str, Sequence[Any]], *, index: int, step: int
    ) -> Collected:
        """One rollout.

        Args:
            prompts: text or messages (with a tokenizer), lists of token ids, or ids (B, P).
            columns: per-prompt values handed to the reward function.
            index: of the rollout; together with the seed it fixes the randomness.
            step: updates done, for events.
        """
        config = self.config
        scored = sample_and_score(
            self.policy,
            prompts,
            columns,
            config=config,
            options=self.options,
            rewards=self.rewards,
            group_size=config.group_size,
            generator=keyed_generator(config.seed, "rollout", index),
            tokenizer=self.tokenizer,
            step=step,
            reward_seed=keyed_seed(config.seed, "rewards", index),
            prompt_options=self.prompt_options,
            environments=self.environments,
        )
        rollout, rewards = scored.rollout, scored.rewards
        if self.recomputes:
            rollout = dataclasses.replace(
                rollout, old_logprobs=self._logprobs(self.policy, rollout)
            )
        valid = rewards.isfinite()
        if config.mask_truncated:
            valid = valid & rollout.finished
        return Collected(
            rollout=rollout,
            rewards=rewards,
            valid=valid,
            ref_logprobs=None if self.ref is None else self._logprobs(self.ref, rollout),
            metrics=self._describe(rollout, rewards, scored),
            samples=_samples(scored),
            events=reward_events(scored.result, step)
            + environment_events(scored.conversations, step),
        )

    def _logprobs(self, model: nn.Module, rollout: Rollout) -> Tensor:
        """Log-probs of the responses by a model's own forward pass, without gradient."""
        size = self.config.micro_batch_size or len(rollout.finished)
        counted = rollout.counted
        with section("logprobs"), torch.no_grad(), autocast(self.device, self.config):
            parts = [
                token_logprobs(
                    model,
                    rollout.input_ids[start : start + size],
                    rollout.attention_mask[start : start + size],
                    rollout.response_ids.shape[1],
                    temperature=self.config.temperature,
                    chunk=self.config.logprob_chunk,
                    counted=None if counted is None else counted[start : start + size],
                )
                for start in range(0, len(rollout.finished), size)
            ]
        return torch.cat(parts)

    def _describe(self, rollout: Rollout, total: Tensor, scored: ScoredResponses) -> Metrics:
        """Metrics of a whole rollout: the same for each of its updates."""
        rewards = total.double()
        finite = rewards[rewards.isfinite()]
        lengths = rollout.lengths.double()
        groups = rewards.view(-1, self.config.group_size)
        whole_groups = groups[groups.isfinite().all(1)]
        within = _mean(_variance(whole_groups)) if len(whole_groups) else math.nan
        metrics = {
            "reward/mean": _mean(finite),
            "reward/std": _variance(finite) ** 0.5,
            "reward/within_var": within,
            "reward/total_var": _variance(finite),
            "reward/dropped": (~rewards.isfinite()).sum(),
            "success/k": (finite >= self.rewards.success).sum(),
            "success/n": len(finite),
            "n_groups": len(groups),
            "len/mean": lengths.mean(),
            "len/max": lengths.max(),
            "len/trunc_frac": (~rollout.finished).double().mean(),
            "rollout/fast": float(rollout.fast),
        }
        result, talked = scored.result, scored.conversations
        metrics |= {} if talked is None else talked.metrics
        metrics |= {f"logged/{name}": value for name, value in result.metrics.items()}
        for name, values in result.by_function.items():
            column = torch.tensor(values, dtype=torch.float64)
            metrics[f"reward/{name}/mean"] = _mean(column[column.isfinite()])
        return {name: float(value) for name, value in metrics.items()}


def _samples(scored: ScoredResponses) -> list[dict[str, Any]]:
    """Of each response its prompt and columns, and what came of it, by name.

    `columns` and `extra` are there where the task has columns, or a reward function told some.
    """
    finished = scored.rollout.finished.tolist()
    samples = []
    for i, (prompt, completion) in enumerate(zip(scored.prompts, scored.completions)):
        sample = {
            "prompt": prompt,
            "completion": completion,
            "reward": scored.result.total[i],
            "finished": bool(finished[i]),
            "rewards": {name: column[i] for name, column in scored.result.by_function.items()},
        }
        for key, table in (("columns", scored.columns), ("extra", scored.result.extras)):
            if table:
                sample[key] = {name: column[i] for name, column in table.items()}
        samples.append(sample)
    return samples


def _fast_at_bfloat16(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 matrices by instructions of its own."""
    if device.type == "cpu":
        return torch.ops.mkldnn._is_mkldnn_bf16_supported() and (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def _mean(values: Tensor) -> Tensor:
    """Mean, or NaN of nothing."""
    return values.sum() / len(values)


def _variance(values: Tensor) -> Tensor:
    """Unbiased variance over the last axis; NaN where fewer than two values tell none."""
    count = values.shape[-1]
    centred = values - values.sum(-1, keepdim=True) / count
    return centred.square().sum(-1) / max(0, count - 1)
