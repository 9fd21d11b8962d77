"""In a worker that trains: gloo as its process group, and verl's FSDP engine for the processor.

verl imports this where it reads the model's settings, before it looks for a process group and an
engine. It would ask for `cpu:gloo,cpu:gloo`, which torch refuses, and it has engines for `cuda` and
`npu` only. Processes without a rank (the trainer, the agents) import this too, and nothing happens.
"""

import os

import torch.distributed

if "RANK" in os.environ and not torch.distributed.is_initialized():
    torch.distributed.init_process_group(
        "gloo",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        init_method=os.environ.get("DIST_INIT_METHOD"),
    )
    import tests.adapters.verl_ray.engine  # noqa: F401  (registers it)
