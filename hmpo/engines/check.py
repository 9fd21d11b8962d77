"""Whether what an engine says that it sampled from is the policy: rho = 1 up to rounding.

For a token t that the engine drew with probability mu_t, and to which the policy of the same
weights gives pi_old,t, rho_t = pi_old,t / mu_t is 1 but for the order in which two programs add
numbers. Old weights (a tied head that was not sent, a cache of prefixes, a tensor that was left
out), other log-probs (without the temperature) or another precision are what else it can be.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hmpo.errors import EngineError

MEAN, MOST = 5e-4, 2e-2
"""Largest |log rho| (nat) in float32, on average over tokens and of one token."""
MEAN_16, MOST_16 = 0.1, 2.0
"""The same where anything is computed in 16 bits."""


@torch.no_grad()
def refuse_other_weights(
    old_logprobs: Float[Tensor, "N T"],
    sampling_logprobs: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    rounded: bool,
) -> None:
    """Stop where an engine draws from something other than the policy.

    Seen of vLLM on the right weights: at most 5e-5 in float32; 0.2, and 0.04 on average, in
    bfloat16. An update that moves log-probs by less than the tolerance is not told from none.

    Args:
        old_logprobs: of the response tokens by the policy itself (nat).
        sampling_logprobs: of the same by the engine, at the temperature.
        mask: True on response tokens.
        rounded: whether the policy or the engine computes in 16 bits.

    Raises:
        EngineError: one line with both numbers.
    """
    apart = (old_logprobs.double() - sampling_logprobs.double())[mask].abs()
    if apart.numel() == 0:
        return
    mean, most = apart.mean().item(), apart.max().item()
    limits = (MEAN_16, MOST_16) if rounded else (MEAN, MOST)
    if mean <= limits[0] and most <= limits[1]:
        return
    raise EngineError(
        f"rollout.engine: got log-probs that are {mean:.2g} nat from the policy's own "
        f"on average and {most:.2g} at most, expected {limits[0]:g} and {limits[1]:g}; it serves "
        "other weights, another dtype (trainer.sampling_dtype) or no --logprobs-mode "
        "processed_logprobs; start it anew, then resume the run"
    )
