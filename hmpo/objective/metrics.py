"""What is measured of an objective's ratios: moments, spread, sample sizes, clipped shares.

Detached scalars by telemetry name (`hmpo.telemetry.fields` defines each), over rows that all have
at least one token. Token moments weigh all tokens equally, sequence moments all rows.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from hmpo.config.objective import ObjectiveConfig
from hmpo.objective.bounds import EXP_LIMIT, active_bounds, exp_linear, row_bounds
from hmpo.objective.means import effective_sample_size, log_power_mean, power_mean_weights
from hmpo.types import Band


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
    """What a mask (N, T) counts, at one wait for the device."""
    rows = mask.any(1)
    numbers = (rows.sum(), mask.sum(), (rows & (advantages >= 0)).sum())
    found = torch.stack(numbers).tolist()
    return Counted(mask=mask, rows=found[0], tokens=found[1], positive=found[2])


def _positions(flags: Tensor, count: int) -> Tensor:
    """Where `count` flags are True, in their order, without asking the device how many."""
    return torch.nonzero_static(flags, size=count).squeeze(1)


def count_metrics(
    mask: Tensor, log_ratio: Tensor, config: ObjectiveConfig, band: Band | None, counted: Counted
) -> dict[str, Tensor]:
    """Counts, and bounds: with a band of varying width their mean over the rows with tokens."""
    low, high = (log_ratio.new_tensor(bound) for bound in config.log_bounds)
    center = log_ratio.new_tensor(0.0)
    if band is not None:
        lengths = counted.of_rows(mask.sum(1)).to(log_ratio.dtype)
        low, high = (b.mean() for b in row_bounds(lengths, torch.ones_like(lengths), config, band))
        center = band.center if config.clip_center == "drift" else center
    return {
        "n_seq": mask.any(1).sum(),
        "n_tokens": mask.sum(),
        "clip/lo": low,
        "clip/hi": high,
        "clip/center": center,
    }


def row_metrics(p: Tensor, advantages: Tensor, counted: Counted) -> dict[str, Tensor]:
    """Advantages, and exponents over all rows and those of each sign (all, if there are none)."""
    positive, mean = advantages >= 0, p.mean()
    count, rest = counted.positive, len(p) - counted.positive
    return {
        "ratio/p": mean,
        "ratio/p_std": p.std(correction=0),
        "ratio/p_pos": p[_positions(positive, count)].mean() if count else mean,
        "ratio/p_neg": p[_positions(~positive, rest)].mean() if rest else mean,
        "adv/mean": advantages.mean(),
        "adv/var": advantages.var(correction=0),
        "adv/abs_mean": advantages.abs().mean(),
    }


def ratio_metrics(
    log_ratio: Tensor, mask: Tensor, p: Tensor, log_m: Tensor, d: Tensor
) -> dict[str, Tensor]:
    """Means of the unclipped ratios, their spread, and effective sample sizes.

    Args:
        log_ratio: token log ratios (nat), 0 on padding.
        mask: True on response tokens.
        p: exponent of each row.
        log_m: log of each row's mean in use.
        d: the log ratios of the tokens alone.
    """
    log_a, log_g, log_h = (log_power_mean(log_ratio, mask, q) for q in (1.0, 0.0, -1.0))
    gap = (log_a - log_h).clamp(min=0)  # never negative; rounding of equal ratios may be
    skew = 0.5 * (log_a + log_h) - log_g
    m = exp_linear(log_m)
    whole = log_ratio.sum(1).clamp(-EXP_LIMIT, EXP_LIMIT).exp()
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
        "ratio/d_var": d.var(correction=0),
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


def clip_metrics(
    mask: Tensor,
    advantages: Tensor,
    config: ObjectiveConfig,
    band: Band | None,
    log_m: Tensor,
    d: Tensor,
) -> dict[str, Tensor]:
    """Shares of clipped units; a unit is a token or, with a sequence clip, a response."""
    low, high = row_bounds(mask.sum(1).to(d.dtype), advantages, config, band)
    x, sign, rows = log_m, advantages, (low, high)
    rows += active_bounds(low, high, advantages, config)
    if config.clip_level != "sequence":
        x, row_of = d, _positions(mask.flatten(), len(d)) // mask.shape[1]
        sign, *rows = (v[row_of] for v in (sign, *rows))
    low, high, floor, ceiling = rows
    above, below = x > high, x < low
    positive, negative = sign > 0, sign < 0
    every = torch.ones_like(positive)
    return {
        "clip/frac": _share(((x > ceiling) | (x < floor)) & (positive | negative), every),
        "clip/frac_pos": _share(above & positive, positive),
        "clip/frac_neg": _share(below & negative, negative),
        "clip/frac_band": _share(above | below, every),
    }


QUANTILE_LIMIT = 2**24
"""Most values that `torch.quantile` takes; of more, every n-th is looked at."""


def _quantiles(d: Tensor) -> dict[str, Tensor]:
    """Three quantiles of the token log ratios."""
    d = d[:: -(-d.numel() // QUANTILE_LIMIT)]
    low, middle, high = torch.quantile(d, d.new_tensor([0.05, 0.5, 0.95]))
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
