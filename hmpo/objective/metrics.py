"""What is measured of an objective: its terms, moments and spread of the ratios, clipped shares.

Detached scalars by telemetry name (`hmpo.telemetry.fields` defines each). Token moments weigh all
tokens equally, sequence moments all rows with at least one token; the other rows do not count.
"""

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hmpo.config.objective import ObjectiveConfig
from hmpo.objective.bounds import (
    EXP_LIMIT,
    active_bounds,
    clamp_tokens,
    exp_linear,
    log_mean,
    measure_band,
    row_bounds,
)
from hmpo.objective.exponent import exponent_in_force
from hmpo.objective.kl import exp_minus_tangent, k3
from hmpo.objective.masking import thinned, without_padding
from hmpo.objective.means import Exponent, effective_sample_size, log_power_mean, power_mean_weights
from hmpo.objective.segments import Turns, exponent_by_turn, tokens_by_turn, turns_of
from hmpo.objective.terms import (
    check_tokens,
    log_ratios,
    mean_ratios,
    row_advantages,
    row_kl,
    row_weights,
    segment_advantages,
)
from hmpo.objective.weights import has_own_weight, limit_or_weigh, outside, row_penalties
from hmpo.types import Band, Tokens


@torch.no_grad()
def objective_metrics(
    logprobs: Float[Tensor, "N T"],
    old_logprobs: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    advantages: Float[Tensor, " N"] | Float[Tensor, "N T"],
    config: ObjectiveConfig,
    *,
    ref_logprobs: Float[Tensor, "N T"] | None = None,
    exponent: Float[Tensor, ""] | Float[Tensor, " N"] | None = None,
    band: Band | None = None,
) -> dict[str, Tensor]:
    """Detached scalars by telemetry name, over the rows with at least one token.

    `pg_loss` is -J of these rows by their own denominators, `kl_loss` what the KL term adds.
    Token moments weigh all tokens equally, sequence moments all rows; variances are population
    variances. `clip/frac` counts the units (tokens or sequences, as the clip) whose clipped
    branch is active: above the upper bound with A > 0, below the lower one with A < 0;
    `clip/frac_pos` and `clip/frac_neg` are the shares among the units of that sign (0 if there
    are none) and `clip/frac_band` is the share outside the band whatever the sign. Where the mean
    acts on turns, rows are turns, but for `n_seq` and `adv/*`.
    Without any counted row only the counts and bounds are returned.

    Arguments and errors are those of `power_mean_objective`.
    """
    whole = Tokens(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        mask=mask,
        advantages=advantages,
        ref_logprobs=ref_logprobs,
    )
    check_tokens(whole, exponent)
    turns = turns_of(mask, config)
    tokens, exponent = tokens_by_turn(whole, turns), exponent_by_turn(exponent, turns)
    mask, d = tokens.mask, log_ratios(tokens.logprobs, tokens)
    of_tokens = segment_advantages(tokens, config, d.dtype)
    a = row_advantages(of_tokens, mask)
    limited = limit_or_weigh(d, tokens.logprobs, mask, of_tokens, config)
    p = exponent_in_force(d, mask, a, config, exponent, limited)
    if config.needs_band and band is None:
        band = measure_band(limited, mask, p, config)
    counted = count_units(mask, a)
    metrics = count_metrics(tokens, d, config, band, counted)
    if not counted.rows:
        return metrics
    m = mean_ratios(limited, tokens.logprobs, tokens, of_tokens, p, config, band)
    del limited  # a (N, T) tensor less while the rest is measured
    d_tokens = counted.of_tokens(d)
    penalties = row_penalties(d, tokens.logprobs, mask, of_tokens, config)
    metrics |= loss_metrics(whole, of_tokens, m, config, turns, penalties)
    metrics |= kl_metrics(tokens, d_tokens, counted)
    all_p = torch.as_tensor(p, dtype=d.dtype, device=d.device).expand(len(mask))
    a_rows, p_rows = counted.of_rows(a), counted.of_rows(all_p)
    d_rows, mask_rows = counted.of_rows(d), counted.of_rows(mask)
    log_m = log_mean(d_rows, mask_rows, p_rows, config)
    metrics |= row_metrics(p_rows, a_rows, counted)
    metrics |= ratio_metrics(d_rows, mask_rows, p_rows, log_m, d_tokens)
    metrics |= limit_metrics(tokens, d, of_tokens, p, log_m, config, band, counted)
    return metrics if turns is None else metrics | response_metrics(whole, d.dtype)


