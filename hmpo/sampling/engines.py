"""Three ways to the logits of the next token of every row.

The fast decoder (`hmpo.sampling.decoder`) for the models that it knows, the model's own modules
with their cache, and whole sequences for any causal module. All take distinct prompts and, for each
row, the prompt that it answers; `advance` reads one token a row, after dropping the rows that are
not kept.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from hmpo.models.cached import CachedModules
from hmpo.models.policy import embeddable, is_hugging_face, unwrap
from hmpo.models.probe import policy_facts
from hmpo.sampling.decoder import FastDecoder, why_not_fast
from hmpo.sampling.graph import GraphDecoder
from hmpo.sampling.options import SamplingOptions
from hmpo.sampling.prefill import DistinctPrompts

logger = logging.getLogger(__name__)

GRAPHS = True
"""Whether the fast decoder's steps become CUDA graphs where there is CUDA."""


def takes_fast_decoder(policy: nn.Module, options: SamplingOptions, prompt_width: int) -> bool:
    """Whether the fast decoder samples from `policy`; the log says why the modules do instead.

    Args:
        policy: any causal module.
        options: of the rollout.
        prompt_width: P, of the padded prompts.
    """
    if not options.use_cache or not is_hugging_face(policy):
        return False
    reason: str | None = "the module path was asked for"
    if options.decoder == "auto":
        reason = why_not_fast(policy, prompt_width + options.max_length)
    if reason is not None:
        logger.info("sampling through the modules of %s: %s", type(policy).__name__, reason)
    return reason is None


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
        name: value.to(dtype) if value.is_floating_point() and not kept_exact(name) else value
        for name, value in (*policy.named_parameters(), *policy.named_buffers())
    }
    call = functools.partial(torch.func.functional_call, policy, weights)
    return lambda *args, **kwargs: call(args, kwargs)


def kept_exact(name: str) -> bool:
    """Whether a buffer keeps its dtype: rotary frequencies.

    transformers holds them in float32 in a model of any dtype; rounded, they would turn far
    positions by whole radians.
    """
    return name.endswith("inv_freq")


class WholeSequences:
    """Next-token logits by running the whole sequence: any causal module, no cache."""

    def __init__(
        self,
        policy: nn.Module,
        prompts: DistinctPrompts,
        dtype: torch.dtype | None,
        pad_token: int,
    ) -> None:
        """Read the prompts.

        Args:
            policy: any causal module.
            prompts: what the rows answer.
            dtype: of a copy of the weights; None takes them as they are.
            pad_token: fills what follows a row's end.
        """
        ids, mask, prompt_of = prompts.ids, prompts.mask, prompts.prompt_of
        self.call, self.hugging_face = in_dtype(policy, dtype), is_hugging_face(policy)
        self.together = policy_facts(policy).bare_padding
        """Whether rows of several lengths may share a batch; else each goes alone."""
        # Rows start at the left edge: a causal module without a mask never sees padding then.
        order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
        self.ids = ids.gather(1, order)[prompt_of]
        self.lengths = mask.sum(1)[prompt_of]
        pad = torch.tensor([[pad_token]])
        self.pad_token = int(embeddable(policy, pad, torch.zeros_like(pad, dtype=torch.bool)))
        self.logits = self._run()

    def _run(self) -> Float[Tensor, "N V"]:
        if self.together:
            rows = torch.arange(len(self.ids), device=self.ids.device)
            return self._logits(self.ids)[rows, self.lengths - 1]
        pairs = zip(self.ids, self.lengths.tolist())
        return torch.cat([self._logits(row[None, :length])[:, -1] for row, length in pairs])

    def _logits(self, ids: Int[Tensor, "n S"]) -> Float[Tensor, "n S V"]:
        if not self.hugging_face:
            return self.call(ids)
        return self.call(input_ids=ids, use_cache=False, return_dict=True).logits

    def advance(self, token: Int[Tensor, " N"], keep: Int[Tensor, " K"] | None) -> None:
        """Append `token`, after dropping all rows but `keep`."""
        if keep is not None:
            token, self.ids, self.lengths = token[keep], self.ids[keep], self.lengths[keep]
        self.ids = functional.pad(self.ids, (0, 1), value=self.pad_token)
        self.ids[torch.arange(len(token), device=token.device), self.lengths] = token
        self.lengths = self.lengths + 1
        self.logits = self._run()


Engine = FastDecoder | CachedModules | WholeSequences


@contextlib.contextmanager
def arithmetic(device: torch.device, *, fast: bool) -> Iterator[None]:
    """The fast decoder chooses the dtype of each product itself; the modules follow autocast."""
    if not fast:
        yield
        return
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        yield


def start_engine(
    policy: nn.Module, prompts: DistinctPrompts, options: SamplingOptions, *, fast: bool
) -> Engine:
    """The engine of a rollout, with the prompts read.

    Args:
        policy: any causal module, in evaluation mode.
        prompts: what the rows answer.
        options: of the rollout.
        fast: what `takes_fast_decoder` said.
    """
    if fast:
        device = prompts.mask.device
        dtype = products_dtype(policy, options.dtype)  # autocast says, which is off below
        with arithmetic(device, fast=True):
            return decoder_kind(device)(policy, prompts, options.max_length, dtype)
    if options.use_cache and is_hugging_face(policy):
        facts = policy_facts(policy)
        if facts.cache:
            return CachedModules(
                in_dtype(policy, options.dtype),
                unwrap(policy),
                prompts.ids,
                prompts.mask,
                prompts.prompt_of,
                positions=facts.positions,
            )
        logger.info(
            "sampling from %s by whole sequences, which is slow: its cache does not give the "
            "logits of the whole sequence (%s)",
            type(unwrap(policy)).__name__,
            facts.obstacles["cache"],
        )
    return WholeSequences(policy, prompts, options.dtype, options.pad_token)
