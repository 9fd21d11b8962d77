"""Where the exponent p comes from: fixed, scheduled, learned, matched, from rewards, controlled.

`matched_exponent` is a pure rule inside the objective (PMPO). The others are sources: small
objects that a trainer asks for p before each update, and that keep what they have learned.

    linear      p_u = p + (end - p) u / (U - 1), u of U updates or, held within each of them,
                rollouts                                                    HoelderPO, 2605.12058
    reward      p = exp(-gamma mu_R), high = clip_high + gain tanh(mu_R / sigma_R)
                                                                            APMPO, 2605.04066
    learnable   p = bound tanh(rho), by Adam on one of
                ess        (mean_i log(ESS_i / L_i) - log target)^2
                variance   mean_i A_i^2 M_p,i^2 sum_t w_it^2                2605.12058, theorem 7
                surrogate  the loss itself; degenerate, see below

The slope of the surrogate in p is mean_i A_i M_i KL(w_i || uniform) / p^2: it only says whether
dispersion goes with advantage, and pushes p to its bound.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hmpo.config.objective import ObjectiveConfig
from hmpo.errors import ConfigError
from hmpo.objective.bounds import limit_tokens
from hmpo.objective.means import Exponent, log_power_mean
from hmpo.objective.solve import solve_size
from hmpo.types import Metrics

Surrogate = Callable[[Float[Tensor, ""]], Float[Tensor, ""]]
"""The loss as a function of p, everything else constant."""


def exponent_in_force(
    log_ratio: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    advantages: Float[Tensor, " N"],
    config: ObjectiveConfig,
    exponent: Float[Tensor, ""] | Float[Tensor, " N"] | None,
    clipped: Float[Tensor, "N T"] | None = None,
) -> Exponent:
    """The exponent that the objective uses: one number, or one per row.

    Args:
        log_ratio: token log ratios (nat), 0 on padding.
        mask: True on response tokens.
        advantages: one per response.
        config: the member of the family.
        exponent: what a source says, which then is the answer; None leaves it to `config`.
        clipped: what `limit_tokens` makes of the log ratios (nat), where it is known already.
    """
    if exponent is not None:
        return exponent
    if config.exponent.kind == "matched":
        return matched_exponent(log_ratio, mask, advantages, config, clipped)
    positive, negative = config.exponent_for(positive=True), config.exponent_for(positive=False)
    if positive == negative:
        return positive
    return torch.where(
        advantages >= 0, advantages.new_tensor(positive), advantages.new_tensor(negative)
    )


@torch.no_grad()
def matched_exponent(
    log_ratio: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    advantages: Float[Tensor, " N"],
    config: ObjectiveConfig,
    clipped: Float[Tensor, "N T"] | None = None,
) -> Float[Tensor, " N"]:
    """An exponent in [0, 1] for each response from its share f of clipped tokens; no gradient.

    PMPO (arXiv 2601.22521) maps f to a target effective sample size and solves for p. Its map is
    not in the sources at hand; this one is our reconstruction, linear between the two ends that
    its abstract names. With e_1 the size at p = 1 of the clipped ratios, as a share of L,

        target = e_1 + (1 - e_1) min(1, f / saturation)

    so that no clipped token gives p = 1 (GRPO), and f >= saturation p = 0 (GMPO). For normal log
    ratios that is about p = sqrt(1 - f / saturation), which `matching = "closed_form"` takes.

    Args:
        log_ratio: token log ratios (nat), 0 on padding. A row with a NaN gives NaN.
        mask: True on response tokens.
        advantages: one per response; their sign decides which bound clips.
        config: the member of the family, with a token clip.
        clipped: the log ratios after that clip (nat), where they are known already.
    """
    lengths = mask.sum(1).clamp(min=1).to(log_ratio.dtype)
    if clipped is None:
        clipped = limit_tokens(log_ratio, mask, advantages, config)
    share = ((clipped != log_ratio) & mask).sum(1) / lengths
    phi = share.div_(config.exponent.saturation).clamp_(max=1)
    if config.exponent.matching == "closed_form":
        return (1 - phi).sqrt()
    return solve_size(clipped, mask, phi, p_max=1.0, relative=True)


class ExponentSource:
    """The exponent of the configuration itself, and what every source can be asked."""

    def __init__(self, objective: ObjectiveConfig) -> None:
        self.objective = objective
        """The objective in force; a source may move its bounds."""

    def observe(self, rewards: Float[Tensor, " N"]) -> None:
        """Take note of a rollout's rewards, those of valid responses."""

    def value(self, update: int) -> float | None:
        """Exponent of the 0-based update; None leaves it to the configuration."""
        return None

    def learn(
        self,
        log_ratio: Float[Tensor, "N T"],
        mask: Bool[Tensor, "N T"],
        advantages: Float[Tensor, " N"],
        surrogate: Surrogate,
    ) -> Metrics:
        """Follow an applied update, given its whole minibatch; returns metrics."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What the source has learned, as plain values and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""


class LinearExponent(ExponentSource):
    """From `objective.p` at the first update to `exponent.end` at the last; constant after it.

    With `exponent.per = "rollout"` all updates of a rollout have one exponent, and the last rollout
    that begins within `updates` has `exponent.end`.

    Args:
        objective: the member.
        updates: from first to last.
        per_rollout: updates that a rollout serves.

    Raises:
        ConfigError: there is no first and last.
    """

    def __init__(
        self, objective: ObjectiveConfig, updates: int | None, per_rollout: int = 1
    ) -> None:
        super().__init__(objective)
        if updates is None or updates < 2:
            raise ConfigError(
                f"exponent.updates: got {updates!r}, expected an integer >= 2 (or the trainer's "
                'total_updates) with exponent.kind = "linear"'
            )
        self.unit = per_rollout if objective.exponent.per == "rollout" else 1
        self.steps = -(-updates // self.unit)
        if self.steps < 2:
            raise ConfigError(
                f"exponent.updates: got {updates} with {per_rollout} updates per rollout, expected "
                'two rollouts or more with exponent.per = "rollout" (or exponent.per = "update")'
            )

    def value(self, update: int) -> float:
        """Exponent of the 0-based update."""
        share = min(1.0, update // self.unit / (self.steps - 1))
        return (1 - share) * self.objective.p + share * self.objective.exponent.end


class ControllerExponent(ExponentSource):
    """`objective.p` until a controller sets another exponent."""

    def __init__(self, objective: ObjectiveConfig) -> None:
        super().__init__(objective)
        self.p = objective.p

    def set(self, p: float) -> None:
        """Use `p` from the next update on.

        Raises:
            ConfigError: `p` is not finite.
        """
        if not math.isfinite(p):
            raise ConfigError(f"p: got {p!r} from a controller, expected a finite number")
        self.p = float(p)

    def value(self, update: int) -> float:
        """Exponent that was set last."""
        return self.p

    def state_dict(self) -> dict[str, Any]:
        """The exponent in force."""
        return {"p": self.p}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self.p = state["p"]


class RewardExponent(ExponentSource):
    """APMPO: p and the upper bound from mean and deviation of a rollout's rewards in [0, 1]."""

    def __init__(self, objective: ObjectiveConfig) -> None:
        super().__init__(objective)
        self.base = objective
        self.p: float | None = None

    def observe(self, rewards: Float[Tensor, " N"]) -> None:
        """Set p = exp(-gamma mu) and high = clip_high + gain tanh(mu / sigma).

        Without valid rewards the former values stay. Equal rewards have sigma = 0: the limit of
        tanh is 1, or 0 where they are all 0.

        Raises:
            ConfigError: the mean is outside [0, 1].
        """
        if len(rewards) == 0:
            return
        mu = float(rewards.double().mean())
        sigma = float(rewards.double().std(correction=0))
        if not 0 <= mu <= 1:
            raise ConfigError(
                f'exponent.kind: got "reward" with a mean reward of {mu:g}, expected rewards '
                "scaled to [0, 1]"
            )
        confidence = math.tanh(mu / sigma) if sigma > 0 else float(mu > 0)
        self.p = math.exp(-self.base.exponent.gamma * mu)
        high = self.base.clip_high + self.base.exponent.clip_gain * confidence
        self.objective = replace(self.base, clip_high=high)

    def value(self, update: int) -> float | None:
        """Exponent of the rollout in use."""
        return self.p

    def state_dict(self) -> dict[str, Any]:
        """Exponent and upper bound in force."""
        return {"p": self.p, "clip_high": self.objective.clip_high}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self.p = state["p"]
        self.objective = replace(self.base, clip_high=state["clip_high"])


