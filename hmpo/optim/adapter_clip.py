"""QK-clip of LoRA over a frozen base: rows of B alone are scaled, and the base is not touched.

Queries and keys are a constant part plus a part that is linear in B, so no reading says how far B
has to shrink. A layer with a head above tau is therefore run again, without gradients and without
dropout, on the inputs it had: once as it is and once with B silenced. From these two the largest
factor is found exactly (`hmpo.optim.adapter_factor`). The layers below are held fixed.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hmpo.attention.inputs import KeptInput
from hmpo.attention.logits import AttentionCall
from hmpo.attention.packed import PACKED
from hmpo.attention.sites import AttentionSite, ClipTarget, HeadRows
from hmpo.attention.tap import capture_calls
from hmpo.optim.adapter_factor import Agree, SplitCall, largest_factors, split

LORA_RULES = ("adapter", "report")
"""What to do with LoRA over a frozen base, see `QKClip`."""
NOT_KEPT = (
    "its inputs were not kept: no head was above tau / 2 at the last step, or the forward pass is "
    "compiled, or its readings come from a checkpoint"
)
BASE_EXCEEDS = "no factor on the LoRA adapter keeps its heads at tau: the frozen base exceeds it"


@dataclass(frozen=True, eq=False, kw_only=True)
class AdapterClip:
    """What was found for one layer with heads above tau."""

    query: Float[Tensor, " H"]
    """Factor of each head's rows of the queries' B; 1 where they stay."""
    key: Float[Tensor, " G"]
    """Factor of each key head's rows of the keys' B."""
    clipped: Bool[Tensor, " H"]
    """Heads read above tau that are brought to it."""
    reread: Bool[Tensor, " H"]
    """Heads read above tau that, run again without dropout, are not."""
    reason: str = ""
    """Why the other heads above tau are left alone; "" if there are none."""

    def rows(self, target: ClipTarget) -> Iterator[tuple[HeadRows, Tensor]]:
        """What to multiply by what."""
        for pieces, factors in ((target.query, self.query), (target.key, self.key)):
            yield from ((rows, factors) for rows in pieces)
        yield from ((rows, self.query) for rows in target.both)


def adapter_target(site: AttentionSite, gqa: str) -> ClipTarget | str:
    """The rows of LoRA's B that make a site's logits, or why they cannot be scaled alone."""
    target, module = site.target("adapters"), site.module()
    if isinstance(target, str) or module is None:
        return target
    if site.tap != "interface":
        return "its logits are read from its projections only"
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        return "its parameters are sharded, so it cannot be run again by itself"
    if gqa == "query" and not target.query:
        return "only the keys have an adapter, and gqa='query' leaves the keys alone"
    return target


def left_alone(site: AttentionSite, reason: str) -> AdapterClip:
    """Nothing is scaled, for this reason."""
    none = torch.zeros(site.heads, dtype=torch.bool)
    one = torch.ones(site.heads, dtype=torch.float64)
    return AdapterClip(
        query=one, key=one[: site.kv_heads], clipped=none, reread=none, reason=reason
    )


def clip_adapter(
    site: AttentionSite,
    target: ClipTarget,
    over: Bool[Tensor, " H"],
    inputs: list[KeptInput] | str,
    *,
    tau: float,
    gqa: str,
    agree: Agree,
) -> AdapterClip:
    """Find the factors that bring the heads `over` tau down to it; nothing is scaled yet.

    Args:
        site: the layer, alike on every rank.
        target: its rows, from `adapter_target`.
        over: the heads that were read above tau, alike on every rank.
        inputs: all calls of this layer on this rank, or why they are not at hand.
        tau: largest logit allowed.
        gqa: "query" scales the queries' B only, each head by the largest factor that will do;
            "group" one factor for all rows of a key head's group; "balanced" that factor for the
            keys' B, and for each head's queries the largest that will do with these keys.
        agree: takes the smallest value over all ranks.
    """
    gqa = gqa if target.key else "query"
    share = site.heads // site.kv_heads
    groups = over.view(site.kv_heads, share).any(1)
    heads = over if gqa == "query" else groups.repeat_interleave(share)
    calls = inputs if isinstance(inputs, str) else _split_all(site, target, inputs, heads)
    runnable = not isinstance(calls, str)
    all_runnable, minus_any = agree(torch.tensor([float(runnable), -float(bool(calls))]))
    if isinstance(calls, str) or all_runnable == 0:
        return left_alone(site, calls if isinstance(calls, str) else "another rank cannot run it")
    if minus_any == 0:  # no rank has a call
        return left_alone(site, NOT_KEPT)
    query = torch.ones(site.heads, dtype=torch.float64)
    key = torch.ones(site.kv_heads, dtype=torch.float64)
    if gqa == "query":
        fixed = query[heads]
        query[heads] = largest_factors(calls, tau, len(fixed), agree, fixed)
    else:
        factors = largest_factors(calls, tau, int(groups.sum()), agree)
        key[groups] = factors.where(factors >= 0, 1.0)
        query[heads] = factors.repeat_interleave(share)
        if gqa == "balanced" and target.query:
            fixed = key[groups].repeat_interleave(share)
            query[heads] = largest_factors(calls, tau, len(fixed), agree, fixed)
    able = query >= 0
    query = query.where(able, 1.0)
    moved = (query < 1) | (key < 1).repeat_interleave(share)
    return AdapterClip(
        query=query,
        key=key,
        clipped=over & able & moved,
        reread=over & able & ~moved,
        reason=BASE_EXCEEDS if bool((over & ~able).any()) else "",
    )


def _split_all(
    site: AttentionSite, target: ClipTarget, inputs: list[KeptInput], heads: Tensor
) -> list[SplitCall] | str:
    module, numbers = site.module(), heads.nonzero().flatten()
    if module is None:
        return "the module no longer exists"
    calls = []
    for kept in inputs:
        pairs = _run_again(module, target, kept)
        if isinstance(pairs, str):
            return pairs
        for base, whole in pairs:
            calls.append(split(base, whole, heads=numbers.to(base.query.device)))
    return calls


@torch.no_grad()
def _run_again(
    module: nn.Module, target: ClipTarget, kept: KeptInput
) -> list[tuple[AttentionCall, AttentionCall]] | str:
    """Each call without and with the adapter; a packed sequence makes several."""
    with ExitStack() as stack:
        stack.enter_context(evaluating(module))
        on = kept.autocast is not None
        stack.enter_context(torch.autocast(kept.device, dtype=kept.autocast, enabled=on))
        with capture_calls(module) as calls:
            module(*kept.args, **kept.kwargs)
            with _silenced(module, target):
                module(*kept.args, **kept.kwargs)
    packed = kept.kwargs.get(PACKED)
    expected = 1 if packed is None else len(packed.blocks)
    if len(calls) != 2 * expected:
        return f"run again it made {len(calls) / 2:g} attention calls, expected {expected}"
    return list(zip(calls[expected:], calls[:expected]))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off, so that nothing is random and no random number is used up."""
    modes = [(part, part.training) for part in module.modules()]
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def _silenced(module: nn.Module, target: ClipTarget) -> Iterator[None]:
    """The layers whose rows are scaled give zeros; the parameters stay as they are."""
    scaled = {id(rows.parameter) for rows in target.rows}
    ups = [m for m in module.modules() if any(id(p) in scaled for p in m.parameters(recurse=False))]
    handles = [up.register_forward_hook(_zeros) for up in ups]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _zeros(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return torch.zeros_like(output)
