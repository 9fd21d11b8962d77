"""The fast decoder for CUDA: a step that never changes its shape, replayed as one CUDA graph.

A step of a small model is a thousand kernels of a few microseconds, so that launching them costs
several times what they compute. Here a step reads every number that changes (the token, the
position, the column to write) from tensors at fixed places, attends over whole buffers under a
mask, draws the next token and records it, all without asking the host; so it can be captured
once and replayed. The host looks every `LOOK` steps whether rows have ended. A graph is captured
again when the buffers of keys and values double and when finished rows leave the batch.

The same step runs without a graph on any device, where it is slower than `FastDecoder`: that is
how it is tested, and what is left when a capture fails.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hmpo.decoder import FastDecoder, _both, _doubled
from hmpo.decoder_weights import rotate

logger = logging.getLogger(__name__)

LOOK = 8
"""Steps between two looks of the host at which rows have ended."""
BUCKET = 256
"""Tokens that the buffers hold at first: a masked column costs less than a capture."""
COMPACT = 0.5
"""Finished rows leave once this share of the batch has ended: each time costs a capture."""

Draw = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass
class Drawn:
    """Tokens of all rows of a rollout and what belongs to them, written on the device."""

    tokens: Int[Tensor, "N T"]
    mask: Bool[Tensor, "N T"]
    old: Float[Tensor, "N T"]
    sampling: Float[Tensor, "N T"]
    finished: Bool[Tensor, " N"]
    pad: int

    @classmethod
    def empty(cls, rows: int, length: int, pad: int, logits: Tensor) -> "Drawn":
        """Padding everywhere."""
        device = logits.device
        kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
        old = torch.zeros(rows, length, dtype=kind, device=device)
        return cls(
            tokens=torch.full((rows, length), pad, device=device),
            mask=torch.zeros(rows, length, dtype=torch.bool, device=device),
            old=old,
            sampling=torch.zeros_like(old),
            finished=torch.zeros(rows, dtype=torch.bool, device=device),
            pad=pad,
        )


class StaticDecoder(FastDecoder):
    """A whole rollout of a recognised model by steps of one shape."""

    def __init__(
        self,
        policy: Any,
        ids: Int[Tensor, "B P"],
        mask: Bool[Tensor, "B P"],
        prompt_of: Int[Tensor, " N"],
        max_length: int,
        dtype: torch.dtype,
        *,
        bucket: int = BUCKET,
        graphs: bool = True,
    ) -> None:
        """Copy the weights and read the prompts, as `FastDecoder` does.

        Args:
            policy: the model, see `why_not_fast`.
            ids: distinct prompts, left-padded.
            mask: True on prompt tokens.
            prompt_of: the prompt that each row answers.
            max_length: longest response.
            dtype: of the products.
            bucket: tokens that the buffers hold at first.
            graphs: whether steps become CUDA graphs; nothing else than CUDA has them.
        """
        super().__init__(policy, ids, mask, prompt_of, max_length, dtype)
        self.length = max_length
        self.graphs = graphs and mask.is_cuda
        self.graph: Any = None
        self.captures = 0
        self.pool = torch.cuda.graph_pool_handle() if self.graphs else None
        capacity = min(bucket, max_length)
        self.own = [
            _both(lambda x: x.new_zeros(*x.shape[:2], capacity, x.shape[3]), pair)
            for pair in self.own
        ]
        rows = len(self.prompt_of)
        self.column = torch.zeros(1, dtype=torch.long, device=mask.device)
        self.turn = torch.zeros_like(self.column)
        self.rows = torch.arange(rows, device=mask.device)
        self.token = torch.zeros_like(self.rows)
        self.alive = torch.ones(rows, dtype=torch.bool, device=mask.device)

    def rollout(
        self,
        draw: Draw,
        uniforms: Callable[[int], Float[Tensor, "K N"]],
        stop: Int[Tensor, " S"],
        out: Drawn,
    ) -> None:
        """Draw until every row has ended or is `max_length` tokens long.

        Args:
            draw: (logits, uniform numbers) to (token, log-prob, log-prob as drawn); without
                shapes or decisions that depend on values.
            uniforms: the numbers of the next K steps, one a row of the rollout, whether it is
                finished or not. Steps past the end of the last row are asked for too.
            stop: tokens that end a row.
            out: where all is written.
        """
        self.draw, self.stop, self.out = draw, stop, out
        self.uniform = uniforms(1).to(self.rows.device)
        self._record()
        self.uniform = uniforms(LOOK).to(self.rows.device)
        done = 1
        while done < self.length and self._keep_living():
            steps = min(LOOK, self.length - done)
            if done > 1:
                self.uniform.copy_(uniforms(LOOK))
            self.turn.zero_()
            self._make_room(steps)
            self._run(steps)
            self.made += steps
            done += steps

    # ----------------------------------------------------------------------- between the steps

    def _keep_living(self) -> bool:
        """Whether any row is alive; drops the others where they are many. The host waits."""
        alive = int(self.alive.sum())
        if 0 < alive <= (1 - COMPACT) * len(self.rows):
            keep = self.alive.nonzero()[:, 0]
            self._select(keep)
            self.own = [_both(self._cleared, pair) for pair in self.own]
            self.rows, self.alive = self.rows[keep], self.alive[keep]
            self.logits, self.token = self.logits[keep], self.token[keep]
            self.graph = None
        return alive > 0

    def _make_room(self, steps: int) -> None:
        """Double the buffers of keys and values until `steps` more tokens fit."""
        while self.made + steps > self.own[0][0].shape[2]:
            self.own = [_both(lambda x: self._cleared(_doubled(x)), pair) for pair in self.own]
            self.graph = None

    def _cleared(self, x: Tensor) -> Tensor:
        """Nothing but numbers where no token lies yet: 0 times what memory held may be NaN."""
        x[:, :, self.made :] = 0
        return x

    def _run(self, steps: int) -> None:
        """So many steps: the first after a change as it is, which warms up, then by its graph."""
        if self.graphs and self.graph is None:
            self._step()
            steps -= 1
            self.graph = self._captured()
        for _ in range(steps):
            if self.graph is None:
                self._step()
            else:
                self.graph.replay()

    def _captured(self) -> Any | None:
        """The graph of one step; None, with a message, where CUDA cannot capture it."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                self._step()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            logger.warning("decoding without CUDA graphs, slower: no capture (%s)", reason)
            self.graphs = False
            return None
        self.captures += 1
        return graph

    # ---------------------------------------------------------------------------- inside a step

    def _step(self) -> None:
        """Read the last token of every row, draw the next, record it."""
        self.position += 1
        capacity = self.own[0][0].shape[2]
        self.later = torch.arange(capacity, device=self.column.device) > self.column
        self.logits.copy_(self._read(self.token))
        self.column += 1
        self._record()
        self.turn += 1

    def _store(self, own: tuple[Tensor, Tensor], k: Tensor, v: Tensor, turn: list[Tensor]) -> None:
        """As in `FastDecoder`, at the column that the device counts."""
        turned = self._buffer("turned", *k.shape)
        rotate(k, turn, turned)
        own[0].index_copy_(2, self.column, turned.transpose(0, 1)[:, :, None])
        own[1].index_copy_(2, self.column, v.transpose(0, 1)[:, :, None])

    def _columns(self) -> tuple[int, Tensor | None]:
        """All of them, those of later tokens masked."""
        return self.own[0][0].shape[2], self.later

    def _record(self) -> None:
        """Draw a token for every row, and write down those of the living."""
        uniform = self.uniform.index_select(0, self.turn)[0].index_select(0, self.rows)
        token, old, drawn = self.draw(self.logits, uniform)
        self._write(token, old, drawn)

    def _write(self, token: Tensor, old: Tensor, drawn: Tensor) -> None:
        out, alive, dead = self.out, self.alive, ~self.alive
        place = self.rows, self.column.expand(len(self.rows))
        out.tokens.index_put_(place, token.masked_fill(dead, out.pad))
        out.mask.index_put_(place, alive)
        out.old.index_put_(place, old.masked_fill(dead, 0))
        out.sampling.index_put_(place, drawn.masked_fill(dead, 0))
        ended = alive & (token[:, None] == self.stop).any(1)
        out.finished.index_put_((self.rows,), ended | out.finished.index_select(0, self.rows))
        alive &= ~ended
        self.token.copy_(token)