@dataclass(frozen=True, eq=False, kw_only=True)
class Counted:
    """Which rows and tokens count; selecting them then waits for no device.

    Example: mask [[1, 1], [0, 0]], advantages [0.5, 0]: rows 1, tokens 2, positive 1.
    """

    mask: Tensor
    rows: int
    """Rows with at least one token."""
    tokens: int
    positive: int
    """Of these rows, those with advantage >= 0."""

    def of_rows(self, x: Tensor) -> Tensor:
        """The rows of `x` (N, ...) that count, as selecting by `mask.any(1)`."""
        return x if self.rows == len(x) else x[_positions(self.mask.any(1), self.rows)]

    def of_tokens(self, x: Tensor) -> Tensor:
        """The values of `x` (N, T) that count, as selecting by `mask`."""
        return x.flatten()[self._places]

    @functools.cached_property
    def _places(self) -> Tensor:
        return _positions(self.mask.flatten(), self.tokens)


def count_units(mask: Tensor, advantages: Tensor) -> Counted:
    """What a mask (N, T) and advantages (N,) count, at one wait for the device."""
    in_use = mask.any(1)
    counts = (in_use.sum(), mask.sum(), (in_use & (advantages >= 0)).sum())
    rows, tokens, positive = torch.stack(counts).tolist()
    return Counted(mask=mask, rows=rows, tokens=tokens, positive=positive)


def _positions(flags: Tensor, count: int) -> Tensor:
    """Where `count` flags are True, in their order, without asking the device how many."""
    return torch.nonzero_static(flags, size=count).squeeze(1)


def count_metrics(
    tokens: Tokens, d: Tensor, config: ObjectiveConfig, band: Band | None, counted: Counted
) -> dict[str, Tensor]:
    """Counts, and bounds (nat): with a band their mean over the rows with tokens, if any.

    Args:
        tokens: the rows.
        d: token log ratios (nat).
        config: the member of the family.
        band: of the whole minibatch, where the clip needs one.
        counted: what counts among the rows.
    """
    low, high = (d.new_tensor(bound) for bound in config.log_bounds)
    center = d.new_tensor(0.0)
    if band is not None and counted.rows:
        lengths = counted.of_rows(tokens.lengths).to(d.dtype)
        bounds = row_bounds(torch.ones_like(lengths), config, band, lengths)
        low, high = (bound.mean() for bound in bounds)
        center = band.center if config.clip_center == "drift" else center
    return {
        "n_seq": tokens.mask.any(1).sum(),
        "n_tokens": tokens.mask.sum(),
        "clip/lo": low,
        "clip/hi": high,
        "clip/center": center,
    }


def loss_metrics(
    tokens: Tokens,
    a: Tensor,
    m: Tensor,
    config: ObjectiveConfig,
    turns: Turns | None = None,
    penalties: Tensor | None = None,
) -> dict[str, Tensor]:
    """The two terms of the loss, by the rows' own denominators.

    Args:
        tokens: the responses.
        a: the rows' advantages (N,), or those of tokens (N, T), which are in the means already.
        m: the rows' means (N,).
        config: the member of the family.
        turns: the rows, where they are not the responses.
        penalties: the rows' proximal terms (N,), if there are any; they count to the first.
    """
    omega = row_weights(tokens, config, None, m.dtype)
    kl_loss = m.new_tensor(0.0)
    if config.kl_coef > 0:
        kl_loss = config.kl_coef * (omega * row_kl(tokens, config)).sum()
    omega = omega if turns is None else turns.weights(omega)
    pg_loss = -((omega * a if a.ndim == 1 else omega) * m).sum()
    if penalties is not None:
        pg_loss = pg_loss + config.proximal_coef * (omega * penalties).sum()
    return {"pg_loss": pg_loss, "kl_loss": kl_loss}


