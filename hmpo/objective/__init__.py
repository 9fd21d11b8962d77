"""The objective: advantages, means, bounds, exponent -> loss; names are imported on first use."""

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "power_mean_objective": "loss",
    "power_mean_loss": "loss",
    "objective_metrics": "metrics",
    "count_denominators": "terms",
    "minibatch_band": "terms",
    "exponent_in_force": "exponent",
    "EXP_LIMIT": "bounds",
    "group_advantages": "advantages",
    "estimate_advantages": "estimators",
    "log_power_mean": "means",
    "power_mean_weights": "means",
    "ahm_mean": "means",
    "effective_sample_size": "means",
    "solve_exponent": "solve",
}

__all__ = list(_HOME)

if TYPE_CHECKING:
    from hmpo.objective.advantages import group_advantages
    from hmpo.objective.bounds import EXP_LIMIT
    from hmpo.objective.estimators import estimate_advantages
    from hmpo.objective.exponent import exponent_in_force
    from hmpo.objective.loss import power_mean_loss, power_mean_objective
    from hmpo.objective.means import (
        ahm_mean,
        effective_sample_size,
        log_power_mean,
        power_mean_weights,
    )
    from hmpo.objective.metrics import objective_metrics
    from hmpo.objective.solve import solve_exponent
    from hmpo.objective.terms import count_denominators, minibatch_band


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"hmpo.objective.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hmpo.objective' has no attribute {name!r}")
