"""Stable import path of the GSPO baseline; the code is in `hmpo.baselines.gspo`."""

from hmpo.baselines.gspo import GSPOTrainer
from hmpo.config import GSPOConfig

__all__ = ["GSPOConfig", "GSPOTrainer"]
