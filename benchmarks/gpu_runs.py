"""Checks of whole updates and runs for `gpu_smoke.py`."""

import copy
import dataclasses
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_cases import (
    PROMPTS,
    Clock,
    Row,
    apart,
    model_of,
    relative,
    rollout_of,
    trained,
    trainer_of,
    weights_of,
)
from torch import nn

import hmpo
from hmpo.checkpoint import load_checkpoint
from hmpo.cli.demo import demo_config
from hmpo.config import CheckpointConfig
from hmpo.types import Batch


def updates(device: str) -> Iterator[Row]:
    """Six whole updates on the device and on the CPU, with the same noise."""
    for name in ("hmpo", "grpo", "gspo", "baseline", "muon"):
        began = weights_of(trainer_of("cpu", name))
        here, there = trainer_of("cpu", name), trainer_of(device, name)
        cpu, found = trained(here, 6), trained(there, 6)
        moves = [[b - a for a, b in zip(began, weights_of(t))] for t in (here, there)]
        yield {
            "case": name,
            "tokens": [here.totals["num_tokens"], there.totals["num_tokens"]],
            "rewards_apart": max(
                abs(a["reward/mean"] - b["reward/mean"]) for a, b in zip(cpu, found)
            ),
            "losses_apart": max(abs(a["loss"] - b["loss"]) for a, b in zip(cpu, found)),
            "grad_norm": [cpu[0]["grad_norm"], found[0]["grad_norm"]],
            "movement_error": relative(moves[1], moves[0]),
            "weights_apart": max(apart(a, b) for a, b in zip(*map(weights_of, (here, there)))),
            "skipped": sum(record["update_skipped"] for record in found),
            "qk/max_logit": [found[0].get("qk/max_logit"), found[-1].get("qk/max_logit")],
            "qk/clip_rate": [record.get("qk/clip_rate") for record in found],
            "limits": {"rewards_apart": 0.02, "movement_error": 0.2, "skipped": 0},
        }


def precision(device: str) -> Iterator[Row]:
    """Four updates under bfloat16: everything finite, and how far sampler and trainer differ."""
    for case in ({"autocast": "bfloat16"}, {"sampling_dtype": "bfloat16"}):
        trainer = trainer_of(device, "hmpo", **case)
        records = trained(trainer, 4)
        last = records[-1]
        yield {
            "case": str(case),
            "losses": [record["loss"] for record in records],
            "grad_norms": [record["grad_norm"] for record in records],
            "skipped": sum(record["update_skipped"] for record in records),
            "weights_not_finite": sum(int((~w.isfinite()).sum()) for w in weights_of(trainer)),
            "mismatch": {k: v for k, v in last.items() if k.startswith("mismatch/")},
            "fast": last["rollout/fast"],
            "limits": {"skipped": 0, "weights_not_finite": 0},
        }


def waits(device: str) -> Iterator[Row]:
    """Operations of a rollout and of an update for which the host waits for a GPU."""
    if device == "cpu":
        yield {"case": "hmpo", "skipped": "nothing to wait for on a CPU"}
        return
    trainer = trainer_of(device, "hmpo")
    trained(trainer, 4)
    inner = trainer.gradient
    seen: dict[str, Counter[str]] = {}

    def counted(name: str, run: Callable[[], Any]) -> Any:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
                places = [
                    f"{Path(w.filename).name}:{w.lineno}"
                    for w in told
                    if "synchron" in str(w.message) and "prototype" not in str(w.message)
                ]
                seen[name] = Counter(places)

    def gradient(batch: Batch) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        found = counted("gradient", lambda: inner(batch))
        torch.cuda.set_sync_debug_mode("warn")
        return found

    counted("rollout", lambda: trainer.begin_rollout(PROMPTS, {}))
    trainer.gradient = gradient
    counted("update without gradient", trainer.next_update)
    for name, places in seen.items():
        yield {"case": name, "waits": places.total(), "places": dict(places.most_common(12))}


def resume(device: str) -> Iterator[Row]:
    """Six updates straight, twice, and with a stop in the middle of a rollout: to the bit?"""
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                runs = []
                for stop in (None, None, 3):
                    trainer = trainer_of(device, "hmpo")
                    trained(trainer, stop or 6)
                    if stop is not None:
                        state = copy.deepcopy(trainer.state_dict())
                        trainer = trainer_of(device, "hmpo", model_of(initializer_range=0.02))
                        trainer.load_state_dict(state)
                        trained(trainer, 6 - stop)
                    runs.append(weights_of(trainer))
        finally:
            torch.use_deterministic_algorithms(False)
        again, resumed = (max(apart(a, b) for a, b in zip(runs[0], r)) for r in runs[1:])
        yield {
            "case": "deterministic algorithms" if deterministic else "as it is",
            "straight_again_apart": again,
            "resumed_apart": resumed,
            "warnings": sorted(
                {str(w.message)[:160] for w in told if "determin" in str(w.message)}
            ),
            "limits": {"straight_again_apart": 0.0, "resumed_apart": 0.0},
        }


def run(device: str) -> Iterator[Row]:
    """The demo's run for 20 updates, its checkpoint, and its resumption for two more."""
    updates = 20 if device == "cuda" else 4
    with tempfile.TemporaryDirectory() as folder:
        config = demo_config(updates=updates, out=Path(folder), name="run")
        config = dataclasses.replace(
            config,
            device=device,
            trainer=dataclasses.replace(config.trainer, lr_schedule="constant", warmup_updates=0),
            checkpoint=CheckpointConfig(every=10),
            eval=dataclasses.replace(
                config.eval, every=0, final_prompts=512 if updates == 20 else 64
            ),
        )
        clock, began = Clock(), time.perf_counter()
        result = hmpo.train(config, observer=clock)
        spent = time.perf_counter() - began
        more = hmpo.train(dataclasses.replace(config, updates=updates + 2), resume=True)
        saved = load_checkpoint(Path(folder) / "run" / "checkpoints")
    yield {
        "case": f"tiny-sort, {updates} updates of 384 responses",
        "status": [result.status, more.status],
        "updates": [result.step, more.step],
        "wall_s": round(spent, 2),
        "s_per_update": round((clock.ends[-1] - clock.ends[1]) / (len(clock.ends) - 2), 4),
        "success": [
            e.sampled.value if e is not None else None
            for e in (result.before, result.after, more.after)
        ],
        "checkpoint_step": saved.state["trainer"]["step"] if saved is not None else None,
        "not_completed": sum(r.status != "completed" for r in (result, more)),
        "limits": {"not_completed": 0},
    }


def distributed(device: str) -> Iterator[Row]:
    """One rank: a reduction, a gradient through DistributedDataParallel, QK-clip's maximum."""
    import torch.distributed as dist

    backend = "nccl" if device == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=0, world_size=1)
        try:
            x = torch.arange(1000.0, device=device)
            dist.all_reduce(x)
            model, found = model_of().to(device), []
            ids = rollout_of(device, rows=8).prompt_ids
            for policy in (model, nn.parallel.DistributedDataParallel(model)):
                model.zero_grad(set_to_none=True)
                policy(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            records = trained(trainer_of(device, "hmpo"), 2)
        finally:
            dist.destroy_process_group()
    yield {
        "case": backend,
        "reduction_error": apart(x, torch.arange(1000.0)),
        "gradient_error": relative(found[1], found[0]),
        "skipped": sum(record["update_skipped"] for record in records),
        "limits": {"reduction_error": 0.0, "gradient_error": 1e-4, "skipped": 0},
    }
