"""Per-token weights through which a host's own policy-gradient loss gets our gradient.

A host that computes sum_t A_it r_it, with r = exp(logprob - its old logprob), has the gradient
A_it r_it in logprob_it. Where r_it = 1, handing it A_it = -dloss/dlogprob_it therefore gives the
gradient of any objective, whatever its mean, clip or gate, and everything that the host multiplies
or adds afterwards stays as it was.
"""

import dataclasses

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hmpo.config.objective import ObjectiveConfig
from hmpo.objective.loss import power_mean_loss
from hmpo.objective.terms import minibatch_band
from hmpo.types import Denominators


def surrogate_advantages(
    logprobs: Float[Tensor, "N T"],
    old_logprobs: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    advantages: Float[Tensor, " N"] | Float[Tensor, "N T"],
    config: ObjectiveConfig,
    exponent: Float[Tensor, ""] | Float[Tensor, " N"] | None = None,
) -> Float[Tensor, "N T"]:
    """Per-token advantages whose token sums have our gradient at ratio 1.

    They are L_i A_i dM_i/dlogprob_it: what is left of the objective when the host itself divides
    token sums by its denominator (L_i N, the number of tokens, ...). The policy term only.

    Args:
        logprobs: log-probs of the response tokens under the policy (nat); no gradient is needed.
        old_logprobs: log-probs of the same tokens under the behaviour policy.
        mask: True on response tokens.
        advantages: one per response, or one per token as in `power_mean_loss`.
        config: the member of the family; `reduction`, KL and entropy are left to the host. A band
            that depends on the minibatch is measured from these rows.
        exponent: overrides the config's exponents, as in `power_mean_loss`.

    Raises:
        ShapeError: shapes or dtypes do not fit.
    """
    # with N = 1, length_sum gives each row the weight L_i
    alone = {"kl_coef": 0.0, "entropy_coef": 0.0, "entropy_target": None}
    config = dataclasses.replace(config, reduction="length_sum", max_length=None, **alone)
    band = None
    if config.needs_band:
        inputs = (logprobs, old_logprobs, mask, advantages, config)
        band = minibatch_band(*inputs, exponent=exponent)
    with torch.enable_grad():
        free = logprobs.detach().requires_grad_()
        loss = power_mean_loss(
            free,
            old_logprobs,
            mask,
            advantages,
            config,
            exponent=exponent,
            denominators=Denominators(sequences=1, tokens=1),
            band=band,
        )
        (gradient,) = torch.autograd.grad(loss, free)
    return -gradient
