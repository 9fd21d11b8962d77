"""The records that travel between the rooms, and the axis legend.

Axes: B prompts, G responses per prompt (group), N = B * G responses, P prompt tokens
(left-padded), T response tokens (right-padded), S = P + T, V vocabulary, H hidden width.
Rows of one group are adjacent: rows i * G to i * G + G - 1 answer prompt i.
Log-probs and log ratios are natural logarithms.
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Metrics = dict[str, float | int]
"""Values by telemetry name; counts are integers."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Sampled responses with the log-probs of the policy that sampled them.

    Example: two prompts, three responses each, prompts of up to 5 tokens, at most 8 new tokens:
    `prompt_ids` (6, 5), `response_ids` (6, 8), `finished` (6,).
    """

    prompt_ids: Int[Tensor, "N P"]
    """Prompt tokens, left-padded, repeated for each response."""
    prompt_mask: Bool[Tensor, "N P"]
    """True on prompt tokens."""
    response_ids: Int[Tensor, "N T"]
    """Response tokens, right-padded; an end token is part of the response."""
    response_mask: Bool[Tensor, "N T"]
    """True on response tokens; of a conversation, on what the policy sampled."""
    old_logprobs: Float[Tensor, "N T"]
    """Log-probs under the behaviour policy at the sampling temperature, before any top-k or
    top-p; 0 on padding. Importance ratios are formed against these."""
    sampling_logprobs: Float[Tensor, "N T"]
    """Log-probs of the distribution actually sampled from; differs from `old_logprobs` only
    under top-k or top-p."""
    finished: Bool[Tensor, " N"]
    """True where the response ended by itself, False where it was cut at the limit."""
    group_size: int
    """G."""
    fast: bool = False
    """Whether the fast decoder made it, not the model's own modules."""
    attended_mask: Bool[Tensor, "N T"] | None = None
    """True on every real token after the prompt: those sampled, and those that an environment
    added between two turns, which are read but no part of the response. None where all were
    sampled."""

    @property
    def real_mask(self) -> Bool[Tensor, "N T"]:
        """True on every real token after the prompt."""
        return self.response_mask if self.attended_mask is None else self.attended_mask

    @property
    def counted(self) -> Bool[Tensor, "N T"] | None:
        """The response mask where other tokens stand between, else None: what log-probs ask."""
        return None if self.attended_mask is None else self.response_mask

    @property
    def lengths(self) -> Int[Tensor, " N"]:
        """Response tokens of each row."""
        return self.response_mask.sum(1)

    @property
    def extents(self) -> Int[Tensor, " N"]:
        """Real tokens of each row after its prompt."""
        return self.real_mask.sum(1)

    @property
    def input_ids(self) -> Int[Tensor, "N S"]:
        """Prompts followed by responses."""
        return torch.cat([self.prompt_ids, self.response_ids], dim=1)

    @property
    def attention_mask(self) -> Bool[Tensor, "N S"]:
        """True on prompt tokens and all real ones behind them."""
        return torch.cat([self.prompt_mask, self.real_mask], dim=1)

    def select(self, rows: Int[Tensor, " M"]) -> "Rollout":
        """The given rows, as a rollout of groups of the same nominal size."""
        return _select(self, rows)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A rollout with everything the updates need.

    Example: `advantages` (6,) for the rollout above; rows of a group whose rewards are all
    equal hold exactly 0.
    """

    rollout: Rollout
    rewards: Float[Tensor, " N"]
    """Total reward; NaN where it was dropped (and `advantages` is 0, `valid` False)."""
    advantages: Float[Tensor, " N"] | Float[Tensor, "N T"]
    """One per response, or one per token."""
    valid: Bool[Tensor, " N"]
    """False for rows left out of the loss: dropped reward, masked truncation."""
    ref_logprobs: Float[Tensor, "N T"] | None = None
    """Log-probs of the frozen reference, where a KL term is used."""
    weights: Float[Tensor, " N"] | Float[Tensor, "N T"] | None = None
    """Corrections of a train/inference mismatch, per response or per token; None where all 1."""

    def select(self, rows: Int[Tensor, " M"]) -> "Batch":
        """The given rows."""
        return _select(self, rows)

    def state_dict(self) -> dict[str, Any]:
        """The batch as plain values and tensors, for a checkpoint."""
        state = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        rollout = {f.name: getattr(self.rollout, f.name) for f in dataclasses.fields(Rollout)}
        if self.rollout.attended_mask is None:  # as in checkpoints from before conversations
            del rollout["attended_mask"]
        return state | {"rollout": rollout}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device) -> "Batch":
        """The batch that `state_dict` described, on `device`."""

        def moved(values: Mapping[str, Any]) -> dict[str, Any]:
            return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()}

        return cls(**moved(state) | {"rollout": Rollout(**moved(state["rollout"]))})

    def trimmed(self) -> "Batch":
        """The same rows without columns that are padding in all of them."""
        rollout = self.rollout
        ends = (rollout.prompt_mask.any(0).long().argmax(), rollout.extents.max())
        left, length = torch.stack(ends).tolist()  # one wait for the device
        length = max(1, length)
        parts = {
            name: getattr(rollout, name)[:, :length]
            for name in ("response_ids", "response_mask", "old_logprobs", "sampling_logprobs")
        }
        parts |= {n: getattr(rollout, n)[:, left:] for n in ("prompt_ids", "prompt_mask")}
        if rollout.attended_mask is not None:
            parts["attended_mask"] = rollout.attended_mask[:, :length]
        ref = None if self.ref_logprobs is None else self.ref_logprobs[:, :length]
        weights, advantages = self.weights, self.advantages
        if weights is not None and weights.ndim == 2:
            weights = weights[:, :length]
        if advantages.ndim == 2:
            advantages = advantages[:, :length]
        rollout = dataclasses.replace(rollout, **parts)
        return dataclasses.replace(
            self, rollout=rollout, advantages=advantages, ref_logprobs=ref, weights=weights
        )


@dataclass(frozen=True, kw_only=True)
class MinibatchGradient:
    """What a backward pass leaves beside the gradients in the parameters; all detached.

    Example: `loss` () -0.03, `logprobs` and `entropy` (8, 12) for a minibatch of 8 responses.
    """

    loss: Float[Tensor, ""]
    """Of the whole minibatch."""
    logprobs: Float[Tensor, "M T"]
    """Of the response tokens under the policy before the step (nat)."""
    entropy: Float[Tensor, "M T"]
    """Of the policy at these tokens (nat); 0 on padding."""
    packed: bool
    """Whether the rows that went through the policy last went as one packed sequence."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that is counted and told, never silently repaired.

    Example: `Event(name="nonfinite", step=12, data={"site": "gradient", "where": "lm_head"})`.
    """

    name: str
    """What happened, as in telemetry's `event` records."""
    step: int
    """Optimizer updates done before it."""
    data: dict[str, Any] = field(default_factory=dict)
    """Plain values that say where."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What the objective is a function of: the tokens of N responses, as three policies see them.

    Example: for the batch above `logprobs`, `old_logprobs` and `mask` are (6, 8), and
    `advantages` is (6,).
    """

    logprobs: Float[Tensor, "N T"]
    """Log-probs under the policy in training (nat); the only field that carries a gradient."""
    old_logprobs: Float[Tensor, "N T"]
    """Log-probs under the behaviour policy."""
    mask: Bool[Tensor, "N T"]
    """True on response tokens; elsewhere the other fields may hold anything. A turn of a
    conversation is an unbroken run of them."""
    advantages: Float[Tensor, " N"] | Float[Tensor, "N T"]
    """One per response, or one per token."""
    ref_logprobs: Float[Tensor, "N T"] | None = None
    """Log-probs under the frozen reference, where they are known."""
    weights: Float[Tensor, " N"] | Float[Tensor, "N T"] | None = None
    """Constants that multiply the gradient, per response or per token; None where all are 1."""

    @functools.cached_property
    def lengths(self) -> Int[Tensor, " N"]:
        """Response tokens of each row."""
        return self.mask.sum(1)


