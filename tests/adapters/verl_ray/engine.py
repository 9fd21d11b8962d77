"""verl's FSDP engine, unchanged but for a record of each update that it was given."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from tensordict import TensorDict
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from tests.adapters.verl_ray.record import FIELDS, RECORD, update_file


@EngineRegistry.register(model_type="language_model", backend=["fsdp2"], device="cpu")
class RecordingEngine(FSDPEngineWithLMHead):
    """Writes this rank's share of each minibatch, then trains on it as verl does."""

    updates = 0

    def train_batch(self, data: TensorDict, loss_function: Any) -> Any:
        rows = {name: [row.clone() for row in data[name].unbind()] for name in FIELDS}
        outputs = super().train_batch(data, loss_function)
        self.updates += 1
        told = {"loss": sum(outputs["loss"]), "grad_norm": outputs["metrics"]["grad_norm"]}
        path = update_file(Path(os.environ[RECORD]), self.updates, torch.distributed.get_rank())
        torch.save({"rows": rows, **told}, path)
        return outputs
