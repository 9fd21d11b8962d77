"""The policy as a module: what may be asked of it, and the weights that a checkpoint keeps."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from hmpo.config import TrainerConfig
from hmpo.errors import CheckpointError


def trained_state(policy: nn.Module) -> dict[str, Tensor]:
    """Parameters that train and all buffers, by name, detached; frozen parameters are left out."""
    frozen = _frozen(policy)
    return {name: value for name, value in policy.state_dict().items() if name not in frozen}


def load_trained_state(policy: nn.Module, state: Mapping[str, Any]) -> None:
    """Put back what `trained_state` gave.

    Raises:
        CheckpointError: it is of another model: names or shapes differ.
    """
    expected = set(policy.state_dict()) - _frozen(policy)
    differing = sorted(expected ^ set(state))
    if differing:
        where = "the policy" if differing[0] in expected else "the checkpoint"
        raise CheckpointError(
            f"policy: {len(differing)} weights differ in name from the checkpoint's, such as "
            f"{differing[0]}, which only {where} has; resume with the policy of the run"
        )
    try:
        policy.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:  # a shape; torch says which, in several lines
        text = " ".join(str(error).split())
        raise CheckpointError(f"policy: {text}; resume with the policy of the run") from None


def _frozen(policy: nn.Module) -> set[str]:
    """Names in the state of parameters that do not train, tied ones under each of their names."""
    values = policy.state_dict(keep_vars=True).items()
    return {n for n, v in values if isinstance(v, nn.Parameter) and not v.requires_grad}


def is_hugging_face(policy: nn.Module) -> bool:
    """Whether `policy` is a transformers model (or a peft wrapper of one)."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(unwrap(policy), transformers.PreTrainedModel)


def unwrap(policy: nn.Module) -> nn.Module:
    """The transformers model inside a peft wrapper, or `policy` itself."""
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(policy, peft.PeftModel):
        return policy.get_base_model()
    return policy


@contextlib.contextmanager
def evaluating(policy: nn.Module) -> Iterator[None]:
    """Dropout off for the block; every module's training flag is restored after it.

    Where gradients are on, layers under gradient checkpointing keep their own flag (transformers
    checkpoints only in training mode); the modules inside them are in evaluation mode.
    """
    modules = list(policy.modules())
    flags = [module.training for module in modules]
    policy.eval()
    if torch.is_grad_enabled():
        for module, training in zip(modules, flags):
            if training and getattr(module, "gradient_checkpointing", False) is True:
                module.training = True
    try:
        yield
    finally:
        for module, training in zip(modules, flags):
            module.training = training


def position_ids(attention_mask: Bool[Tensor, "N S"]) -> Int[Tensor, "N S"]:
    """Positions that count real tokens only, so that padding changes nothing."""
    return (attention_mask.long().cumsum(1) - 1).clamp_min(0)


def autocast(device: torch.device, config: TrainerConfig) -> torch.autocast:
    """The precision of the policy's forward passes, as a context manager."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.autocast == "bfloat16")
