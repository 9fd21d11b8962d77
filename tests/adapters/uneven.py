"""Real generations of uneven length over processes, member after member; see `test_uneven.py`.

python -m tests.adapters.uneven FOLDER ddp|fsdp2 MEMBER...      on each process of a launcher

Rank 0 writes FOLDER/MODE/MEMBER.pt: what was generated at each rollout in the order of the ranks,
the weights before and after, and the last record. `replay` trains one process on the same.
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor

from hmpo.models.tiny import tiny_llama
from tests.adapters.gradients import VOCABULARY, make_trainer

CALIBRATED = {"member": "hmpo", "clip_share": 0.3, "clip_rollouts": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"objective": name} for name in ("grpo", "dapo", "dr_grpo", "gmpo", "hmpo")},
    **{name: {"objective": name, "clip_low": 0.05, "clip_high": 0.05} for name in ("gspo", "luspo")},
    **{name: {"objective": name} for name in ("holder", "pmpo", "apmpo", "ahm")},
    **{name: {"objective": name} for name in ("sapo", "cispo", "tis")},
    "learnable": {"objective": "hmpo", "exponent": {"kind": "learnable", "lr": 0.1}},
    "calibrated": {"objective": CALIBRATED, "max_steps": 4},
    "windows": {"objective": "dapo", "steps_per_generation": 4, "gradient_accumulation_steps": 2},
}
"""What TRL can carry over processes; two updates of each of two generations."""
ROWS = 8
"""Responses of an update over all processes."""


def share(completions: list[str], **_: Any) -> list[float]:
    """Reward in [0, 1]: the share of digits of 5 and above."""
    return [sum(c in "56789" for c in text) / 10 for text in completions]


def build(folder: str, name: str, count: int, **more: Any) -> Any:
    """The trainer of a member on `count` processes; QK-clip acts at every update."""
    settings = {"max_steps": 3, "learning_rate": 0.05, "optim": "sgd", "max_qk_score": 0.02}
    settings |= {"lr_scheduler_type": "constant", "max_grad_norm": 1.0, "seed": 1}
    settings |= SETTINGS[name] | more
    parts = settings.get("gradient_accumulation_steps", 1)
    model = tiny_llama(VOCABULARY, seed=0, hidden_size=16, layers=2, heads=2, intermediate_size=32)
    return make_trainer(
        folder,
        model=model,
        reward=share,
        per_device_train_batch_size=ROWS // count // parts,
        **settings,
    )


def whole_weights(trainer: Any) -> torch.Tensor:
    """All weights as one vector, sharded or not."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    found = [p.detach() for p in model.parameters()]
    found = [p.full_tensor() if isinstance(p, DTensor) else p for p in found]
    return torch.cat([p.flatten() for p in found]).double()


def record(trainer: Any, generations: list[list[list[int]]]) -> None:
    """Keep what is generated, over all ranks in their order."""
    sample, ranks = trainer._generate_single_turn, trainer.accelerator.num_processes

    def sampling(*args: Any, **options: Any) -> Any:
        ids, logprobs = sample(*args, **options)
        parts: list[Any] = [None] * ranks
        dist.all_gather_object(parts, ids)
        generations.append([row for part in parts for row in part])
        return ids, logprobs

    trainer._generate_single_turn = sampling


def replay(folder: str, name: str, generations: list[list[list[int]]]) -> Any:
    """One process trained on recorded generations; the trainer."""
    trainer, rest = build(folder, name, 1), list(generations)
    trainer._generate_single_turn = lambda *_, **__: (rest.pop(0), None)
    trainer.train()
    assert not rest
    return trainer


def main(folder: str, mode: str, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sharded = {
        "fsdp": True,
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    }
    for name in names:
        generations: list[list[list[int]]] = []
        AcceleratorState._reset_state()
        with tempfile.TemporaryDirectory() as out:
            more = sharded if mode == "fsdp2" else {}
            trainer = build(out, name, int(os.environ["WORLD_SIZE"]), ddp_backend="gloo", **more)
            before = whole_weights(trainer)
            record(trainer, generations)
            trainer.train()
            found = {"generations": generations, "before": before}
            found |= {"weights": whole_weights(trainer), "record": trainer.last_record}
            if dist.get_rank() == 0:
                path = Path(folder) / mode / f"{name}.pt"
                path.parent.mkdir(exist_ok=True)
                torch.save(found, path)
            dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
