"""From prompts to scored responses: everything of a rollout that precedes its advantages."""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hmpo.config import TrainerConfig
from hmpo.errors import ConfigError
from hmpo.logprobs.responses import token_logprobs
from hmpo.models import decode_responses, encode_prompts
from hmpo.models.policy import autocast
from hmpo.randomness import keyed_generator
from hmpo.rewards import Rewards
from hmpo.sampling.responses import sample_responses
from hmpo.stopwatch import section
from hmpo.types import Event, Metrics, Rollout

logger = logging.getLogger(__name__)

Prompts = Sequence[str] | Sequence[Sequence[int]] | Tensor


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
    recompute: bool = False
    """Whether old log-probs come from the policy's own forward pass even where the sampler's are
    exact to float32 rounding."""

    def __post_init__(self) -> None:
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
    def device(self) -> torch.device:
        """Where the policy's weights are."""
        return next(self.policy.parameters()).device

    def collect(
        self, prompts: Prompts, columns: Mapping[str, Sequence[Any]], *, index: int, step: int
    ) -> Collected:
        """One rollout.

        Args:
            prompts: text (with a tokenizer), lists of token ids, or ids (B, P).
            columns: per-prompt values handed to the reward function.
            index: of the rollout; together with the seed it fixes the randomness.
            step: updates done, for events.
        """
        config = self.config
        with section("sampling"), autocast(self.device, config):
            texts, prompt_ids, prompt_mask = self._encode(prompts)
            rollout = sample_responses(
                self.policy,
                prompt_ids,
                prompt_mask,
                group_size=config.group_size,
                max_length=config.max_length,
                eos_token=config.eos_token,
                pad_token=config.pad_token,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                generator=keyed_generator(config.seed, "rollout", index),
                decoder=config.decoder,
                dtype=torch.bfloat16 if config.sampling_dtype == "bfloat16" else None,
                stop=() if self.tokenizer is None else self.stop,
                tokenizer=self.tokenizer,
            )
        if self.recomputes:
            rollout = dataclasses.replace(
                rollout, old_logprobs=self._logprobs(self.policy, rollout)
            )
        with section("rewards"):
            scored = self._score(texts, rollout, columns, step)
        rewards, by_function, samples, events = scored
        valid = rewards.isfinite()
        if config.mask_truncated:
            valid = valid & rollout.finished
        return Collected(
            rollout=rollout,
            rewards=rewards,
            valid=valid,
            ref_logprobs=None if self.ref is None else self._logprobs(self.ref, rollout),
            metrics=self._describe(rollout, rewards, by_function),
            samples=samples,
            events=events,
        )

    def _encode(self, prompts: Prompts) -> tuple[list[Any], Tensor, Tensor]:
        """(prompts for the reward function, ids (B, P) left-padded, mask (B, P))."""
        if isinstance(prompts, Tensor):
            mask = torch.ones_like(prompts, dtype=torch.bool)
            return prompts.tolist(), prompts.to(self.device), mask.to(self.device)
        if len(prompts) == 0:
            raise ConfigError("prompts: got none, expected at least one prompt")
        if isinstance(prompts[0], str):
            if self.tokenizer is None:
                raise ConfigError("prompts: got text, expected token ids (or pass a tokenizer)")
            ids, mask = encode_prompts(self.tokenizer, cast("list[str]", list(prompts)))
            return list(prompts), ids.to(self.device), mask.to(self.device)
        width = max(len(row) for row in prompts)
        ids = torch.full((len(prompts), width), self.config.pad_token)
        mask = torch.zeros(len(prompts), width, dtype=torch.bool)
        for i, row in enumerate(prompts):
            ids[i, width - len(row) :] = torch.as_tensor(row)
            mask[i, width - len(row) :] = True
        return [list(row) for row in prompts], ids.to(self.device), mask.to(self.device)

    def _score(
        self,
        prompts: list[Any],
        rollout: Rollout,
        columns: Mapping[str, Sequence[Any]],
        step: int,
    ) -> tuple[Tensor, dict[str, list[float]], list[dict[str, Any]], list[Event]]:
        """(total rewards (N,), NaN where dropped; rewards by function; samples; faults)."""
        group = self.config.group_size
        for name, values in columns.items():
            if len(values) != len(prompts):
                raise ConfigError(
                    f"column {name}: got {len(values)} values, expected {len(prompts)} "
                    "(one a prompt)"
                )
        repeated = [prompt for prompt in prompts for _ in range(group)]
        expanded = {k: [v for v in values for _ in range(group)] for k, values in columns.items()}
        ids = [
            row[: int(length)].tolist()
            for row, length in zip(rollout.response_ids.cpu(), rollout.lengths.cpu())
        ]
        if self.tokenizer is None:
            completions: list[Any] = ids
        else:
            completions = decode_responses(
                self.tokenizer, rollout.response_ids, rollout.response_mask, self.stop
            )
        result = self.rewards(repeated, completions, ids, expanded, step=step)
        events = [
            Event(
                name=event.name,
                step=step,
                data={"function": event.function, "sample": event.sample, "detail": event.detail},
            )
            for event in result.events
        ]
        samples = [
            {"prompt": p, "completion": c, "reward": r, "finished": bool(f)}
            for p, c, r, f in zip(repeated, completions, result.total, rollout.finished.tolist())
        ]
        total = torch.tensor(result.total, device=self.device)
        return total, result.by_function, samples, events

    def _logprobs(self, model: nn.Module, rollout: Rollout) -> Tensor:
        """Log-probs of the responses by a model's own forward pass, without gradient."""
        size = self.config.micro_batch_size or len(rollout.finished)
        with section("logprobs"), torch.no_grad(), autocast(self.device, self.config):
            parts = [
                token_logprobs(
                    model,
                    rollout.input_ids[start : start + size],
                    rollout.attention_mask[start : start + size],
                    rollout.response_ids.shape[1],
                    temperature=self.config.temperature,
                    chunk=self.config.logprob_chunk,
                )
                for start in range(0, len(rollout.finished), size)
            ]
        return torch.cat(parts)

    def _describe(
        self, rollout: Rollout, total: Tensor, by_function: Mapping[str, list[float]]
    ) -> Metrics:
        """Metrics of a whole rollout: the same for each of its updates."""
        rewards = total.double()
        known = rewards[rewards.isfinite()]
        lengths = rollout.lengths.double()
        group = self.config.group_size
        within = rewards.view(-1, group)
        whole = within[within.isfinite().all(1)]
        metrics = {
            "reward/mean": _mean(known),
            "reward/std": _variance(known) ** 0.5,
            "reward/within_var": _mean(_variance(whole)) if len(whole) else math.nan,
            "reward/total_var": _variance(known),
            "reward/dropped": (~rewards.isfinite()).sum(),
            "success/k": (known >= 1.0).sum(),
            "success/n": len(known),
            "n_groups": len(within),
            "len/mean": lengths.mean(),
            "len/max": lengths.max(),
            "len/trunc_frac": (~rollout.finished).double().mean(),
            "rollout/fast": float(rollout.fast),
        }
        for name, values in by_function.items():
            column = torch.tensor(values, dtype=torch.float64)
            metrics[f"reward/{name}/mean"] = _mean(column[column.isfinite()])
        return {name: float(value) for name, value in metrics.items()}


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
