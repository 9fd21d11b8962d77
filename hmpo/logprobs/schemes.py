"""Four ways through the vocabulary projection, equal in what they give, each the best somewhere.

With U the cost of one product of hidden states (n, H) with the projection (V, H):

    recompute   logits in blocks, computed again in the backward pass           4 U
    store       logits kept, and overwritten by their own gradient              3 U
    frozen      u_t = d log p_t / d x_t formed in the forward pass, where
                the projection has no gradient; the entropy's is recomputed     2 U
    one pass    blocks of whole responses, whose loss is known by itself        3 U

The first three are `Logprobs`; `Plan` says which; the last is `hmpo.logprobs.one_pass`. In all of
them the logits of a block live in one buffer, in the precision of the products, that is overwritten
by their gradient. Rows without an incoming gradient (clipped tokens, groups without advantage) are
left out of the backward products on a CPU, which is exact; elsewhere finding them would make the
host wait.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hmpo.logprobs.fold import blocks, fold, gradient_in_place, statistics_dtype
from hmpo.logprobs.matmul import add_outer, project, times


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a projection is taken."""

    scheme: Literal["recompute", "store", "frozen"] = "recompute"
    rows: int
    """Rows of one block."""
    temperature: float = 1.0
    softcap: float | None = None
    with_entropy: bool = True
    compute: torch.dtype = torch.float32
    """Precision of the products."""


