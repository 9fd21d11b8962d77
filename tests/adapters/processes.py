"""Three updates on one fixed batch, split over the processes of `torch.distributed.run`.

python -m tests.adapters.processes FOLDER MEMBER      prints what came of it, as JSON
"""

import json
import os
import sys
import warnings

import torch

from tests.adapters.gradients import MEMBERS, ROWS, make_batch, make_trainer, with_old


def main(folder: str, member: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    settings = {"exponent": {"kind": "learnable", "lr": 0.1}} if member == "hmpo" else {}
    trainer = make_trainer(
        folder,
        **MEMBERS[member],
        **settings,
        per_device_train_batch_size=ROWS // count,
        qk_clip=False,
        max_steps=3,
        learning_rate=1e-2,
        optim="sgd",
    )
    batch = with_old(trainer.model, make_batch())
    rows = torch.arange(ROWS).chunk(count)[trainer.accelerator.process_index]
    part = {name: v if v.ndim == 0 else v[rows] for name, v in batch.items()}
    trainer._prepare_inputs = lambda _: part
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    found = {"weights": [float(weights.norm()), float(weights @ torch.sin(weights * 1e3))]}
    found["record"] = trainer.last_record
    line = json.dumps(found) + "\n"
    sys.stdout.write(line)
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
