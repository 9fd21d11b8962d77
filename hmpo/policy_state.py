"""The weights of a policy that a checkpoint keeps: all but the frozen ones under LoRA."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

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
