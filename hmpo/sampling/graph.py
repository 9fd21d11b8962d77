"""The fast decoder for CUDA: a step that never changes its shape, replayed as one CUDA graph.

A step of a small model is a thousand kernels of a few microseconds, so that launching them costs
several times what they compute. Here a step reads every number that changes (the token, the
position, the column to write) from tensors at fixed places and attends over whole buffers under
a mask, so that it can be captured once and replayed. A graph is captured again when the buffers
of keys and values double and when finished rows leave the batch.

The same step runs without a graph on any device, where it is slower than `FastDecoder`'s: that is
how it is tested, and what is left when a capture fails.
"""

import logging
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hmpo.sampling.decoder import FastDecoder, doubled
from hmpo.sampling.prefill import DistinctPrompts
from hmpo.sampling.weights import as_pairs, rotate

logger = logging.getLogger(__name__)

BUCKET = 256
"""Tokens that the buffers hold at first: columns of nothing cost less than a capture."""


class GraphDecoder(FastDecoder):
    """`FastDecoder` by steps of one shape."""

    def __init__(
        self,
        policy: Any,
        prompts: DistinctPrompts,
        max_length: int,
        dtype: torch.dtype,
        *,
        capacity: int = BUCKET,
    ) -> None:
        """As `FastDecoder`, with buffers that hold numbers from the start."""
        super().__init__(policy, prompts, max_length, dtype, capacity=capacity)
        self.own = self._cleared(self.own)
        self.token = torch.zeros_like(prompts.prompt_of)
        self.column = torch.zeros(1, dtype=torch.long, device=prompts.mask.device)
        self.graphs = prompts.mask.is_cuda
        """Whether steps become graphs; False for good once a capture has failed."""
        self.captures = 0
        self._fresh()

    def advance(self, token: Int[Tensor, " N"], keep: Int[Tensor, " K"] | None) -> None:
        """Read `token`, after dropping all rows but `keep`; the logits are overwritten."""
        if keep is not None:
            self._select(keep)
            self.own = self._cleared(self.own)
            token, self.token = token[keep], self.token[keep]
            self._fresh()
        if self.made == self.own.shape[4]:
            self.own = self._cleared(doubled(self.own))
            self._fresh()
        self.token.copy_(token)
        self.column.fill_(self.made)
        if self.graphs and self.warm and self.graph is None:
            self.graph = self._captured()
        if self.graph is None:
            self._step()
            self.warm = True
        else:
            self.graph.replay()
        self.made += 1

    def _fresh(self) -> None:
        """Shapes have changed: the next step runs as it is, which warms up, then comes a graph."""
        if self.column.is_cuda:
            torch.cuda.synchronize(self.column.device)  # the old one may be running still
        self.graph: Any = None
        self.warm = False

    def _cleared(self, x: Float[Tensor, "*L T D"]) -> Float[Tensor, "*L T D"]:
        """Nothing but numbers where no token lies yet: 0 times what memory held may be NaN."""
        x[..., self.made :, :] = 0
        return x

    def _captured(self) -> Any | None:
        """The graph of one step; None, with a message, where CUDA cannot capture it."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._step()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            logger.warning("decoding without CUDA graphs, slower: no capture (%s)", reason)
            self.graphs = False
            return None
        self.captures += 1
        return graph

    def _step(self) -> None:
        self.position += 1
        places = torch.arange(self.own.shape[4], device=self.column.device)
        self.later = places > self.column
        self.logits = self._read(self.token)

    def _store(self, layer: int, kv: Tensor, turn: Tensor) -> None:
        """Put the newest keys and values into the column that the device knows."""
        own = self.own[layer]
        shape = (kv.shape[0], *own.shape[:2], own.shape[4])
        turned = self.scratch("turned", *shape, dtype=own.dtype)
        rotate(kv, turn, as_pairs(turned))
        own.index_copy_(3, self.column, turned.permute(1, 2, 0, 3)[..., None, :])

    def _columns(self) -> tuple[int, Tensor | None]:
        """All columns, and those of later tokens."""
        return self.own.shape[4], self.later
