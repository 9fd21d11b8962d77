"""Three ways to the logits of the next token of every row.

The fast decoder (`hmpo.sampling.decoder`) for the models that it knows, the model's own modules
with their cache, and whole sequences for any causal module. All take distinct prompts and, for each
row, the prompt that it answers; `advance` reads one token a row, after dropping the rows that are
not kept.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from hmpo.models.policy import is_hugging_face, position_ids, unwrap
from hmpo.sampling.decoder import FastDecoder, why_not_fast
from hmpo.sampling.graph import GraphDecoder

logger = logging.getLogger("hmpo.sampling.responses")

GRAPHS = True
"""Whether the fast decoder's steps become CUDA graphs where there is CUDA."""


def distinct_prompts(
    ids: Int[Tensor, "B P"], mask: Bool[Tensor, "B P"], group_size: int
) -> tuple[Int[Tensor, "D P"], Bool[Tensor, "D P"], Int[Tensor, " N"]]:
    """Prompts that differ, with their mask, and which of them each of the B * G rows answers."""
    marked = torch.where(mask, ids, -1)
    found, prompt_of = marked.unique(dim=0, return_inverse=True)
    if len(found) == len(ids):
        prompt_of = torch.arange(len(ids), device=ids.device)
    else:
        mask = found >= 0
        ids = torch.where(mask, found, 0)
    return ids, mask, prompt_of.repeat_interleave(group_size)


def why_not_decoder(policy: nn.Module, width: int, use_cache: bool, decoder: str) -> str | None:
    """Why `policy` is not sampled by the fast decoder, or None where it is; told in the log."""
    if not use_cache or not is_hugging_face(policy):
        return "no cache"
    slow = "the module path was asked for"
    if decoder == "auto":
        slow = why_not_fast(policy, width)
    if slow is not None:
        logger.info("sampling through the modules of %s: %s", type(policy).__name__, slow)
    return slow


def decoder_kind(device: torch.device) -> type[FastDecoder]:
    """The fast decoder of a device."""
    return GraphDecoder if GRAPHS and device.type == "cuda" else FastDecoder


def products_dtype(policy: nn.Module, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the fast decoder's products: the one asked for, autocast's, or the model's."""
    weights = next(policy.parameters(), torch.empty(0))
    if dtype is not None:
        return dtype
    if weights.dtype == torch.float32 and torch.is_autocast_enabled(weights.device.type):
        return torch.get_autocast_dtype(weights.device.type)
    return weights.dtype


def in_dtype(policy: nn.Module, dtype: torch.dtype | None) -> Callable[..., Any]:
    """`policy` as a function, over a copy in `dtype` of the weights that it has now."""
    if dtype is None:
        return policy
    weights = {
        name: parameter.to(dtype) if parameter.is_floating_point() else parameter
        for name, parameter in policy.named_parameters()
    }
    call = functools.partial(torch.func.functional_call, policy, weights)
    return lambda *args, **kwargs: call(args, kwargs)


class CachedModules:
    """Next-token logits of a Hugging Face model with a key-value cache."""

    def __init__(
        self,
        policy: nn.Module,
        ids: Int[Tensor, "D P"],
        mask: Bool[Tensor, "D P"],
        prompt_of: Int[Tensor, " N"],
        dtype: torch.dtype | None,
    ) -> None:
        """Read the prompts.

        Args:
            policy: a Hugging Face causal LM.
            ids: distinct prompts, left-padded.
            mask: True on prompt tokens.
            prompt_of: the prompt that each row answers.
            dtype: of a copy of the weights; None takes them as they are.
        """
        self.call = in_dtype(policy, dtype)
        self.keep: dict[str, Any] = {"use_cache": True, "return_dict": True}
        if "logits_to_keep" in inspect.signature(unwrap(policy).forward).parameters:
            self.keep["logits_to_keep"] = 1
        positions = position_ids(mask)
        out = self.call(
            input_ids=ids, attention_mask=mask.long(), position_ids=positions, **self.keep
        )
        self.cache = out.past_key_values
        self.cache.batch_select_indices(prompt_of)
        self.logits = out.logits[:, -1][prompt_of]
        self.mask = mask.long()[prompt_of]
        self.position = positions[prompt_of, -1:]

    def advance(self, token: Int[Tensor, " N"], keep: Int[Tensor, " K"] | None) -> None:
        """Read `token`, after dropping all rows but `keep`."""
        if keep is not None:
            token, self.mask, self.position = token[keep], self.mask[keep], self.position[keep]
            self.cache.batch_select_indices(keep)
        self.mask = functional.pad(self.mask, (0, 1), value=1)
        self.position = self.position + 1
        out = self.call(
            input_ids=token[:, None],
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            **self.keep,
        )
        self.cache = out.past_key_values
        self.logits = out.logits[:, -1]


class WholeSequences:
    """Next-token logits by running the whole sequence: any causal module, no cache."""

    def __init__(
        self,
        policy: nn.Module,
        ids: Int[Tensor, "D P"],
        mask: Bool[Tensor, "D P"],
        prompt_of: Int[Tensor, " N"],
        dtype: torch.dtype | None,
        pad: int,
    ) -> None:
        """As `CachedModules`; `pad` fills what follows a row's end."""
        self.call, self.hugging_face = in_dtype(policy, dtype), is_hugging_face(policy)
        # Rows start at the left edge: a causal module without a mask never sees padding then.
        order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
        self.ids = ids.gather(1, order)[prompt_of]
        self.lengths = mask.sum(1)[prompt_of]
        self.pad = pad
        self.logits = self._run()

    def _run(self) -> Float[Tensor, "N V"]:
        out = self.call(self.ids)
        logits = out.logits if self.hugging_face else out
        return logits[torch.arange(len(self.ids), device=self.ids.device), self.lengths - 1]

    def advance(self, token: Int[Tensor, " N"], keep: Int[Tensor, " K"] | None) -> None:
        """Append `token`, after dropping all rows but `keep`."""
        if keep is not None:
            token, self.ids, self.lengths = token[keep], self.ids[keep], self.lengths[keep]
        self.ids = functional.pad(self.ids, (0, 1), value=self.pad)
        self.ids[torch.arange(len(token), device=token.device), self.lengths] = token
        self.lengths = self.lengths + 1
        self.logits = self._run()


Engine = FastDecoder | CachedModules | WholeSequences
