"""Adaptive controllers: floats in, decisions out. Why it is hard: README.md beside this file.

`LearnableAGMOptimizer` is the learnable exponent of `hmpo.objective.exponent`; only asking for it
imports torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hmpo.agm.curriculum import AGMCurriculumController
from hmpo.agm.framework import AdaptiveAGMFramework
from hmpo.agm.hyperparameters import AGMHyperparameterAdapter
from hmpo.agm.phase import TrainingPhaseAdaptiveAGM, TrainingPhaseDetector
from hmpo.agm.population import (
    AgentPreference,
    AGMPopulationCoordinator,
    Assignment,
    PopulationAGMTrainer,
    Score,
)
from hmpo.agm.protocol import Controller, Decision
from hmpo.agm.regime import AdaptiveAGMController
from hmpo.agm.scales import AdaptationSignal, AGMTracker, MultiScaleAGMFramework
from hmpo.agm.stopping import AGMConvergenceDetector
from hmpo.agm.uncertainty import AGMUncertaintyEstimator
from hmpo.config.agm import (
    AdapterConfig,
    AGMConfig,
    CurriculumConfig,
    PhaseConfig,
    RegimeConfig,
    ScalesConfig,
    StopConfig,
    StrategyConfig,
    UncertaintyConfig,
)
from hmpo.config.population import PopulationConfig

if TYPE_CHECKING:
    from hmpo.objective.exponent import LearnableExponent as LearnableAGMOptimizer

__all__ = [
    "AGMConfig",
    "AGMConvergenceDetector",
    "AGMCurriculumController",
    "AGMHyperparameterAdapter",
    "AGMPopulationCoordinator",
    "AGMTracker",
    "AGMUncertaintyEstimator",
    "AdaptationSignal",
    "AdapterConfig",
    "AdaptiveAGMController",
    "AdaptiveAGMFramework",
    "AgentPreference",
    "Assignment",
    "Controller",
    "CurriculumConfig",
    "Decision",
    "LearnableAGMOptimizer",
    "MultiScaleAGMFramework",
    "PhaseConfig",
    "PopulationAGMTrainer",
    "PopulationConfig",
    "RegimeConfig",
    "ScalesConfig",
    "Score",
    "StopConfig",
    "StrategyConfig",
    "TrainingPhaseAdaptiveAGM",
    "TrainingPhaseDetector",
    "UncertaintyConfig",
]


def __getattr__(name: str) -> Any:
    if name == "LearnableAGMOptimizer":
        return importlib.import_module("hmpo.objective.exponent").LearnableExponent
    raise AttributeError(f"module 'hmpo.agm' has no attribute {name!r}")
