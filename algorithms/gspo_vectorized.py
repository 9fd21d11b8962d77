"""Stable import path of the GSPO baseline; the code is in `hmpo.trainer.gspo`."""

from hmpo.config import GSPOConfig
from hmpo.trainer.gspo import GSPOTrainer

__all__ = ["GSPOConfig", "GSPOTrainer"]
