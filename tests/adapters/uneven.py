"""Real generations of uneven length over processes, member after member; see `test_uneven.py`.

python -m tests.adapters.uneven FOLDER ddp|fsdp2 MEMBER...      on each process of a launcher

Rank 0 writes FOLDER/MODE/MEMBER.pt: what was generated at each rollout in the order of the ranks,
the weights before and after, the last record, and the heads clipped. `replay` trains one process on
the same.
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor
from trl.trainer import grpo_trainer

from hmpo.errors import NonFiniteError
from hmpo.models.tiny import tiny_llama
from tests.adapters.gradients import VOCABULARY, make_trainer, tokenizer

CALIBRATED = {"member": "hmpo", "clip_share": 0.3, "clip_rollouts": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"objective": name} for name in ("grpo", "dapo", "dr_grpo", "gmpo", "hmpo")},
    **{
        name: {"objective": name, "clip_low": 0.05, "clip_high": 0.05} for name in ("gspo", "luspo")
    },
    **{
        name: {"objective": name, "max_steps": 4}
        for name in ("holder", "holder_clamped", "holder_token")
    },
    **{name: {"objective": name} for name in ("pmpo", "apmpo", "ahm", "sign_aware")},
    **{name: {"objective": name} for name in ("sapo", "cispo", "tis", "reinforce")},
    "learnable": {"objective": "hmpo", "exponent": {"kind": "learnable", "lr": 0.1}},
    "calibrated": {"objective": CALIBRATED, "max_steps": 4},
    "windows": {"objective": "dapo", "steps_per_generation": 4, "gradient_accumulation_steps": 2},
}
"""What TRL can carry over processes: all but bands that are measured from the whole minibatch."""
ROWS = 8
"""Responses of an update over all processes."""


def share(completions: list[str], **_: Any) -> list[float]:
    """Reward in [0, 1]: the share of digits of 5 and above."""
    return [sum(c in "56789" for c in text) / 10 for text in completions]


def build(folder: str, name: str, count: int, **more: Any) -> Any:
    """The trainer of a member on `count` processes; QK-clip acts at every update."""
    settings = {"max_steps": 2, "learning_rate": 0.05, "optim": "sgd", "max_qk_score": 0.02}
    settings |= {"lr_scheduler_type": "constant", "seed": 1, "logging_steps": 1.0}
    likely_end = [[[tokenizer().eos_token_id], 1.5]]  # so that the longest responses differ
    settings |= {"generation_kwargs": {"sequence_bias": likely_end}} | SETTINGS[name] | more
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


def in_order(windows: int, ranks: int) -> Any:
    """In place of TRL's shuffle of a generation: the rows of a window are those of both ranks."""

    def ordered(batch: dict[str, Any]) -> dict[str, Any]:
        count = len(batch["completion_ids"])
        rows = torch.arange(count).view(ranks, windows, -1).transpose(0, 1).flatten()
        return {k: v[rows] if torch.is_tensor(v) and v.ndim else v for k, v in batch.items()}

    return ordered


def windows_of(trainer: Any) -> int:
    """Updates that one pass over a generation makes."""
    return trainer.args.steps_per_generation // trainer.args.gradient_accumulation_steps


def replay(folder: str, name: str, generations: list[list[list[int]]]) -> Any:
    """One process trained on recorded generations; the trainer."""
    trainer, rest = build(folder, name, 1), list(generations)
    trainer._generate_single_turn = lambda *_, **__: (rest.pop(0), None)
    with patch.object(grpo_trainer, "shuffle_sequence_dict", in_order(windows_of(trainer), 2)):
        trainer.train()
    assert not rest
    return trainer


SHARD = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


def train(folder: Path, mode: str, name: str) -> None:
    """One member over all processes."""
    generations: list[list[list[int]]] = []
    more = {"fsdp": True, "fsdp_config": dict(SHARD)} if mode == "fsdp2" else {}
    with tempfile.TemporaryDirectory() as out:
        trainer = build(out, name, int(os.environ["WORLD_SIZE"]), ddp_backend="gloo", **more)
        before = whole_weights(trainer)
        record(trainer, generations)
        ordered = in_order(windows_of(trainer), 1)
        with patch.object(grpo_trainer, "shuffle_sequence_dict", ordered):
            trainer.train()
        found = {"generations": generations, "before": before}
        found |= {"weights": whole_weights(trainer), "record": trainer.last_record}
        history = trainer.state.log_history
        found["clipped"] = sum(line.get("qk/clipped_heads", 0) for line in history)
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{name}.pt")
        dist.barrier()


RESUMED = ("hmpo", "learnable", "holder")
"""Members whose training is also saved halfway and gone on with."""
SAVED = {"save_strategy": "steps", "save_steps": 2.0, "max_steps": 4}


def resume(folder: Path, mode: str, name: str) -> None:
    """A training of four updates, and one that goes on from what it saved after two."""
    more = {"fsdp": True, "fsdp_config": dict(SHARD)} if mode == "fsdp2" else {}
    found: dict[str, Any] = {}
    for part, start in (("straight", None), ("resumed", "straight/checkpoint-2")):
        AcceleratorState._reset_state()
        generations: list[list[list[int]]] = []
        out = folder / f"{name}-out"  # one for all ranks, so that each finds what all have saved
        trainer = build(
            str(out / part),
            name,
            int(os.environ["WORLD_SIZE"]),
            ddp_backend="gloo",
            **more,
            **SAVED,
        )
        record(trainer, generations)
        trainer.train(resume_from_checkpoint=start and str(out / start))
        found[part] = {
            "generations": generations,
            "weights": whole_weights(trainer),
            "record": trainer.last_record,
        }
        dist.barrier()
    if dist.get_rank() == 0:
        torch.save(found, folder / f"{name}-resumed.pt")


def fail(folder: Path) -> None:
    """A log-prob that only the last rank finds to be NaN; each rank writes what it raised."""
    with tempfile.TemporaryDirectory() as out:
        trainer = build(out, "hmpo", int(os.environ["WORLD_SIZE"]), ddp_backend="gloo")
        take, rank = trainer._compute_loss, dist.get_rank()

        def broken(model: Any, inputs: dict[str, Any]) -> Any:
            if rank == dist.get_world_size() - 1:
                inputs["old_per_token_logps"][2, 0] = torch.nan
            return take(model, inputs)

        trainer._compute_loss = broken
        try:
            trainer.train()
        except NonFiniteError as error:
            (folder / f"raised-{rank}.txt").write_text(str(error))
        dist.barrier()


def main(folder: str, mode: str, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    place = Path(folder) / mode
    place.mkdir(exist_ok=True)
    for name in names:
        AcceleratorState._reset_state()
        train(place, mode, name)
    for name in RESUMED:
        resume(place, mode, name)
    if mode == "ddp":
        AcceleratorState._reset_state()
        fail(place)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