def kl_metrics(tokens: Tokens, d: Tensor, counted: Counted) -> dict[str, Tensor]:
    """Token means of KL estimates (nat): to the old policy, and to the reference if it is known.

    Args:
        tokens: the rows.
        d: the log ratios of the tokens alone (nat).
        counted: what counts among the rows.
    """
    metrics = {"kl/k1": -d.mean(), "kl/k3": exp_minus_tangent(d).mean()}
    if tokens.ref_logprobs is not None:
        to_ref = counted.of_tokens(tokens.logprobs) - counted.of_tokens(tokens.ref_logprobs)
        metrics["kl/ref"] = k3(to_ref).mean()
    return metrics


def row_metrics(p: Tensor, advantages: Tensor, counted: Counted) -> dict[str, Tensor]:
    """Advantages, and exponents over all rows and those of each sign (all, if there are none).

    Args:
        p: exponent of each counted row.
        advantages: advantage of each counted row.
        counted: how many rows have which sign.
    """
    positive, mean = advantages >= 0, p.mean()
    count, rest = counted.positive, len(p) - counted.positive
    return {
        "ratio/p": mean,
        "ratio/p_std": p.std(correction=0),
        "ratio/p_pos": p[_positions(positive, count)].mean() if count else mean,
        "ratio/p_neg": p[_positions(~positive, rest)].mean() if rest else mean,
        **advantage_metrics(advantages),
    }


def response_metrics(whole: Tokens, dtype: torch.dtype) -> dict[str, Tensor]:
    """What is of whole responses where the rows are turns."""
    rows = whole.mask.any(1)
    given = whole.advantages
    if given.ndim == 2:
        given = row_advantages(without_padding(given, whole.mask), whole.mask)
    return {"n_seq": rows.sum(), **advantage_metrics(given[rows].to(dtype))}


def advantage_metrics(advantages: Tensor) -> dict[str, Tensor]:
    """Moments of the advantages of counted responses (n,)."""
    return {
        "adv/mean": advantages.mean(),
        "adv/var": advantages.var(correction=0),
        "adv/abs_mean": advantages.abs().mean(),
    }


def ratio_metrics(
    log_ratio: Tensor, mask: Tensor, p: Tensor, log_m: Tensor, d: Tensor
) -> dict[str, Tensor]:
    """Means of the unclipped ratios, their spread, and effective sample sizes.

    Args:
        log_ratio: token log ratios (nat), 0 on padding, of rows that all have some.
        mask: True on response tokens.
        p: exponent of each row.
        log_m: log of each row's mean in use (nat).
        d: the log ratios of the tokens alone (nat).
    """
    log_a, log_g, log_h = (log_power_mean(log_ratio, mask, q) for q in (1.0, 0.0, -1.0))
    gap = (log_a - log_h).clamp(min=0)  # never negative; rounding of equal ratios may be
    skew = 0.5 * (log_a + log_h) - log_g
    m = exp_linear(log_m)
    whole = log_ratio.sum(1).clamp(-EXP_LIMIT, EXP_LIMIT).exp()
    variance = d.var(correction=0)
    return {
        "ratio/logA": log_a.mean(),
        "ratio/logG": log_g.mean(),
        "ratio/logH": log_h.mean(),
        "ratio/log_gap_mean": gap.mean(),
        "ratio/log_gap_p50": gap.quantile(0.5),
        "ratio/log_gap_p95": gap.quantile(0.95),
        "ratio/log_gap_max": gap.max(),
        "ratio/log_skew_mean": skew.mean(),
        "ratio/d_mean": d.mean(),
        "ratio/d_var": variance,
        "ratio/sigma": variance.sqrt(),
        "ratio/sigma_sqrt_l": (variance * (len(d) / len(mask))).sqrt(),
        "ratio/d_min": d.min(),
        "ratio/d_max": d.max(),
        **_quantiles(d),
        "ratio/chi2_tok": (2 * d).clamp(max=EXP_LIMIT).exp().mean() - 1,
        "ratio/m_mean": m.mean(),
        "ratio/m_std": m.std(correction=0),
        "ratio/m_min": m.min(),
        "ratio/m_max": m.max(),
        "ratio/clamped": (log_m > EXP_LIMIT).sum(),
        "ratio/ess_tok": effective_sample_size(log_ratio, mask, p).mean(),
        "ratio/w_entropy": _weight_entropy(log_ratio, mask, p),
        "ratio/ess_seq": whole.sum().square() / (whole.numel() * whole.square().sum()),
    }


