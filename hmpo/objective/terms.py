"""The symbols of the objective, one function each; `hmpo.objective.loss` puts them together.

    d_it      log pi(y_it) - log pi_old(y_it), the token log ratios (nat)    `log_ratios`
    A_i       advantage, 0 for a response without tokens                     `segment_advantages`
    M_i       mean of the limited ratios                                     `mean_ratios`
    omega_i   weight of a response in the sum                                `row_weights`
    KL_i      token mean of KL(pi || ref) (nat)                              `row_kl`

The limits of d and of M stand in `hmpo.objective.bounds`, the exponent p of M in
`hmpo.objective.exponent`, the means themselves in `hmpo.objective.means`.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hmpo.config.objective import ObjectiveConfig
from hmpo.errors import ConfigError, ShapeError
from hmpo.objective.bounds import clamp_tokens, exp_linear, limit_means, log_mean, measure_band
from hmpo.objective.exponent import exponent_in_force
from hmpo.objective.kl import token_kl
from hmpo.objective.masking import masked_difference, scaled_gradient, without_padding
from hmpo.objective.means import Exponent
from hmpo.objective.segments import Turns, exponent_by_turn, tokens_by_turn, turns_of
from hmpo.types import Band, Denominators, Tokens


def check_tokens(tokens: Tokens, exponent: Tensor | None) -> None:
    """Shapes and dtypes, for callers without the test hook.

    Raises:
        ShapeError: a tensor is not of the shape or kind that `Tokens` documents, or `exponent`
            is not one float or one per row.
    """
    shape, rows = tokens.logprobs.shape, tokens.logprobs.shape[:1]
    if len(shape) != 2 or shape[1] == 0:
        raise ShapeError(f"logprobs: got {tuple(shape)}, expected (N, T) with T >= 1")
    tensors = {
        "logprobs": (tokens.logprobs, [shape]),
        "old_logprobs": (tokens.old_logprobs, [shape]),
        "advantages": (tokens.advantages, [rows, shape]),
        "ref_logprobs": (tokens.ref_logprobs, [shape]),
        "exponent": (exponent, [torch.Size(), rows]),
        "weights": (tokens.weights, [rows, shape]),
    }
    for name, (tensor, shapes) in tensors.items():
        if tensor is not None and not (tensor.shape in shapes and tensor.is_floating_point()):
            expected = " or ".join(str(tuple(s)) for s in shapes)
            raise ShapeError(
                f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, expected float {expected}"
            )
    mask = tokens.mask
    if mask.shape != shape or mask.dtype != torch.bool:
        raise ShapeError(
            f"mask: got {mask.dtype} {tuple(mask.shape)}, expected bool {tuple(shape)}"
        )


def weighted_logprobs(tokens: Tokens) -> Float[Tensor, "N T"]:
    """The policy's log-probs (nat), their gradient multiplied by the tokens' weights if any."""
    if tokens.weights is None or tokens.weights.ndim == 1:
        return tokens.logprobs
    weights = without_padding(tokens.weights.detach(), tokens.mask)
    return scaled_gradient(tokens.logprobs, weights)


def log_ratios(logprobs: Float[Tensor, "N T"], tokens: Tokens) -> Float[Tensor, "N T"]:
    """Token log ratios (nat), 0 on padding: `logprobs` minus the old ones, which are constants."""
    return masked_difference(logprobs, tokens.old_logprobs, tokens.mask)


def segment_advantages(
    tokens: Tokens, config: ObjectiveConfig, dtype: torch.dtype
) -> Float[Tensor, " N"] | Float[Tensor, "N T"]:
    """The advantages as constants, one per row; 0 for a row without tokens.

    One per token, 0 on padding, only where they vary within a row and the objective has no mean.

    Raises:
        ShapeError: advantages of tokens that share a mean differ.
    """
    given = tokens.advantages.detach()
    if given.ndim == 1:
        return torch.where(tokens.lengths > 0, given, 0).to(dtype)
    given = without_padding(given, tokens.mask)
    first = given.gather(1, tokens.mask.int().argmax(1, keepdim=True))
    varying = ((given - first) * tokens.mask != 0).any(1) & ~given.isnan().any(1)
    if not bool(varying.any()):
        return (first.squeeze(1) + 0 * given.sum(1)).to(dtype)  # one NaN makes its row NaN
    if config.has_mean:
        row = int(varying.nonzero()[0])
        raise ShapeError(
            f"advantages: got several in segment {row}, expected one for all tokens of a "
            f'{config.segments}, as segments = "{config.segments}" takes one mean of them'
        )
    return given.to(dtype)


def row_advantages(
    advantages: Float[Tensor, " N"] | Float[Tensor, "N T"] | Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
) -> Float[Tensor, " N"]:
    """One advantage a row: as they are, or the mean of those of its tokens."""
    if advantages.ndim == 1:
        return advantages
    return advantages.sum(1) / mask.sum(1).clamp(min=1)


def advantages_of_rows(
    advantages: Float[Tensor, " N"] | Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    config: ObjectiveConfig,
    turns: Turns | None,
) -> Float[Tensor, " M"]:
    """One advantage for each row that the mean acts on: its own, or the mean of its tokens'.

    Args:
        advantages: one per response, or one per token.
        mask: True on tokens that count.
        config: the member of the family.
        turns: the rows, where they are not the responses.

    Raises:
        ShapeError: advantages of tokens that share a mean differ.
    """
    if advantages.ndim == 1:
        return advantages if turns is None else turns.rows(advantages)
    whole = Tokens(logprobs=advantages, old_logprobs=advantages, mask=mask, advantages=advantages)
    tokens = tokens_by_turn(whole, turns)
    return row_advantages(segment_advantages(tokens, config, advantages.dtype), tokens.mask)


def mean_ratios(
    limited: Float[Tensor, "N T"],
    logprobs: Float[Tensor, "N T"],
    tokens: Tokens,
    advantages: Float[Tensor, " N"] | Float[Tensor, "N T"],
    p: Exponent,
    config: ObjectiveConfig,
    band: Band | None,
) -> Float[Tensor, " N"]:
    """Each row's mean of the limited ratios, itself limited if the clip is on sequences.

    With a detached gate there is no such mean, and the row's value is that of
    mean_t const(r_it) log pi(y_it); with an unweighted one the constant is 1. Advantages of its
    tokens are a factor of what the mean is taken of, and none of the row.

    Args:
        limited: what `limit_tokens` gave (nat), 0 on padding.
        logprobs: what `weighted_logprobs` gave; used where there is no mean.
        tokens: the rows.
        advantages: what `segment_advantages` gave.
        p: exponent in force.
        config: the member of the family.
        band: of the whole minibatch, where the clip needs one.
    """
    if not config.has_mean:
        product = exp_linear(limited.detach()) * without_padding(logprobs, tokens.mask)
        product = product * advantages if advantages.ndim == 2 else product
        return product.sum(1) / tokens.lengths.clamp(min=1)
    assert advantages.ndim == 1, "one for each mean"
    log_m = log_mean(limited, tokens.mask, p, config)
    lengths = tokens.lengths.to(advantages.dtype)
    return exp_linear(limit_means(log_m, lengths, advantages, config, band))


def row_weights(
    tokens: Tokens,
    config: ObjectiveConfig,
    denominators: Denominators | None,
    dtype: torch.dtype,
) -> Float[Tensor, " N"]:
    """What each row weighs in the sum; 0 for a row without tokens.

    1/N, its share of all tokens, L / (N max_length) or L / N, as `config.reduction` says; N and
    the number of tokens are those of these rows unless `denominators` says otherwise.
    """
    lengths, counted = tokens.lengths, tokens.lengths > 0
    if denominators is None:
        total = lengths.sum() if config.reduction == "token_mean" else counted.sum()
        total = total.clamp(min=1)
    else:
        sequences, all_tokens = denominators.sequences, denominators.tokens
        total = max(all_tokens if config.reduction == "token_mean" else sequences, 1)
    if config.reduction == "constant":
        assert config.max_length is not None, "checked by ObjectiveConfig"
        total = total * config.max_length
    return (counted if config.reduction == "sequence_mean" else lengths).to(dtype) / total


def with_row_corrections(omega: Float[Tensor, " N"], tokens: Tokens) -> Float[Tensor, " N"]:
    """The rows' weights in the sum times their corrections, if there is one per response."""
    if tokens.weights is None or tokens.weights.ndim == 2:
        return omega
    return omega * torch.where(tokens.lengths > 0, tokens.weights.detach(), 0)