@dataclass(frozen=True)
class Head:
    """The projection in the precision of the products, and the one buffer of logits."""

    plan: Plan
    weight: Tensor
    bias: Tensor | None
    buffer: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, plan: Plan, rows: int) -> "Head":
        """With a buffer for the logits of so many rows."""
        cast = weight.to(plan.compute)
        offset = None if bias is None else bias.to(plan.compute)
        return cls(plan, cast, offset, cast.new_empty(rows, len(cast)))

    def logits(self, x: Tensor) -> Tensor:
        """Raw logits of rows, in the buffer or, if the library has no use for it, elsewhere."""
        out = None if self.buffer is None else self.buffer[: len(x)]
        return project(x, self.weight, self.bias, out)

    def fold(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`hmpo.logprobs.fold.fold` by the plan."""
        plan = self.plan
        return fold(logits, targets, plan.temperature, plan.softcap, plan.with_entropy)

    def differentiate(self, logits: Tensor, rows: "BackwardRows") -> None:
        """`hmpo.logprobs.fold.gradient_in_place` by the plan."""
        gradient_in_place(
            logits,
            rows.targets,
            rows.lse,
            rows.entropy,
            rows.g,
            rows.h,
            self.plan.temperature,
            self.plan.softcap,
        )


class BackwardRows(NamedTuple):
    """What the backward pass knows of each row."""

    hidden: Tensor
    targets: Tensor
    lse: Tensor
    entropy: Tensor
    g: Tensor
    """Gradient of the log-prob."""
    h: Tensor | None
    """Gradient of the entropy."""

    def take(self, rows: slice | Tensor) -> "BackwardRows":
        """Some of the rows."""
        return BackwardRows(
            hidden=self.hidden[rows],
            targets=self.targets[rows],
            lse=self.lse[rows],
            entropy=self.entropy[rows],
            g=self.g[rows],
            h=None if self.h is None else self.h[rows],
        )

    def with_gradient(self) -> Tensor | None:
        """Indices of the rows that have a gradient; None for all of them."""
        if self.g.device.type != "cpu":
            return None
        nonzero = (self.g != 0) if self.h is None else (self.g != 0) | (self.h != 0)
        return None if bool(nonzero.all()) else nonzero.nonzero()[:, 0]


@dataclass
class Gradients:
    """Where the gradients of a head are added up; None where none is wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def wanted(
        cls, needs: tuple[bool, ...], hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> "Gradients":
        """Zeros for weight and bias, in float32 at least; hidden rows are written once."""
        kind = statistics_dtype(weight.dtype)
        return cls(
            torch.empty_like(hidden) if needs[0] else None,
            torch.zeros_like(weight, dtype=kind) if needs[1] else None,
            None if bias is None or not needs[2] else torch.zeros_like(bias, dtype=kind),
        )

    def add(self, head: Head, gradient: Tensor, x: Tensor, rows: slice | Tensor) -> None:
        """What the gradient of the logits of `rows` gives, whose hidden states are `x`."""
        if self.hidden is not None:
            self.hidden[rows] = times(gradient, head.weight).to(self.hidden.dtype)
        if self.weight is not None:
            add_outer(self.weight, gradient, x)
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)

    def like(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
        """The three, in the precision of what they are gradients of."""
        return (
            self.hidden,
            None if self.weight is None else self.weight.to(weight.dtype),
            None if self.bias is None or bias is None else self.bias.to(bias.dtype),
        )


class Logprobs(torch.autograd.Function):
    """hidden (n, H), weight (V, H), bias, targets (n,), plan -> log-probs (n,), entropy (n,)."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, plan):  # type: ignore[override]  # noqa: D102
        n = len(targets)
        if plan.scheme == "store":
            plan = replace(plan, rows=max(1, n))
        picked = hidden.new_empty(n, dtype=statistics_dtype(plan.compute))
        lse, entropy = torch.empty_like(picked), torch.empty_like(picked)
        unit = torch.empty_like(hidden) if plan.scheme == "frozen" else None
        ctx.logits = None
        with torch.autocast(hidden.device.type, enabled=False):
            head = Head.of(weight, bias, plan, min(n, plan.rows))
            for rows in blocks(n, plan.rows):
                x, y = hidden[rows].to(plan.compute), targets[rows]
                logits = head.logits(x)
                picked[rows], lse[rows], entropy[rows] = head.fold(logits, y)
                if unit is not None:
                    ones = torch.ones_like(lse[rows])
                    block = BackwardRows(x, y, lse[rows], entropy[rows], g=ones, h=None)
                    head.differentiate(logits, block)
                    unit[rows] = times(logits, head.weight).to(unit.dtype)
                if plan.scheme == "store":
                    ctx.logits = logits
                del logits  # oneDNN brings its own: never two at a time
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy, unit)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        if not plan.with_entropy:
            ctx.mark_non_differentiable(entropy)
        return picked, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, g, h):  # type: ignore[override]  # noqa: D102
        hidden, weight, bias, targets, lse, entropy, unit = ctx.saved_tensors
        logits, ctx.logits = ctx.logits, None  # overwritten: a second pass computes them again
        h = h if ctx.plan.with_entropy else None
        if g is None and h is None:
            return None, None, None, None, None
        if unit is not None and h is None:
            return unit * g[:, None].to(unit.dtype), None, None, None, None
        g = torch.zeros_like(lse) if g is None else g
        sums = Gradients.wanted(ctx.needs_input_grad, hidden, weight, bias)
        rows = BackwardRows(hidden, targets, lse, entropy, g, h)
        with torch.autocast(hidden.device.type, enabled=False):
            _backward(ctx.plan, sums, weight, bias, rows, logits)
        return *sums.like(weight, bias), None, None


def _backward(
    plan: Plan,
    sums: Gradients,
    weight: Tensor,
    bias: Tensor | None,
    rows: BackwardRows,
    logits: Tensor | None,
) -> None:
    """Add up the gradients of the rows that have any; logits that are given are overwritten."""
    kept = rows.with_gradient()
    if kept is not None:
        rows = rows.take(kept)
        logits = None if logits is None else compacted(logits, kept)
        if sums.hidden is not None:
            sums.hidden.zero_()
    n = len(rows.targets)
    if logits is None:
        head = Head.of(weight, bias, plan, min(n, plan.rows))
    else:
        head, plan = Head(plan, weight.to(plan.compute), None, None), replace(plan, rows=max(1, n))
    for where in blocks(n, plan.rows):
        part = rows.take(where)
        x = part.hidden.to(plan.compute)
        block = head.logits(x) if logits is None else logits
        head.differentiate(block, part)
        sums.add(head, block, x, where if kept is None else kept[where])
        del block


def compacted(logits: Tensor, kept: Tensor) -> Tensor:
    """The kept rows (ascending) moved to the front of the same memory."""
    for rows in blocks(len(kept), max(1, len(logits) // 8)):
        logits[rows] = logits[kept[rows]]
    return logits[: len(kept)]
