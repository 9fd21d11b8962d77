"""Whether a layer's logits follow the weights that QK-clip scales: asked of the layer itself.

What lies between a projection and the softmax is not always seen from a module's children: an l2
norm, an adapter, a convolution with a residual. There scaling does nothing, or not what it should,
and would be repeated at every step. So at the next forward pass after a layer came near tau, it
runs twice more on the same inputs, without gradients and dropout: as it is, and with its rows
scaled so that every logit should be half as large. What does not halve does not obey.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hmpo.attention.hooks import Hook
from hmpo.attention.inputs import kept_input
from hmpo.attention.logits import SeenScores, exact_max
from hmpo.attention.sites import AttentionSite, ClipTarget, HeadRows, Scope
from hmpo.attention.tap import capture_calls, is_recorded, not_recorded
from hmpo.optim.adapter_clip import evaluating

HALF = (0.4, 0.6)
"""Parts of a logit that count as half of it: a bias beside q . k, and bfloat16, leave that room."""
LEAST = 1e-3
"""Part of the layer's largest logit below which a head tells nothing."""
DISOBEYS = "its logits do not follow the weights that QK-clip scales: never scaled again"
HALVE = Callable[[AttentionSite, ClipTarget], Iterable[tuple[HeadRows, Tensor]]]
"""Gives the rows of a site and their factors that should halve its logits."""


class ObedienceCheck(Hook):
    """Hook before one attention module that asks once, at its next recorded call.

    It holds neither the module nor whoever wants to know.
    """

    def __init__(self, site: AttentionSite, scope: Scope, halve: HALVE) -> None:
        self.site, self.scope, self.halve = site, scope, weakref.WeakMethod(halve)
        self.obeys: bool | None = None
        """The answer; None while there is none."""
        module = site.module()
        assert module is not None, "a layer that was just read is alive"
        self.handle = module.register_forward_pre_hook(self, with_kwargs=True)

    def remove(self) -> None:
        """Ask no more."""
        self.handle.remove()

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Ask, if this call is one to ask at."""
        if torch.compiler.is_compiling() or self.obeys is not None or not is_recorded():
            return
        if torch._C._current_graph_task_id() != -1:  # computed again in the backward pass
            return
        kept, target = kept_input(module, args, kwargs), self.site.target(self.scope)
        halve = self.halve()
        if halve is None or isinstance(kept, str) or isinstance(target, str):
            return
        if any(isinstance(rows.parameter, DTensor) for rows in target.rows):
            return  # shards that nobody has gathered for this call
        on = kept.autocast is not None
        with (
            torch.no_grad(),
            not_recorded(),
            evaluating(module),
            torch.autocast(kept.device, dtype=kept.autocast, enabled=on),
        ):
            whole = _maxima(module, kept.args, kept.kwargs)
            scaled = _scaled(module, halve(self.site, target))
            half = scaled(lambda: _maxima(module, kept.args, kept.kwargs))
        if whole is not None and half is not None:
            self.obeys = halves(whole, half)


def halves(whole: Float[Tensor, " H"], half: Float[Tensor, " H"]) -> bool | None:
    """Whether each head's largest logit is half of what it was; None where no head tells."""
    telling = whole.isfinite() & half.isfinite() & (whole.abs() > LEAST * whole.abs().max())
    telling &= whole > 0
    if not bool(telling.any()):
        return None
    share = (half / whole)[telling]
    return bool(((share >= HALF[0]) & (share <= HALF[1])).all())


def _maxima(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """Largest logit of each head in one more run of the module; None if it showed none."""
    with capture_calls(module) as calls:
        module.forward(*args, **kwargs)
    each = [c.maxima if isinstance(c, SeenScores) else exact_max(c) for c in calls]
    return torch.stack(each).amax(0) if each else None


def _scaled(
    module: nn.Module, plan: Iterable[tuple[HeadRows, Tensor]]
) -> Callable[[Callable[[], Any]], Any]:
    """Something that runs a function while scaled copies stand in for the module's parameters.

    The parameters themselves are not written to: graphs of this step may hold them.
    """
    copies: dict[int, nn.Parameter] = {}
    for rows, factors in plan:
        own = rows.parameter
        if id(own) not in copies:
            copies[id(own)] = nn.Parameter(own.detach().clone(), requires_grad=False)
        rows.scale(factors, like=copies[id(own)])
    places = [
        (part, name, own)
        for part in module.modules()
        for name, own in part._parameters.items()
        if own is not None and id(own) in copies
    ]

    def run(function: Callable[[], Any]) -> Any:
        try:
            for part, name, own in places:
                part._parameters[name] = copies[id(own)]
            return function()
        finally:
            for part, name, own in places:
                part._parameters[name] = own

    return run
