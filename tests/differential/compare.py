"""Measuring two implementations of one objective against each other; what tests and page share."""

import dataclasses
import importlib.metadata
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hmpo.config import ObjectiveConfig
from hmpo.objective.loss import power_mean_loss
from hmpo.types import Denominators
from tests.differential import cases
from tests.differential.cases import LN2, Case

LOSS_TOLERANCE = 1e-7
GRADIENT_TOLERANCE = 1e-8
CLIPPED = ("ragged", "ties", "on_policy", "large")
BOUNDED = (*CLIPPED, "overflow")

Value = tuple[float, Tensor]
Function = Callable[[Case, ObjectiveConfig], Value]
"""Loss and gradient in the log-probs, (N, T), on one case with the bounds of one config of ours."""


@dataclass(frozen=True)
class Comparison:
    """A member of ours and the peer's setting that must be the same function."""

    member: str
    ours: ObjectiveConfig
    setting: str
    theirs: Function
    cases: tuple[str, ...] = CLIPPED
    loss_tolerance: float = LOSS_TOLERANCE
    gradient_tolerance: float = GRADIENT_TOLERANCE
    denominators: Denominators | None = None
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.member}: {self.setting}"


@dataclass(frozen=True)
class Difference:
    """A peer's setting that is not its paper's function, and the setting of ours that equals it."""

    setting: str
    case: Case
    paper: Function
    theirs: Function
    ours: ObjectiveConfig
    why: str
    denominators: Denominators | None = None
    reproduced: bool = True


def autograd(case: Case, loss: Callable[[Tensor], Tensor]) -> Value:
    """Value of a torch function of the log-probs, and its gradient by autograd."""
    new = case.new.clone().requires_grad_()
    value = loss(new)
    value.backward()
    assert new.grad is not None
    return value.item(), new.grad


def ours(case: Case, config: ObjectiveConfig, denominators: Denominators | None = None) -> Value:
    """The member's own value."""
    return autograd(
        case,
        lambda new: power_mean_loss(
            new, case.old, case.mask, case.advantages, config, denominators=denominators
        ),
    )


def on_case(config: ObjectiveConfig, case: str) -> ObjectiveConfig:
    """`config`, with its finite bounds on the tied ratios 1/2 and 2 of the case `ties`."""
    if case != "ties" or config.clip_level == "none" or config.clip_space in ("tv", "kl"):
        return config
    if config.clip_space == "log":
        return dataclasses.replace(config, clip_low=LN2, clip_high=LN2)
    low = 0.5 if config.clip_low < 1 else 1.0
    return dataclasses.replace(config, clip_low=low, clip_high=1.0)


def measure(comparison: Comparison) -> dict[str, Any]:
    """Largest differences over the cases, in loss and in gradient."""
    losses, gradients = {}, {}
    for name in comparison.cases:
        case, config = cases.BY_NAME[name](), on_case(comparison.ours, name)
        loss, gradient = ours(case, config, comparison.denominators)
        other, slope = comparison.theirs(case, config)
        losses[name] = abs(loss - other)
        gradients[name] = (gradient - slope).abs().max().item()
    return {
        "member": comparison.member,
        "setting": comparison.setting,
        "cases": list(comparison.cases),
        "loss": max(losses.values()),
        "gradient": max(gradients.values()),
        "by_case": {name: [losses[name], gradients[name]] for name in comparison.cases},
        "loss_tolerance": comparison.loss_tolerance,
        "gradient_tolerance": comparison.gradient_tolerance,
        "note": comparison.note,
    }


def measure_difference(difference: Difference) -> dict[str, Any]:
    """The paper's value, the peer's, and how far ours is from the peer's."""
    case = difference.case
    paper, paper_slope = difference.paper(case, difference.ours)
    peer, peer_slope = difference.theirs(case, difference.ours)
    mine, slope = ours(case, difference.ours, difference.denominators)
    return {
        "setting": difference.setting,
        "paper": paper,
        "peer": peer,
        "gradient_ratio": (peer_slope.norm() / paper_slope.norm()).item(),
        "gradient_angle": torch.cosine_similarity(
            peer_slope.reshape(-1), paper_slope.reshape(-1), 0
        ).item(),
        "reproduced": difference.reproduced,
        "loss": abs(mine - peer),
        "gradient": (slope - peer_slope).abs().max().item(),
        "why": difference.why,
    }


PADDING = {
    "NaN log-prob in padding": ("new", math.nan, False),
    "NaN old log-prob in padding": ("old", math.nan, False),
    "-inf old log-prob in padding": ("old", -math.inf, False),
    "NaN log-prob at a token": ("new", math.nan, True),
    "old log-prob -inf at a token": ("old", -math.inf, True),
    "log-prob -inf at a token": ("new", -math.inf, True),
}
"""What is put into one place of `ragged`: which tensor, what, and whether the place counts."""


def robustness(function: Function, config: ObjectiveConfig) -> dict[str, str]:
    """What one bad number does: the value stays, turns non-finite, or moves without a sign."""
    clean = cases.ragged()
    loss, gradient = function(clean, config)
    found = {}
    for name, (field, bad, counted) in PADDING.items():
        tensor = getattr(clean, field).clone()
        tensor[(1, 3) if counted else (1, 8)] = bad
        value, slope = function(dataclasses.replace(clean, **{field: tensor}), config)
        broken = [
            word
            for word, finite in [
                ("loss", math.isfinite(value)),
                ("gradient", bool(slope.isfinite().all())),
            ]
            if not finite
        ]
        if broken:
            found[name] = " and ".join(broken)
        elif counted:
            found[name] = "finite"
        else:
            same = value == loss and torch.equal(slope, gradient)
            found[name] = "same" if same else "finite, other value"
    return found


def from_rows(loss: float, slopes: list[list[float]], case: Case) -> Value:
    """An oracle's rows as a gradient (N, T)."""
    gradient = torch.zeros_like(case.new)
    for row, kept, slope in zip(gradient, case.mask, slopes, strict=True):
        row[kept] = torch.tensor(slope, dtype=torch.float64)
    return loss, gradient


def oracle(function: Callable[..., tuple[float, list[list[float]]]], **options: Any) -> Function:
    """A function of tests/oracles on a case, with the bounds of the setting."""

    def run(case: Case, config: ObjectiveConfig) -> Value:
        low, high = config.log_bounds
        ratios, advantages = rows_of(case.new - case.old, case), case.advantages.tolist()
        return from_rows(*function(ratios, advantages, low=low, high=high, **options), case)

    return run


def rows_of(values: Tensor, case: Case) -> list[list[float]]:
    """The counted values of each response."""
    return [row[kept].tolist() for row, kept in zip(values, case.mask, strict=True)]


def version(package: str) -> str:
    """Installed version of a peer."""
    return importlib.metadata.version(package)
