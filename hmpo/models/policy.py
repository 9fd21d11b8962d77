"""The policy as a module: what may be asked of it, and the weights that a checkpoint keeps."""

import re
import sys
from collections.abc import Mapping
from typing import Any, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from hmpo.attention.embedding import input_embedding
from hmpo.config import TrainerConfig
from hmpo.errors import CheckpointError, ModelError


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
    """Names in the state of parameters that do not train, tied ones under each of their names.

    What stands below such a name belongs to it: the scales of quantized weights.
    """
    values = policy.state_dict(keep_vars=True)
    frozen = {n for n, v in values.items() if isinstance(v, nn.Parameter) and not v.requires_grad}
    below = {n for n in values if any(n[: dot.start()] in frozen for dot in re.finditer(r"\.", n))}
    return frozen | below


def is_hugging_face(policy: nn.Module) -> bool:
    """Whether `policy` is a transformers model (or a peft wrapper of one)."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(unwrap(policy), transformers.PreTrainedModel)


def is_adapted(policy: nn.Module) -> bool:
    """Whether peft's adapters are around the policy's layers."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(policy, peft.PeftModel)


def unwrap(policy: nn.Module) -> nn.Module:
    """The transformers model inside a peft wrapper, or `policy` itself."""
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(policy, peft.PeftModel):
        return policy.get_base_model()
    return policy


def bare_policy(policy: nn.Module) -> nn.Module:
    """The policy without `torch.compile` and `DataParallel` around it: its parts are called alone.

    Raises:
        ModelError: a wrapper of several processes, whose gradients would not be averaged, or a
            peft method that puts virtual tokens before the prompt.
    """
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    fsdp = sys.modules.get("torch.distributed.fsdp")
    several = (nn.parallel.DistributedDataParallel,)
    if fsdp is not None:
        several += (fsdp.FullyShardedDataParallel,)
    while True:
        if isinstance(policy, several):
            raise ModelError(
                f"policy: got {type(policy).__name__}, expected a model of one process; several "
                "processes train with hmpo.adapters.trl"
            )
        if isinstance(policy, nn.DataParallel):
            policy = policy.module
        elif dynamo is not None and isinstance(policy, dynamo.OptimizedModule):
            policy = cast(nn.Module, policy._orig_mod)
        else:
            break
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(policy, peft.PeftModel):
        active = policy.active_peft_config
        if active.is_prompt_learning:
            raise ModelError(
                f"policy: got peft's {active.peft_type.value}, whose virtual tokens stand before "
                "every prompt, expected an adapter inside the layers, such as LoraConfig"
            )
    if is_hugging_face(policy) and not cast(Any, unwrap(policy)).config.return_dict:
        raise ModelError(
            "policy: got config.return_dict = False, expected True, without which transformers' "
            "own models do not run; set policy.config.return_dict = True"
        )
    return policy


def embeddable(
    policy: nn.Module, input_ids: Int[Tensor, "N S"], mask: Bool[Tensor, "N S"]
) -> Int[Tensor, "N S"]:
    """Ids whose padding is in the vocabulary too: an embedding looks up what is masked as well.

    Args:
        policy: any causal module.
        input_ids: token ids; where the mask is False, anything.
        mask: True on real tokens.
    """
    rows = 1
    if is_hugging_face(policy):
        weight = getattr(input_embedding(unwrap(policy)), "weight", None)
        rows = 1 if weight is None else len(weight)
    return torch.where(mask, input_ids, input_ids.clamp(0, rows - 1))


def position_ids(attention_mask: Bool[Tensor, "N S"]) -> Int[Tensor, "N S"]:
    """Positions that count real tokens only, so that padding changes nothing."""
    return (attention_mask.long().cumsum(1) - 1).clamp_min(0)


def autocast(device: torch.device, config: TrainerConfig) -> torch.autocast:
    """The precision of the policy's forward passes, as a context manager."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.autocast == "bfloat16")
