"""Numbers that would corrupt the weights stop every process, before the optimizer sees them."""

import math
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from hmpo.adapters.trl.log import Rows
from hmpo.errors import NonFiniteError

RATIO_RANGE = 80.0
"""Largest |log ratio| (nat) that TRL's own ratio may take: exp of it is a normal float32."""
_REMEDY = "resume from the last checkpoint with a lower learning rate"


def near_old_logprobs(rows: Rows) -> tuple[Tensor, Bool[Tensor, "N T"]]:
    """Old log-probs whose ratio is a float32 above 0, and the tokens where it is too large.

    A ratio below exp(-80) is raised to it: what TRL multiplies by it, the KL term, is 0 in float32
    next to that of any other token. On padding the ratio is 1.
    """
    log_ratio = torch.where(rows.mask, rows.logprobs - rows.old_logprobs, 0.0)
    low = log_ratio < -RATIO_RANGE
    near = torch.where(low, rows.logprobs + RATIO_RANGE, rows.old_logprobs)
    return torch.where(rows.mask, near, rows.logprobs), log_ratio > RATIO_RANGE


def refuse_bad_tokens(bad: Bool[Tensor, "N T"], rows: Rows, update: int, accelerator: Any) -> None:
    """Stop every process where the gradient of a token of any of them is not finite.

    Raises:
        NonFiniteError: the first such token, and the rank that has it.
    """
    report = rows.logprobs.new_full((1, 5), -1.0, dtype=torch.float32)
    if bool(bad.any()):
        row, token = bad.nonzero()[0].tolist()
        advantage = rows.advantages[row]
        advantage = advantage if advantage.ndim == 0 else advantage[token]
        seen = (rows.logprobs[row, token], rows.old_logprobs[row, token], advantage)
        report[0] = torch.tensor([row, token, *map(float, seen)], device=report.device)
    count = accelerator.num_processes
    for rank, (row, token, new, old, advantage) in enumerate(accelerator.gather(report).tolist()):
        if row >= 0:
            of_rank = f", rank {rank} of {count}" if count > 1 else ""
            raise NonFiniteError(
                f"update {update}: the gradient of response {row:.0f} is not finite "
                f"(token {token:.0f}{of_rank}): log-prob {new:g}, before {old:g}, advantage "
                f"{advantage:g}; {_REMEDY}"
            )


def finite_norm(norm: Any, update: int) -> Any:
    """The gradient's norm, if it is finite or None.

    Raises:
        NonFiniteError: NaN or infinite; all processes have the same.
    """
    if norm is not None and not math.isfinite(float(norm)):
        raise NonFiniteError(
            f"update {update}: the gradient's norm is {float(norm)}, expected a finite number (the "
            "log-probs were finite; look at the KL and entropy terms and at the model's "
            f"precision); {_REMEDY}"
        )
    return norm