class LearnableExponent(ExponentSource):
    """A scalar p = bound tanh(rho) with its own optimizer, apart from the model's."""

    def __init__(self, objective: ObjectiveConfig, device: torch.device) -> None:
        super().__init__(objective)
        config = objective.exponent
        if config.criterion == "surrogate":
            warnings.warn(
                "the exponent is learned by the surrogate, which only measures whether dispersion "
                f"goes with advantage: expect p to run to its bound {config.bound:g}",
                stacklevel=3,
            )
        start = math.atanh(objective.p / config.bound)
        widest = torch.float32 if device.type == "mps" else torch.float64
        self.rho = torch.nn.Parameter(torch.tensor(start, dtype=widest, device=device))
        group = {"params": [self.rho], "lr": config.lr, "weight_decay": 0.0}
        self.optimizer = torch.optim.Adam([group])

    def exponent(self) -> Float[Tensor, ""]:
        """The exponent p = bound tanh(rho), a float scalar differentiable in rho."""
        return self.objective.exponent.bound * torch.tanh(self.rho)

    def value(self, update: int) -> float:
        """Exponent in force."""
        return float(self.exponent().detach())

    def learn(
        self,
        log_ratio: Float[Tensor, "N T"],
        mask: Bool[Tensor, "N T"],
        advantages: Float[Tensor, " N"],
        surrogate: Surrogate,
    ) -> Metrics:
        """One step of rho on the criterion over the rows with tokens.

        Returns:
            `ratio/p_step`, the change of p, and `ratio/p_bound`, 1 within 1 % of the bound.
        """
        before = self.value(0)
        rows = mask.any(1)
        if bool(rows.any()):
            d = log_ratio[rows].detach().to(self.rho.dtype)
            p = self.exponent()
            match self.objective.exponent.criterion:
                case "ess":
                    loss = ess_criterion(d, mask[rows], p, self.objective.exponent.target)
                case "variance":
                    loss = variance_criterion(d, mask[rows], advantages[rows], p)
                case _:
                    loss = surrogate(p)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        after = self.value(0)
        at_bound = abs(after) > 0.99 * self.objective.exponent.bound
        return {"ratio/p_step": after - before, "ratio/p_bound": int(at_bound)}

    def state_dict(self) -> dict[str, Any]:
        """The parameter rho and the state of its optimizer."""
        return {"rho": self.rho.detach().clone(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        with torch.no_grad():
            self.rho.copy_(state["rho"])
        self.optimizer.load_state_dict(dict(state["optimizer"]))


def ess_criterion(
    log_ratio: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    p: Float[Tensor, ""],
    target: float,
) -> Float[Tensor, ""]:
    """(mean_i log(ESS_i / L_i) - log target)^2, differentiable in p; one root for each sign of p.

    log(ESS / L) = 2 K(p) - K(2p) = 2p (log M_p - log M_2p).

    Args:
        log_ratio: token log ratios (nat); padding may hold anything.
        mask: True on response tokens, at least one in each row.
        p: exponent.
        target: wanted share ESS / L, in (0, 1).
    """
    gap = log_power_mean(log_ratio, mask, p) - log_power_mean(log_ratio, mask, 2 * p)
    return ((2 * p * gap).mean() - math.log(target)).square()


def variance_criterion(
    log_ratio: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    advantages: Float[Tensor, " N"],
    p: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """mean_i A_i^2 M_p^2 sum_t w_t^2, the policy gradient's second moment (orthogonal tokens).

    M_p^2 sum_t w_t^2 = M_p^2 L / ESS / L^2 with M_p and L / ESS as in `ess_criterion`; its least
    value lies at some p <= 0 (arXiv 2605.12058, theorem 7).

    Args:
        log_ratio: token log ratios (nat); padding may hold anything.
        mask: True on response tokens, at least one in each row.
        advantages: one per response.
        p: exponent.
    """
    log_m, log_2m = (log_power_mean(log_ratio, mask, q) for q in (p, 2 * p))
    spread = torch.exp(2 * log_m - 2 * p * (log_m - log_2m)) / mask.sum(1)
    return (advantages.square() * spread).mean()


def exponent_source(
    objective: ObjectiveConfig,
    device: torch.device,
    total_updates: int | None,
    per_rollout: int = 1,
) -> ExponentSource:
    """The source that `objective.exponent` names.

    Args:
        objective: the member.
        device: where a learnable exponent lives.
        total_updates: optimizer updates of the training, for a schedule.
        per_rollout: updates that a rollout serves, for a schedule by rollouts.

    Raises:
        ConfigError: a schedule without a length.
    """
    match objective.exponent.kind:
        case "linear":
            updates = objective.exponent.updates or total_updates
            return LinearExponent(objective, updates, per_rollout)
        case "learnable":
            return LearnableExponent(objective, device)
        case "reward":
            return RewardExponent(objective)
        case "controller":
            return ControllerExponent(objective)
        case _:
            return ExponentSource(objective)
