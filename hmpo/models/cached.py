"""Rows that a transformers model reads token by token, with its own cache."""

import inspect
from collections.abc import Callable
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn import functional

from hmpo.models.policy import position_ids

CACHE_NAMES = ("past_key_values", "cache_params")
"""Keywords of `forward` under which transformers' models take a cache, and fields of what they
return: attention and hybrids, state-space models."""


class CachedModules:
    """Next-token logits of a transformers model by its own modules and cache.

    A prompt is read once for all rows that answer it. Whether a model does this rightly is what
    `hmpo.models.probe` finds out.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        core: nn.Module,
        ids: Int[Tensor, "B P"],
        mask: Bool[Tensor, "B P"],
        prompt_of: Int[Tensor, " N"],
        *,
        positions: bool = True,
    ) -> None:
        """Read the prompts.

        Args:
            call: the model, or a function that runs it.
            core: the transformers model in it, whose signature is read.
            ids: distinct prompts, left-padded.
            mask: True on prompt tokens.
            prompt_of: the prompt that each row answers.
            positions: whether to number the tokens for the model.
        """
        self.call, self.numbered = call, positions
        accepted = inspect.signature(core.forward).parameters
        self.keep: dict[str, Any] = {"use_cache": True, "return_dict": True}
        if "logits_to_keep" in accepted:
            self.keep["logits_to_keep"] = 1
        self.name = next((name for name in CACHE_NAMES if name in accepted), CACHE_NAMES[0])
        self.position, self.mask = position_ids(mask), mask.long()
        self._read(ids)
        self._select(prompt_of)
        self.logits = self.logits[prompt_of]
        self.position = self.position[:, -1:]

    def advance(self, token: Int[Tensor, " N"], keep: Int[Tensor, " K"] | None) -> None:
        """Read `token`, after dropping all rows but `keep`."""
        if keep is not None:
            token = token[keep]
            self._select(keep)
        self.mask = functional.pad(self.mask, (0, 1), value=1)
        self.position = self.position + 1
        self._read(token[:, None], {self.name: self.cache})

    def _read(self, ids: Tensor, cache: dict[str, Any] | None = None) -> None:
        inputs = {"position_ids": self.position} if self.numbered else {}
        if cache is None or self.name == CACHE_NAMES[0]:
            inputs["attention_mask"] = self.mask  # a state that has read the prompt needs none
        out = self.call(input_ids=ids, **inputs, **(cache or {}), **self.keep)
        self.cache = getattr(out, self.name)
        self.logits = out.logits[:, -1]

    def _select(self, rows: Tensor) -> None:
        select_rows(self.cache, rows)
        self.mask, self.position = self.mask[rows], self.position[rows]


def select_rows(cache: Any, rows: Int[Tensor, " K"]) -> None:
    """The given rows of a cache, in place, repeated where they are named twice."""
    for layer in cache.layers:
        # Layers with a recurrent state know one selection only, by the name of beam search.
        select = getattr(layer, "batch_select_indices", None)
        if select is None or hasattr(layer, "recurrent_states"):
            select = layer.reorder_cache
        select(rows)
