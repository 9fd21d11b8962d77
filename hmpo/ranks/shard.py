"""A policy whose weights, gradients and optimizer state are shared out to ranks: torch's FSDP2.

Each rank keeps rows of every parameter (a DTensor). A layer's weights are gathered while it runs
and freed after it, in the backward pass too, which leaves each rank the sum of all gradients in its
own rows. Every rank must run the policy as often as the others (`hmpo.trainer.passes`).

What runs the policy as often as it likes (sampling, evaluation) takes a copy of it that has all
weights for that time (`Shards.gathered`), and is a plain model otherwise.
"""

import contextlib
import copy
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from hmpo.errors import ModelError

T = TypeVar("T")
PASS = "run_pass"
"""Method of a sharded policy that runs a function with the weights that no layer holds."""
_known: "weakref.WeakKeyDictionary[nn.Module, Shards]" = weakref.WeakKeyDictionary()


class Shards:
    """What a sharded policy needs beside itself.

    Args:
        policy: after `share_out`.
        copied: a model like it without weights of its own.
        device: where the policy computes.
    """

    def __init__(self, policy: nn.Module, copied: nn.Module, device: torch.device) -> None:
        self._policy, self.model, self.device = weakref.ref(policy), copied, device
        self._empty = {module: dict(module._parameters) for module in copied.modules()}

    @property
    def policy(self) -> Any:
        """The sharded policy."""
        policy = self._policy()
        assert policy is not None, "whoever asks holds it"
        return policy

    @contextlib.contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """A copy with all weights on this rank, freed after the block; every rank gathers."""
        whole: dict[int, nn.Parameter] = {}
        try:
            for name, module in self.policy.named_modules():
                other = self.model.get_submodule(name)
                other._buffers.update(module._buffers)
                for key, own in module._parameters.items():
                    if own is not None and id(own) not in whole:
                        values = gather(own.detach())
                        whole[id(own)] = nn.Parameter(values, requires_grad=own.requires_grad)
                    if own is not None:
                        other._parameters[key] = whole[id(own)]
            yield self.model
        finally:
            for module, parameters in self._empty.items():
                module._parameters.update(parameters)

    def run(self, make: Callable[[], T]) -> T:
        """A pass through the policy's parts, and what comes of it.

        Args:
            make: runs each of them once; gives a record of tensors. Gradients flow back from those
                that require one.
        """
        found: list[T] = []

        def call() -> tuple[Tensor, ...]:
            found.append(make())
            values = vars(found[0]).values()
            return tuple(x for x in values if isinstance(x, Tensor) and x.requires_grad)

        getattr(self.policy, PASS)(call)
        if not torch.is_grad_enabled():  # no backward pass will free them
            self.policy.reshard()
        return found[0]

    def cut(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's part of whole weights by name; what the policy does not have stays."""
        own = self.policy.state_dict()
        return {name: part_like(value, own.get(name)) for name, value in weights.items()}


def shards_of(policy: nn.Module) -> Shards | None:
    """What belongs to a sharded policy; None for any other."""
    return _known.get(policy)


def gathered(policy: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
    """A policy that is whole on this rank for a block: a copy of one that is sharded."""
    shards = shards_of(policy)
    return contextlib.nullcontext(policy) if shards is None else shards.gathered()


def device_of(policy: nn.Module) -> torch.device:
    """Where a policy computes, which is not where offloaded weights are."""
    shards = shards_of(policy)
    return next(policy.parameters()).device if shards is None else shards.device


def share_out(policy: nn.Module, device: torch.device, *, offload: bool = False) -> Shards:
    """Share a policy's parameters out to the ranks of the process group, in place.

    The layers are those that the model names as not to be split (`_no_split_modules` of
    transformers), each gathered by itself; what is left is gathered for a whole pass.

    Args:
        policy: alike on all ranks; no optimizer holds its parameters yet.
        device: where it computes.
        offload: keep weights, gradients and optimizer state in the memory of the host.

    Raises:
        ModelError: layers that share a parameter.
    """
    from torch.distributed import fsdp  # half a second that nobody else needs

    layers = _layers(policy)
    _refuse_shared(policy, layers)
    copied = _without_weights(policy)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    settings: dict[str, Any] = {
        "mesh": mesh,
        "offload_policy": fsdp.CPUOffloadPolicy() if offload else fsdp.OffloadPolicy(),
    }
    for layer in layers:
        fsdp.fully_shard(layer, **settings)
    fsdp.fully_shard(policy, **settings)
    for module in policy.modules():
        if isinstance(module, fsdp.FSDPModule):  # gradients are summed, as those of ranks are
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    setattr(policy, PASS, types.MethodType(_run, policy))
    fsdp.register_fsdp_forward_method(policy, PASS)
    _known[policy] = Shards(policy, copied, device)
    return _known[policy]


def _run(policy: nn.Module, call: Callable[[], Any]) -> Any:
    return call()


def _layers(policy: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one by one."""
    names: set[str] = set()
    for module in policy.modules():
        names |= set(getattr(module, "_no_split_modules", None) or ())
    found = [module for module in policy.modules() if type(module).__name__ in names]
    inner = {id(part) for layer in found for part in layer.modules() if part is not layer}
    return [layer for layer in found if id(layer) not in inner and layer is not policy]


def _refuse_shared(policy: nn.Module, layers: list[nn.Module]) -> None:
    """Refuse a parameter that two layers have, or a layer and the rest."""
    inside = {id(part) for layer in layers for part in layer.modules()}
    rest = [m for m in policy.modules() if id(m) not in inside]
    homes = [{id(p) for p in layer.parameters()} for layer in layers]
    homes.append({id(p) for module in rest for p in module.parameters(recurse=False)})
    if len(set().union(*homes)) < sum(map(len, homes)):
        raise ModelError(
            f"distributed.shard: got a {type(policy).__name__} whose layers share parameters, "
            "expected layers that have their own; set distributed.shard = false"
        )


def _without_weights(policy: nn.Module) -> nn.Module:
    """A copy whose parameters are empty, and whose buffers are the policy's own."""
    kept: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in policy.parameters()
    }
    return copy.deepcopy(policy, kept | {id(buffer): buffer for buffer in policy.buffers()})


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, in the same memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every rank; a copy of any other."""
    if not isinstance(tensor, DTensor):
        return tensor.clone()
    kind = tensor.device_mesh.device_type
    moved: Any = tensor if tensor.device.type == kind else tensor.to(kind)
    return moved.full_tensor()


def part_like(whole: Any, sharded: Any) -> Any:
    """This rank's part of a whole tensor, shared out as another of its shape is.

    What is no tensor of that shape, or has no sharded one to go by, stays as it is.
    """
    if not (isinstance(sharded, DTensor) and isinstance(whole, Tensor)):
        return whole
    if isinstance(whole, DTensor) or whole.shape != sharded.shape:
        return whole
    mesh: DeviceMesh = sharded.device_mesh
    size = -(-len(whole) // mesh.size())
    rows = whole[mesh.get_local_rank() * size :][:size]
    own = sharded.to_local()
    assert rows.shape == own.shape, "rows are dealt in equal parts, but for the last ones"
    return DTensor.from_local(
        rows.to(own.device, copy=True),
        mesh,
        sharded.placements,
        run_check=False,
        shape=sharded.shape,
        stride=sharded.stride(),
    )


def whole_tree(tree: Any, *, keep: bool) -> Any:
    """Nested containers with every sharded tensor gathered, in the memory of the host.

    Args:
        tree: mappings, lists and tuples of anything, alike on all ranks.
        keep: whether this rank wants them; it gets None in their place otherwise.
    """
    if isinstance(tree, DTensor):
        whole = gather(tree.detach())
        return whole.to("cpu") if keep else None
    if isinstance(tree, Mapping):
        return {key: whole_tree(value, keep=keep) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(whole_tree(value, keep=keep) for value in tree)
    return tree


def cut_optimizer_state(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> dict[str, Any]:
    """This rank's part of a whole `state_dict()`, for an optimizer of sharded parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parts = {
        number: {key: part_like(value, parameters[number]) for key, value in own.items()}
        for number, own in state["state"].items()
    }
    return {**state, "state": parts}
