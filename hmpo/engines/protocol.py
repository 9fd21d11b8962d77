"""What draws rollouts in place of the sampler of this package."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from hmpo.sampling.options import SamplingOptions
from hmpo.types import Rollout


@dataclass(frozen=True, kw_only=True)
class VersionedRollout:
    """Responses, and which weights drew each of their tokens.

    Example: a rollout of 6 responses and up to 8 tokens, `versions` (6, 8), all of them 3.
    """

    rollout: Rollout
    """`sampling_logprobs` are the engine's own, and so are `old_logprobs`."""
    versions: Int[Tensor, "N T"]
    """The `version` of the weights that drew a token, -1 on padding."""


@runtime_checkable
class RolloutEngine(Protocol):
    """Draws whole responses with weights that it is given."""

    def start(self) -> None:
        """Begin to get ready, without waiting; further calls do nothing."""

    def sync(self, policy: nn.Module, version: int) -> None:
        """Take the policy's present weights, and call them `version` from now on.

        Args:
            policy: a Hugging Face causal LM.
            version: another number than that of any weights before.

        Raises:
            EngineError: one line; the weights may not have arrived.
        """

    def sample(
        self,
        prompt_ids: Int[Tensor, "B P"],
        prompt_mask: Bool[Tensor, "B P"],
        options: SamplingOptions,
        *,
        group_size: int,
        generator: torch.Generator,
        tokenizer: Any = None,
    ) -> VersionedRollout:
        """Draw `group_size` responses to each prompt; rows of one prompt are adjacent.

        Args:
            prompt_ids: token ids, left-padded.
            prompt_mask: True on prompt tokens.
            options: how responses are drawn.
            group_size: G.
            generator: source of randomness; an engine may draw other tokens from it than the
                sampler of this package.
            tokenizer: from token ids to text, for `options.stop`.

        Raises:
            EngineError: one line: no response, or one that is not what was asked for.
        """
        ...

    def close(self) -> None:
        """Let go of all that it holds; further calls do nothing."""