def row_kl(tokens: Tokens, config: ObjectiveConfig) -> Float[Tensor, " N"]:
    """Token mean of KL(pi || ref) for each row (nat); 0 for a row without tokens.

    Raises:
        ConfigError: the reference's log-probs are not given.
    """
    if tokens.ref_logprobs is None:
        raise ConfigError(
            f"ref_logprobs: got None, expected (N, T) log-probs with kl_coef = {config.kl_coef}"
        )
    ref_logprobs = without_padding(tokens.ref_logprobs.detach(), tokens.mask)
    logprobs = without_padding(tokens.logprobs, tokens.mask)
    per_token = token_kl(logprobs, ref_logprobs, config.kl_estimator)
    return per_token.sum(1) / tokens.lengths.clamp(min=1)


def count_denominators(mask: Bool[Tensor, "N T"]) -> Denominators:
    """Rows with at least one token, and tokens, of a whole minibatch."""
    sequences, tokens = torch.stack((mask.any(1).sum(), mask.sum())).tolist()
    return Denominators(sequences=sequences, tokens=tokens)


@torch.no_grad()
def minibatch_band(
    logprobs: Float[Tensor, "N T"],
    old_logprobs: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    advantages: Float[Tensor, " N"] | Float[Tensor, "N T"],
    config: ObjectiveConfig,
    *,
    exponent: Float[Tensor, ""] | Float[Tensor, " N"] | None = None,
) -> Band:
    """Centre and scale of the clip band of a whole minibatch, to be handed to its parts.

    Arguments are those of `power_mean_objective`.
    """
    tokens = Tokens(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask, advantages=advantages)
    turns = turns_of(mask, config)
    tokens = tokens_by_turn(tokens, turns)
    d = log_ratios(tokens.logprobs, tokens)
    p = exponent_by_turn(exponent, turns)
    a = segment_advantages(tokens, config, d.dtype)
    p = exponent_in_force(d, tokens.mask, row_advantages(a, tokens.mask), config, p)
    return measure_band(clamp_tokens(d, config), tokens.mask, p, config)
