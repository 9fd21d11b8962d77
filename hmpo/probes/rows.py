"""The rows that a policy is asked with, and the truth about them: each row alone, unpadded."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hmpo.errors import ModelError
from hmpo.models.evaluation import evaluating
from hmpo.models.probe import longest_row
from hmpo.models.tokens import left_padded

LENGTHS = ((3, 4), (7, 1), (5, 6), (2, 3))
"""Tokens of prompt and response of each row."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A few prompts of several lengths with responses.

    Example: four rows, `ids` (4, 13) and `mask` (4, 13), of which the last 6 columns are responses.
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    ids: Int[Tensor, "n S"]
    """Prompts padded on the left, responses on the right."""
    mask: Bool[Tensor, "n S"]
    """True on real tokens."""

    @property
    def length(self) -> int:
        """Columns of the responses, T."""
        return max(map(len, self.responses))

    @property
    def prompt_ids(self) -> Int[Tensor, "n P"]:
        """Of the prompts alone."""
        return self.ids[:, : -self.length]

    @property
    def prompt_mask(self) -> Bool[Tensor, "n P"]:
        """Of the prompts alone."""
        return self.mask[:, : -self.length]

    def select(self, rows: list[int]) -> "Rows":
        """Some of them, padded anew."""
        return padded([self.prompts[k] for k in rows], [self.responses[k] for k in rows], self.ids)


def padded(prompts: list[list[int]], responses: list[list[int]], like: Tensor) -> Rows:
    """Rows in a batch, on the device of `like`."""
    ids, mask = left_padded(prompts, 0)
    length = max(map(len, responses))
    tail = torch.zeros(len(responses), length, dtype=ids.dtype)
    real = torch.zeros(len(responses), length, dtype=torch.bool)
    for k, response in enumerate(responses):
        tail[k, : len(response)], real[k, : len(response)] = torch.tensor(response), True
    return Rows(
        prompts=prompts,
        responses=responses,
        ids=torch.cat([ids, tail], 1).to(like.device),
        mask=torch.cat([mask.bool(), real], 1).to(like.device),
    )


def rows_for(policy: nn.Module, vocabulary: int) -> Rows:
    """Rows that the policy can read, of the first tokens of its vocabulary.

    Raises:
        ModelError: the policy reads fewer tokens than the rows have.
    """
    longest, limit = max(map(sum, LENGTHS)), longest_row(policy)
    if limit is not None and limit < longest:
        raise ModelError(f"policy: reads rows of {limit} tokens, the probes need {longest}")
    prompts: list[list[int]] = []
    responses: list[list[int]] = []
    for k, (asked, answered) in enumerate(LENGTHS):
        tokens = [(17 * i * i + 5 * i + 7 * k + 3) % vocabulary for i in range(asked + answered)]
        prompts.append(tokens[:asked])
        responses.append(tokens[asked:])
    return padded(prompts, responses, next(policy.parameters()))


def logits_alone(policy: nn.Module, prompt: list[int], response: list[int]) -> Any:
    """Logits (L, V) that predict a response, by the model's own forward pass on this row only."""
    device = next(policy.parameters()).device
    ids = torch.tensor([prompt + response], device=device)
    out = policy(input_ids=ids, use_cache=False, return_dict=True).logits
    return out[0, len(prompt) - 1 : -1]


def logprobs_alone(
    policy: nn.Module, prompt: list[int], response: list[int], temperature: float = 1.0
) -> Float[Tensor, " L"]:
    """Log-probs of a response, dropout off; with the gradient if gradients are on."""
    with evaluating(policy):
        logits = logits_alone(policy, prompt, response)
        wide = torch.promote_types(logits.dtype, torch.float32)
        table = (logits.to(wide) / temperature).log_softmax(-1)
        chosen = torch.tensor(response, device=logits.device)[:, None]
        return table.gather(-1, chosen)[:, 0]
