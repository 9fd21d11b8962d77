"""Settings of population-based training (`hmpo.agm.population`); standard library only."""

from dataclasses import dataclass

from hmpo.config.checks import EXPONENT, at_least, between, positive, within_reason
from hmpo.errors import require


@dataclass(frozen=True, kw_only=True)
class PopulationConfig:
    """`PopulationAGMTrainer`: population-based training over p and the learning rate."""

    members: int = 8
    """Policies that are trained side by side; 1 is plain training."""
    updates: int = 50
    """Updates of each member in one generation."""
    fraction: float = 0.25
    """Share of members that is replaced, and share that is copied."""
    perturb: float = 1.25
    """Factor, or its inverse, on a copied learning rate."""
    p_sigma: float = 0.25
    """Standard deviation of what is added to a copied p."""
    p_low: float = -1.0
    """Least p, and that of the first member at the start."""
    p_high: float = 1.0
    """Greatest p, and that of the last member at the start."""
    lr_low: float = 1e-6
    """Least learning rate."""
    lr_high: float = 1e-4
    """Greatest learning rate; the start is drawn between both, uniform in its log."""
    confidence: float = 0.95
    """Coverage of the one-sided bound that members are ranked by."""
    min_age: int = 1
    """Generations that a member trains before it may be replaced."""
    seed: int = 0
    """Seed of every draw."""

    def __post_init__(self) -> None:
        within_reason(self, p_low=EXPONENT, p_high=EXPONENT, p_sigma=EXPONENT)
        at_least(self, 1, "members", "updates", "min_age")
        require(0 < self.fraction <= 0.5, "fraction", self.fraction, "a number in (0, 0.5]")
        require(self.perturb > 1, "perturb", self.perturb, "a number > 1")
        positive(self, "p_sigma", "lr_low", "lr_high")
        require(self.p_low < self.p_high, "p_low", self.p_low, f"less than {self.p_high:g}")
        require(self.lr_low <= self.lr_high, "lr_low", self.lr_low, f"at most {self.lr_high:g}")
        between(self, 0.5, 1, "confidence")
