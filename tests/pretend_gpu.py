"""A device that is not the CPU, made of CPU tensors: what does not lie on it is told apart.

Import it only in a process of its own (`test_device.py`): it takes torch's one place for a device
of others. Within `pretended_gpu`, operations on tensors of the device "pretend" run on the CPU
after the check that a GPU makes: every tensor with dimensions lies on the same device, other than
for a copy and for indices.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("pretend", backend_module=_Module())
DEVICE = torch.device("pretend", 0)
COPIES = ("_to_copy", "copy_", "_copy_from", "_foreach_copy_")
INDEXED = ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_")


_NARROW = ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "scaled_dot_product_attention")
_autocast = torch.library.Library("aten", "IMPL")
_others = torch.library.Library("_", "IMPL")
_others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


def _narrow(operation: Any) -> Any:
    """A product under autocast: its float32 factors in bfloat16, as on a GPU."""

    def run(*args: Any, **kwargs: Any) -> Any:
        def cut(x: Any) -> Any:
            wide = isinstance(x, Tensor) and x.dtype == torch.float32
            return x.to(torch.get_autocast_dtype(DEVICE.type)) if wide else x

        with torch.autocast(DEVICE.type, enabled=False):
            return operation(*map(cut, args), **{name: cut(x) for name, x in kwargs.items()})

    return run


for _name in _NARROW:
    _autocast.impl(_name, _narrow(getattr(torch.ops.aten, _name)), "AutocastPrivateUse1")


class Away(torch.Tensor):
    """A tensor on the pretended device, and the CPU tensor that it is made of."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "Away":
        away = torch.Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
        )
        away.here = here.detach()
        return away

    def __repr__(self) -> str:
        return f"Away({self.here})"

    def tolist(self) -> Any:
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def _back(x: Any) -> Any:
    return x.here if isinstance(x, Away) else x


def _checked(func: Any, args: Any, kwargs: Any) -> None:
    name = func._schema.name.split("::")[1]
    if name in COPIES:
        return
    looked_at = (args[0], args[2:]) if name in INDEXED else (args, kwargs)
    leaves = [x for x in tree_leaves(looked_at) if isinstance(x, Tensor)]
    strangers = [x for x in leaves if not isinstance(x, Away) and x.ndim > 0]
    if strangers and any(isinstance(x, Away) for x in leaves):
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, found "
            f"{[(type(x).__name__, tuple(x.shape)) for x in leaves]}"
        )


def dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    """Check the devices, run on the CPU, and put the result where it belongs."""
    name = func._schema.name.split("::")[1]
    if name == "_fused_sdp_choice":
        return 0  # the plain formula: the fused kernels are named after devices
    _checked(func, args, kwargs)
    leaves = tree_leaves((args, kwargs))
    away = any(isinstance(x, Away) for x in leaves)
    device = kwargs.get("device")
    if device is not None:
        away = torch.device(device).type == DEVICE.type
        kwargs = kwargs | {"device": torch.device("cpu")}
    elif name in ("copy_", "_copy_from"):
        away = isinstance(args[0], Away)
    kwargs = kwargs | ({"pin_memory": None} if kwargs.get("pin_memory") is False else {})
    out = func(*tree_map(_back, args), **tree_map(_back, kwargs))
    if not away:
        return out
    wrapped = tree_map(lambda x: Away(x) if isinstance(x, Tensor) else x, out)
    if device is not None or not any(isinstance(x, Away) for x in leaves):
        return wrapped
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


class _Numbers(TorchFunctionMode):
    """`torch.tensor` reads Python numbers below all that can be intercepted: made, then moved."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is Tensor.new_tensor and isinstance(args[0], Away):
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to(DEVICE)
        return func(*args, **kwargs)


@contextlib.contextmanager
def pretended_gpu() -> Iterator[torch.device]:
    """Within it tensors can be made on and moved to the device that it gives.

    Inference mode is no more than the absence of gradients here: wrapped tensors know no other.
    """

    def inference_mode(mode: bool = True):
        return torch.no_grad() if mode else contextlib.nullcontext()

    with mock.patch.object(torch, "inference_mode", inference_mode), _Numbers(), _Operations():
        yield DEVICE
