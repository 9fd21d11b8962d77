"""Stable import path of the power-mean trainers; the code is in `hmpo`."""

from hmpo.config import HMPOConfig, PowerMeanConfig
from hmpo.trainer.power_mean import HMPOTrainer, PowerMeanTrainer

__all__ = ["HMPOConfig", "HMPOTrainer", "PowerMeanConfig", "PowerMeanTrainer"]