@dataclass(frozen=True, kw_only=True)
class ObjectiveOutput:
    """Loss to differentiate, and metrics by telemetry name (detached scalars).

    Example: `ObjectiveOutput(loss=tensor(-0.03), metrics={"clip/frac": tensor(0.12)})`.
    """

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Denominators:
    """Global counts, so that micro-batch losses add up to exactly the full-batch loss.

    Example: a minibatch of 8 responses with 70 tokens split in two: both halves are given
    `Denominators(sequences=8, tokens=70)`.
    """

    sequences: int
    """Responses that count in the loss."""
    tokens: int
    """Their response tokens."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """Statistics of a whole minibatch that place and scale a sequence clip; constants.

    Example: `Band(center=tensor(-2e-4), sigma=tensor(0.03))`: the mean of p = -1 lies 2e-4 nat
    below that of p = 1, and token log ratios spread by 0.03 nat.
    """

    center: Float[Tensor, ""]
    """Mean over responses of log M_p - log M_1 (nat)."""
    sigma: Float[Tensor, ""]
    """Population standard deviation of the token log ratios (nat), at least `clip_sigma`."""


def on_host(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars as numbers, at one wait for the device; exact, as all fit a float64."""
    if not values:
        return {}
    home = next((v.device for v in values.values() if v.device.type != "cpu"), None)
    numbers = [v.to(home or v.device, torch.float64) for v in values.values()]
    return dict(zip(values, torch.stack(numbers).tolist(), strict=True))


def _select(record, rows: Tensor):
    """A record of row-aligned tensors, restricted to `rows`."""
    changes: dict[str, Any] = {}
    for item in dataclasses.fields(record):
        value = getattr(record, item.name)
        if isinstance(value, torch.Tensor):
            changes[item.name] = value[rows]
        elif isinstance(value, Rollout):
            changes[item.name] = value.select(rows)
    return dataclasses.replace(record, **changes)
