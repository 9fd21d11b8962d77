"""Every setting of hmpo: frozen, keyword-only dataclasses, documented under each field.

Standard library only, so that reading a configuration costs no torch. A value out of range
gives one line that names the field. A default lives here and nowhere else; derived values are
properties. `hmpo.config.reading` reads settings from TOML and JSON, `hmpo.config.identity` says
when two runs are the same.
"""

from hmpo.config.advantages import AdvantageConfig
from hmpo.config.batch import BatchConfig
from hmpo.config.control import ControlConfig
from hmpo.config.distributed import DistributedConfig
from hmpo.config.objective import ExponentConfig, MismatchConfig, ObjectiveConfig
from hmpo.config.run import (
    CheckpointConfig,
    EvalConfig,
    OptimizerConfig,
    PolicyConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TaskConfig,
    TrackerConfig,
    check_run_name,
    to_dict,
)
from hmpo.config.trainer import GSPOConfig, HMPOConfig, PowerMeanConfig, TrainerConfig
from hmpo.config.weight import WeightConfig

__all__ = [
    "AdvantageConfig",
    "BatchConfig",
    "CheckpointConfig",
    "ControlConfig",
    "DistributedConfig",
    "EvalConfig",
    "ExponentConfig",
    "GSPOConfig",
    "HMPOConfig",
    "MismatchConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PolicyConfig",
    "PowerMeanConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "TaskConfig",
    "TrackerConfig",
    "TrainerConfig",
    "WeightConfig",
    "check_run_name",
    "to_dict",
]
