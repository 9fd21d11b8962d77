"""That a trainer trains: weights that can move, gradients switched on, and one where one is due."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hmpo.errors import ConfigError, ModelError
from hmpo.ranks.shard import local

logger = logging.getLogger(__name__)


def check_trainable(policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse a policy that nothing can move: frozen, or another's weights in the optimizer.

    Raises:
        ModelError: no parameter of the policy requires a gradient.
        ConfigError: the optimizer holds parameters that are not the policy's, or none of those
            that train.
    """
    own = list(policy.parameters())
    trained = {id(p) for p in own if p.requires_grad}
    if not trained:
        raise ModelError(
            f"policy_model: got {len(own)} parameters that are all frozen, expected some that "
            "require a gradient; a saved adapter trains with "
            "PeftModel.from_pretrained(..., is_trainable=True)"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    foreign = held - {id(p) for p in own}
    if foreign or not held & trained:
        raise ConfigError(
            f"optimizer: got {len(foreign)} of {len(held)} parameters that are not the policy's, "
            f"and {len(held & trained)} of the {len(trained)} that train, expected the policy's "
            "own; make the optimizer from policy_model.parameters() after the last change of the "
            "model (adapters, resized embeddings, copies)"
        )
    if trained - held:
        logger.warning(
            "the optimizer holds %d of the policy's %d trainable parameters; the others stay",
            len(held & trained),
            len(trained),
        )


def check_apart(policy: nn.Module, ref: nn.Module | None) -> None:
    """Refuse a reference that moves with the policy: the same model, or its trained weights.

    Frozen weights may be shared, as those beneath an adapter.

    Raises:
        ModelError: `ref` is the policy, or shares memory with weights of it that train.
    """
    if ref is None:
        return
    trained = {_place(p): name for name, p in policy.named_parameters() if p.requires_grad}
    trained.pop(None, None)
    held = [*ref.named_parameters(), *ref.named_buffers()]
    shared = [trained[_place(tensor)] for _, tensor in held if _place(tensor) in trained]
    if ref is policy or shared:
        what = "the policy itself" if ref is policy else f"{len(shared)} of the policy's weights"
        first = f" (the first is {shared[0]})" if shared else ""
        raise ModelError(
            f"ref_model: got {what}{first}, which training moves, expected a frozen model of its "
            "own; give copy.deepcopy(policy).requires_grad_(False) or a second from_pretrained"
        )


def _place(tensor: Tensor) -> int | None:
    """Where a tensor's memory begins; None where it has none (empty, or on no device).

    A parameter without memory of its own that can be asked for (a wrapper) stands for itself.
    """
    storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
    try:
        return storage.data_ptr() or None
    except RuntimeError:
        return id(tensor)


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """Gradients on for the block, whatever the caller, or code that was imported, switched off."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        yield


def backward(loss: Float[Tensor, ""], *, due: bool) -> None:
    """Back-propagate a loss.

    Args:
        loss: of some responses.
        due: whether any of them has a gradient; if none has, the loss may be a constant.

    Raises:
        ModelError: a gradient is due and the loss has none.
    """
    if loss.requires_grad:
        loss.backward()
    elif due:
        raise ModelError(
            "policy: got a loss without a gradient, expected log-probs that depend on weights "
            "that train; its forward pass must not run under no_grad or detach what it computes"
        )


def wide_norm(gradient: Tensor) -> Tensor:
    """The norm of a 16-bit gradient, in float32; any other gradient as it is.

    A total norm is the same of both, but a norm in bfloat16 would be off by up to 0.4 %.
    """
    if gradient.dtype not in (torch.bfloat16, torch.float16):
        return gradient
    return torch.linalg.vector_norm(gradient, dtype=torch.float32)


def total_norm(
    gradients: Sequence[Tensor], shared: Callable[[Tensor], Tensor] | None
) -> Float[Tensor, ""]:
    """The L2 norm of all gradients.

    Args:
        gradients: whole, or shared out to ranks as DTensors.
        shared: the sum of a number over the ranks, where gradients are shared out.
    """
    norm = nn.utils.get_total_norm([wide_norm(local(gradient)) for gradient in gradients])
    return norm if shared is None else shared(norm.square()).sqrt()


def clip_gradients(parameters: Sequence[Tensor], limit: float, norm: Tensor) -> None:
    """Scale gradients whose L2 norm is `norm` to the limit, each rank its own part of them."""
    if any(isinstance(p.grad, DTensor) for p in parameters):
        held = [local(p.grad) for p in parameters if p.grad is not None]
        torch._foreach_mul_(held, (limit / (norm + 1e-6)).clamp(max=1.0))
        return
    nn.utils.clip_grads_with_norm_(parameters, limit, norm)


def check_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Refuse to step where no weight received a gradient.

    Raises:
        ModelError: the loss had a gradient, but of no parameter that the optimizer holds.
    """
    if all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
        raise ModelError(
            "policy: got no gradient for any of the optimizer's parameters, expected one; the "
            "loss depends on other weights, or the model detaches what these compute"
        )