def limit_metrics(
    tokens: Tokens,
    d: Tensor,
    advantages: Tensor,
    p: Exponent,
    log_m: Tensor,
    config: ObjectiveConfig,
    band: Band | None,
    counted: Counted,
) -> dict[str, Tensor]:
    """What clamp, clip or constant weights hold back.

    Args:
        tokens: the rows.
        d: token log ratios (nat), 0 on padding.
        advantages: advantage of each row, or of each token.
        p: exponent in force.
        log_m: log of each counted row's mean in use (nat).
        config: the member of the family.
        band: of the whole minibatch, where the clip needs one.
        counted: what counts among the rows.
    """
    if has_own_weight(config) or advantages.ndim == 2:
        weighed = outside(d, tokens.logprobs, tokens.mask, advantages, config)
        sign = (advantages if advantages.ndim == 2 else advantages.unsqueeze(1)).expand_as(d)
        return _clip_shares(*(counted.of_tokens(x) for x in (sign, *weighed)))
    found, d_tokens, mask = {}, counted.of_tokens(d), counted.of_rows(tokens.mask)
    if config.token_clamp is not None:
        found["clip/token_frac"] = (d_tokens.abs() > config.token_clamp).to(d.dtype).mean()
        p_rows = counted.of_rows(torch.as_tensor(p, dtype=d.dtype, device=d.device).expand(len(d)))
        log_m = log_mean(clamp_tokens(counted.of_rows(d), config), mask, p_rows, config)
    rows = counted.of_rows(advantages)
    return found | clip_metrics(mask, rows, config, band, log_m, d_tokens)


def clip_metrics(
    mask: Tensor,
    advantages: Tensor,
    config: ObjectiveConfig,
    band: Band | None,
    log_m: Tensor,
    d: Tensor,
) -> dict[str, Tensor]:
    """Shares of clipped units; a unit is a token or, with a sequence clip, a response.

    Args:
        mask: True on response tokens, of rows that all have some.
        advantages: advantage of each row.
        config: the member of the family.
        band: of the whole minibatch, where the clip needs one.
        log_m: log of each row's mean, of which a sequence clip is (nat).
        d: the log ratios of the tokens alone (nat).
    """
    low, high = row_bounds(advantages, config, band, mask.sum(1).to(d.dtype))
    floor, ceiling = active_bounds(low, high, advantages, config)
    value, sign = log_m, advantages
    if config.clip_level != "sequence":
        row = _positions(mask.flatten(), len(d)) // mask.shape[1]
        value, sign = d, advantages[row]
        low, high, floor, ceiling = low[row], high[row], floor[row], ceiling[row]
    above, below = value > high, value < low
    return _clip_shares(sign, above, below, (value > ceiling) | (value < floor))


def _clip_shares(sign: Tensor, above: Tensor, below: Tensor, blocked: Tensor) -> dict[str, Tensor]:
    """The four shares, of units with this sign of the advantage (n,)."""
    positive, negative = sign > 0, sign < 0
    every = torch.ones_like(positive)
    return {
        "clip/frac": _share(blocked & (positive | negative), every),
        "clip/frac_pos": _share(above & positive, positive),
        "clip/frac_neg": _share(below & negative, negative),
        "clip/frac_band": _share(above | below, every),
    }


def _quantiles(d: Tensor) -> dict[str, Tensor]:
    """Three quantiles of the token log ratios."""
    low, middle, high = torch.quantile(thinned(d), d.new_tensor([0.05, 0.5, 0.95]))
    return {"ratio/d_p05": low, "ratio/d_p50": middle, "ratio/d_p95": high}


def _weight_entropy(log_ratio: Tensor, mask: Tensor, p: Tensor) -> Tensor:
    """Row mean of the token weights' entropy over log L; 1 for a row of one token."""
    weights = power_mean_weights(log_ratio, mask, p)
    entropy = torch.special.entr(weights).sum(1)
    most = mask.sum(1).to(entropy.dtype).log()
    return torch.where(most > 0, entropy / most.masked_fill(most == 0, 1), 1).mean()


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Count of `part` over count of `whole`; 0 of none."""
    return part.sum() / whole.sum().clamp(min=1)
