"""Evaluation mode that lasts as long as a gradient needs it.

A log-prob is of the policy without dropout, and so is its gradient. Whoever recomputes a part of
the forward pass in the backward pass (gradient checkpointing) does so after the block in which the
forward pass stood, so the mode has to come with the recomputation: `evaluating` hands it to the
layers that transformers checkpoints, `evaluating_backward` to everything else.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_held: weakref.WeakKeyDictionary[nn.Module, list[nn.Module]] = weakref.WeakKeyDictionary()
"""By policy: its modules whose training flag is to be set again after the backward pass."""


@contextlib.contextmanager
def evaluating(policy: nn.Module) -> Iterator[None]:
    """Dropout off for the block; every module's training flag is restored after it.

    Where gradients are on, layers that transformers checkpoints keep their own flag, because it
    checkpoints only in training mode; what is checkpointed runs in evaluation mode, here and when
    the backward pass runs it again. A model whose own code checkpoints is not asked to.
    """
    _restore(policy)
    modules: list[Any] = list(policy.modules())
    flags = [module.training for module in modules]
    functions: list[tuple[Any, Any]] = []
    policy.eval()
    if torch.is_grad_enabled():
        for module, training in zip(modules, flags):
            if training and _is_checkpointed_layer(module):
                module.training = True
                functions.append((module, module._gradient_checkpointing_func))
                module._gradient_checkpointing_func = _evaluated(functions[-1][1], modules)
    try:
        yield
    finally:
        for module, function in functions:
            module._gradient_checkpointing_func = function
        for module, training in zip(modules, flags):
            module.training = training


def evaluating_backward(policy: nn.Module, *outputs: Tensor) -> None:
    """Dropout stays off while gradients run back from `outputs`; flags are restored after that.

    After a backward pass that failed they are restored by the next `evaluating`.

    Args:
        policy: what made the outputs.
        outputs: of a forward pass in evaluation mode; those without gradient are passed over.
    """

    def begin(_: Tensor) -> None:
        if policy in _held:  # another output of the same pass
            return
        _held[policy] = _switched_off(policy.modules())
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(functools.partial(_restore, policy))

    for output in outputs:
        if output.requires_grad:
            output.register_hook(begin)


def _restore(policy: nn.Module) -> None:
    """Undo what the backward pass from an output of `policy` began with."""
    for module in _held.pop(policy, ()):
        module.training = True


def _switched_off(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of the modules that were in training mode, in evaluation mode now."""
    trained = [module for module in modules if module.training]
    for module in trained:
        module.training = False
    return trained


def _is_checkpointed_layer(module: Any) -> bool:
    """Whether transformers wraps the module's forward pass by a checkpoint.

    A model that checkpoints in code of its own has the same attributes, but its flag also says
    whether it drops out outside of what is checkpointed.
    """
    if getattr(module, "gradient_checkpointing", False) is not True:
        return False
    return any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(module).__mro__)


def _evaluated(function: Callable[..., Any], modules: list[nn.Module]) -> Callable[..., Any]:
    """A checkpointing function whose subject runs in evaluation mode, each time that it runs.

    The reentrant mode of torch loses the gradient of whatever does not come as an argument (a
    keyword, what layers share with each other, parameters where no argument has a gradient), so
    the other mode is taken, whose gradient is the same and complete.
    """
    if isinstance(function, _Evaluated):
        return function
    settings = getattr(function, "keywords", {})
    if settings and settings.get("use_reentrant") is not False:
        function = functools.partial(function, use_reentrant=False)
    return _Evaluated(function, modules)


class _Evaluated:
    """`_evaluated`."""

    def __init__(self, function: Callable[..., Any], modules: list[nn.Module]) -> None:
        self.function, self.modules = function, modules

    def __call__(self, subject: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        """Checkpoint `subject(*args)`."""

        def evaluated(*inputs: Any, **more: Any) -> Any:
            trained = _switched_off(self.modules)
            try:
                return subject(*inputs, **more)
            finally:
                for module in trained:
                    module.training = True

        return self.function(evaluated, *args, **keywords)
