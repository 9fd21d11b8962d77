"""Float32 copies of 16-bit weights, so that small updates are not lost in rounding.

bfloat16 has 8 bits: a step of less than 0.2 to 0.4 % of a weight rounds away. Here the optimizer
steps on float32 copies (masters), with float32 gradients and float32 state of its own, and the
weights are the masters rounded. For the time of a step, and while its state is loaded, the
parameters themselves *are* the masters, so any optimizer works, and everything else that looks at
it sees the model's own parameters, also after a step or a load that failed.
"""

import functools
import weakref
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from hmpo.errors import CheckpointError, ConfigError

STATE_KEY = "masters"
"""Key of the copies inside an optimizer's `state_dict()`."""
NARROW = (torch.bfloat16, torch.float16)
AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)
_kept: "weakref.WeakKeyDictionary[Optimizer, _Masters]" = weakref.WeakKeyDictionary()


def with_masters(optimizer: AnyOptimizer) -> AnyOptimizer:
    """Let `optimizer` step on float32 copies of its 16-bit parameters; returns it.

    Without such parameters, or called again, it changes nothing. The copies travel in
    `state_dict()` under "masters"; a state without them begins from the weights. Weights that
    somebody else has set since the last step are taken over. The optimizer's step takes no closure,
    which would run the model with the copies. QK-clip scales the copies with the weights; its
    `with_qk_clip` or `MuonClip` comes after.

    Args:
        optimizer: any optimizer, before its first step; parameters added later get no copies.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if optimizer not in _kept and any(p.dtype in NARROW for p in parameters):
        masters = _Masters(parameters)
        optimizer.register_step_pre_hook(masters.before_step)
        optimizer.register_step_post_hook(masters.after_step)
        optimizer.register_state_dict_post_hook(masters.after_state_dict)
        optimizer.register_load_state_dict_pre_hook(masters.before_load)
        optimizer.register_load_state_dict_post_hook(masters.after_load)
        for name, rounded in (("step", True), ("load_state_dict", False)):
            _give_back_on_failure(optimizer, name, masters, rounded=rounded)
        _kept[optimizer] = masters
    return optimizer


def masters_of(optimizer: Optimizer) -> Callable[[Tensor], Tensor | None] | None:
    """What finds the float32 copy of a parameter; None where `optimizer` keeps none."""
    masters = _kept.get(optimizer)
    return None if masters is None else masters.copies.get


def _give_back_on_failure(
    optimizer: Optimizer, name: str, masters: "_Masters", *, rounded: bool
) -> None:
    """Let a method of `optimizer` leave the parameters their own where it raises.

    torch runs no hook then. The method is the instance's own, as that of a learning rate scheduler,
    and holds the optimizer weakly, whose memory is then freed at once.
    """
    plain = vars(optimizer).get(name)
    of_class, reference = getattr(type(optimizer), name), weakref.ref(optimizer)

    @functools.wraps(plain or of_class)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(of_class, reference()) if plain is None else plain
        try:
            return call(*args, **kwargs)
        except BaseException:
            masters.give_back(rounded=rounded)
            raise

    setattr(optimizer, name, MethodType(guarded, weakref.proxy(optimizer)))


class _Masters:
    """The copies of one optimizer's parameters, which it must not hold itself."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        narrow = [p for p in parameters if p.dtype in NARROW]
        self.copies = {p: p.detach().to(torch.float32, copy=True) for p in narrow}
        self.away: dict[Tensor, tuple[Tensor, Tensor | None]] = {}
        """By parameter its own 16-bit values and gradient, while the copy stands in for them."""
        self.loaded: dict[Tensor, Tensor] = {}
        """Copies of a state that is being loaded, not taken over before the rest of it is."""

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        given = kwargs.get("closure") if len(args) < 2 else args[1]  # args[0] is the optimizer
        if given is not None:
            raise ConfigError(
                "optimizer.step: got a closure, expected none: it would run the model with the "
                "float32 copies of its weights; compute the loss before the step"
            )
        self._swap_in()

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.give_back(rounded=True)

    def after_state_dict(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        self._take_over()
        kept = {i: self.copies[p] for i, p in enumerate(self.parameters) if p in self.copies}
        return {**state, STATE_KEY: kept}

    def before_load(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        rest = dict(state)
        kept: Mapping[int, Tensor] | None = rest.pop(STATE_KEY, None)
        if kept is not None:
            places = {i: p for i, p in enumerate(self.parameters) if p in self.copies}
            fits = kept.keys() == places.keys()
            if not fits or any(kept[i].shape != p.shape for i, p in places.items()):
                raise CheckpointError(
                    f"optimizer: got {len(kept)} float32 copies of weights, expected "
                    f"{len(self.copies)}; resume with the policy and policy.dtype of the run"
                )
            self.loaded = {p: kept[i] for i, p in places.items()}
        self._swap_in()  # torch gives loaded state the dtype of the parameters
        return rest

    @torch.no_grad()
    def after_load(self, optimizer: Optimizer) -> None:
        for parameter, value in self.loaded.items():
            self.copies[parameter].copy_(value)
        self.give_back(rounded=False)

    @torch.no_grad()
    def _take_over(self) -> None:
        """Copies whose weights were set by somebody else follow them."""
        for parameter, copy in self.copies.items():
            other = parameter != copy.to(parameter.dtype)
            torch.where(other, parameter.float(), copy, out=copy)

    def _swap_in(self) -> None:
        """The copies stand in for the parameters."""
        self._take_over()
        for parameter, copy in self.copies.items():
            gradient = parameter.grad
            self.away[parameter] = parameter.data, gradient
            parameter.grad = None
            parameter.data = copy
            parameter.grad = None if gradient is None else gradient.float()

    @torch.no_grad()
    def give_back(self, *, rounded: bool) -> None:
        """The parameters are themselves again, with the rounded copies where `rounded`."""
        self.loaded = {}
        for parameter, (own, gradient) in self.away.items():
            parameter.grad = None
            parameter.data = own.copy_(parameter.data) if rounded else own
            parameter.grad = gradient
        self.away.clear()
