"""[GPU] Is everything right on the device? Each check writes numbers beside what they may reach.

python benchmarks/gpu_smoke.py [--device cuda|cpu] [--only NAME ...]

The device is held against the CPU, float32 and float64, on small random models: log-probs, packed
rows, gradients, rollouts, whole updates, precision, QK-clip, resume, a run of `hmpo.train`, one
rank of `torch.distributed`. Writes results/gpu_smoke_DEVICE.json after every check; a check that
raises leaves its message and the next one runs. On a CPU both sides are the CPU.
"""

import argparse
import copy
import dataclasses
import importlib.metadata
import os
import shutil
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what a deterministic run needs

import torch
from common import save
from gpu_cases import (
    ENDS,
    KINDS,
    SIZES,
    VOCABULARY,
    Heard,
    Row,
    apart,
    batch_of,
    compared,
    logprobs_of,
    model_of,
    relative,
    rollout_of,
)
from gpu_runs import distributed, precision, resume, run, updates, waits
from torch import Tensor
from tracker_cost import naive_max

from hmpo import members
from hmpo.attention.logits import AttentionCall
from hmpo.attention.tap import listen
from hmpo.attention.tracker import LogitTracker
from hmpo.config.trainer import TrainerConfig
from hmpo.logprobs import fold as fold_module
from hmpo.logprobs import states
from hmpo.logprobs.fold import triton_kernels
from hmpo.run.environment import describe_environment, installed_versions
from hmpo.sampling import engines
from hmpo.sampling.responses import sample_responses
from hmpo.trainer.gradient import accumulate
from hmpo.types import Batch, Rollout

# ------------------------------------------------------------------------------- one pass


def kernels(device: str) -> Iterator[Row]:
    """Fold and gradient of a large block of logits against the same in float64."""
    rows, vocabulary = (256, 151_936) if device == "cuda" else (8, 1000)
    place = torch.device(device)
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        torch.manual_seed(0)
        logits = (3 * torch.randn(rows, vocabulary, device=place)).to(dtype)
        targets = torch.randint(vocabulary, (rows,), device=place)
        g, h = torch.randn(2, rows, device=place)
        with mock.patch.object(fold_module, "triton_kernels", lambda _: None):
            exact = logits.double()
            truth = fold_module.fold(exact, targets, 0.8)
            slope = exact.clone()
            fold_module.gradient_in_place(slope, targets, truth[1], truth[2], g, h, 0.8)
        found = fold_module.fold(logits, targets, 0.8)
        values = logits.clone()
        fold_module.gradient_in_place(values, targets, found[1], found[2], g, h, 0.8)
        yield {
            "case": str(dtype),
            "size": [rows, vocabulary],
            "triton": triton_kernels(place) is not None,
            "triton_wanted": device == "cuda",
            "logprob_error": apart(found[0], truth[0]),
            "entropy_error": apart(found[2], truth[2]),
            "gradient_error": relative([values], [slope]),
            "limits": {"logprob_error": 1e-4, "entropy_error": 1e-4, "gradient_error": limit},
        }


def logprobs(device: str) -> Iterator[Row]:
    """Log-probs on the device against those of the CPU, and both against float64."""
    here, there = rollout_of("cpu"), rollout_of(device)
    for kind in KINDS:
        model = model_of(kind)
        cpu, exact = logprobs_of(model, here), None
        if KINDS[kind][1].get("attn_implementation") != "eager":  # float32 inside, and NaN on pads
            exact = logprobs_of(copy.deepcopy(model).double(), here)
        moved = model.to(device)
        found = logprobs_of(moved, there)
        with mock.patch.object(states, "can_pack", lambda *_: False):
            padded = logprobs_of(moved, there)
        yield {
            "case": kind,
            "packed": found.packed,
            "packed_on_cpu": cpu.packed,
            "from_cpu": apart(found.logprobs, cpu.logprobs),
            "entropy_from_cpu": apart(found.entropy, cpu.entropy),
            "from_float64": exact and apart(found.logprobs, exact.logprobs),
            "cpu_from_float64": exact and apart(cpu.logprobs, exact.logprobs),
            "packed_from_padded": apart(found.logprobs, padded.logprobs),
            "limits": {"from_cpu": 1e-4, "packed_from_padded": 1e-4}
            | ({} if exact is None else {"from_float64": 1e-4}),
        }


def gradients(device: str) -> Iterator[Row]:
    """The gradient of one minibatch against float64 on the CPU."""

    def taken(model: Any, batch: Batch, name: str, **options: Any) -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        objective = members.BY_NAME[name]()
        accumulate(model, batch, TrainerConfig(**options), objective, None)
        return [p.grad for p in model.parameters() if p.grad is not None]

    model, moved = model_of("qwen2"), model_of("qwen2").to(device)
    exact, batch = copy.deepcopy(model).double(), batch_of(model, device, torch.float32)
    wide, own = (batch_of(model, "cpu", dtype) for dtype in (torch.float64, torch.float32))
    for name in ("hmpo", "grpo", "gspo", "gmpo", "dapo", "cispo"):
        truth = taken(exact, wide, name)
        yield {
            "case": name,
            "error": relative(taken(moved, batch, name), truth),
            "micro_batches_error": relative(taken(moved, batch, name, micro_batch_size=5), truth),
            "autocast_error": relative(taken(moved, batch, name, autocast="bfloat16"), truth),
            "cpu_error": relative(taken(model, own, name), truth),
            "limits": {"error": 1e-4, "micro_batches_error": 1e-4, "autocast_error": 0.3},
        }


# ------------------------------------------------------------------------------- rollouts


def sampling(device: str) -> Iterator[Row]:
    """The fast decoder, as CUDA graphs on a GPU, against the modules and against the CPU."""
    for kind, length, more in (
        ("llama", 300, {}),
        ("qwen2", 40, {"temperature": 0.7}),
        ("llama", 24, {"top_k": 20, "top_p": 0.9}),
    ):
        made: list[Any] = []
        model, chosen = model_of(kind).eval(), engines.decoder_kind(torch.device(device))

        def kept(*parts: Any, chosen: Any = chosen, made: list[Any] = made) -> Any:
            made.append(chosen(*parts))
            return made[-1]

        def run(place: str, decoder: str, model: Any = model, length=length, more=more) -> Rollout:
            ids = torch.randint(9, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(4))
            return sample_responses(
                model.to(place),
                ids.to(place),
                group_size=8,
                max_length=length,
                eos_token=ENDS if length < 100 else ENDS[:2],
                generator=torch.Generator().manual_seed(3),
                decoder=decoder,
                **more,
            )

        with warnings.catch_warnings(), Heard() as heard:
            warnings.filterwarnings("ignore", message="top_k=")
            with mock.patch.object(engines, "decoder_kind", lambda _, kept=kept: kept):
                fast = run(device, "auto")
            modules, cpu = run(device, "module"), run("cpu", "auto")
        graphs, captures = (getattr(made[0], name, None) for name in ("graphs", "captures"))
        yield {
            "case": f"{kind}, {length} tokens {more}",
            "decoder": type(made[0]).__name__,
            "fast": fast.fast,
            "graphs": graphs,
            "captures": captures,
            "graphs_wanted": device == "cuda",
            "warnings": heard.lines,
            "tokens": int(fast.response_mask.sum()),
            **{f"modules_{name}": value for name, value in compared(fast, modules).items()},
            **{f"cpu_{name}": value for name, value in compared(fast, cpu).items()},
            "limits": {"modules_unequal_rows": 0.2, "cpu_unequal_rows": 0.2}
            | {"modules_logprob": 1e-3, "cpu_logprob": 1e-3},
        }


def logits(device: str) -> Iterator[Row]:
    """Largest attention logits as QK-clip reads them, against all scores in float64."""
    for dtype in (torch.float32, torch.bfloat16):
        model = model_of().to(device, dtype)
        ids = torch.randint(3, VOCABULARY, (4, 96), generator=torch.Generator().manual_seed(5))
        with LogitTracker(model, 1e-6, "auto") as tracker:
            calls: list[list[AttentionCall]] = [[] for _ in tracker.sites]
            ends = [listen(s.module(), c.append) for s, c in zip(tracker.sites, calls)]
            model(input_ids=ids.to(device), use_cache=False)
            readings = tracker.consume()
        for end in ends:
            end()
        errors, exact = [], 0
        for site, (call,) in zip(tracker.sites, calls):
            wide = dataclasses.replace(call, query=call.query.double(), key=call.key.double())
            truth, reading = naive_max(wide).cpu(), readings[site.name]
            errors.append(float(((reading.value.cpu() - truth) / truth.abs()).abs().max()))
            exact += int(reading.exact.sum())
        yield {
            "case": str(dtype),
            "layers": len(errors),
            "exact_heads": exact,
            "heads": len(errors) * SIZES["num_attention_heads"],
            "lse": [calls_of[0].lse is not None for calls_of in calls],
            "tiers": dict(tracker.tiers),
            "largest_error": max(errors),
            "limits": {"largest_error": 1e-5},
        }


CHECKS = (
    *(kernels, logprobs, gradients, sampling, updates, precision),
    *(logits, waits, resume, run, distributed),
)


def verdict(row: Row) -> list[str]:
    """What lies beyond its limit, NaN included, and what was wanted and is not there."""
    limits = row.get("limits", {}).items()
    beyond = [name for name, limit in limits if not row[name] <= limit]
    wanted = [name for name in row if row.get(f"{name}_wanted") and not row[name]]
    return beyond + wanted + (["error"] if "error_text" in row else [])


def rows_of(check: Callable[[str], Iterator[Row]], device: str) -> Iterator[Row]:
    """Every row of a check with its time and verdict; what it raises is a row too."""
    began = time.perf_counter()

    def told(row: Row) -> Row:
        nonlocal began
        now = time.perf_counter()
        full = {"check": check.__name__, **row, "seconds": round(now - began, 2)}
        began = now
        return full | {"beyond": verdict(row)}

    try:
        for row in check(device):
            yield told(row)
    except Exception as error:  # the next check may well run
        frames = traceback.extract_tb(error.__traceback__)[-6:]
        where = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames]
        text = f"{type(error).__name__}: {error}"[:600]
        yield told({"case": "raised", "error_text": text, "where": where})


def environment() -> None:
    """One line of versions and hardware, and what the kernels need."""
    facts = describe_environment() | {
        "cuda": torch.version.cuda,
        "compiler": shutil.which("cc") or shutil.which("gcc"),
        "packages": installed_versions() | versions("triton", "trl", "datasets", "liger-kernel"),
    }
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        facts |= {"memory": card.total_memory, "capability": [card.major, card.minor]}
        facts |= {"matmul_precision": torch.get_float32_matmul_precision()}
    print(facts)


def versions(*names: str) -> dict[str, str | None]:
    """Of packages; None where one is not installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def main() -> int:
    """All checks, or those that were named; 1 where something lies beyond its limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=found)
    parser.add_argument("--only", nargs="+", choices=[check.__name__ for check in CHECKS])
    parser.add_argument("--environment", action="store_true", help="say where this is, and end")
    chosen = parser.parse_args()
    if chosen.environment:
        environment()
        return 0
    warnings.filterwarnings("ignore", message="one update per rollout")
    command = f"python benchmarks/gpu_smoke.py --device {chosen.device}"
    rows: list[Row] = []
    for check in CHECKS:
        if chosen.only and check.__name__ not in chosen.only:
            continue
        for row in rows_of(check, chosen.device):
            rows.append(row)
            print(row, flush=True)
        save(f"gpu_smoke_{chosen.device}", command, rows, show=False)
    beyond = [f"{row['check']} ({row['case']}): {row['beyond']}" for row in rows if row["beyond"]]
    print(f"{len(rows)} rows, {len(beyond)} with something beyond its limit", *beyond, sep="\n")
    return int(bool(beyond))


if __name__ == "__main__":
    raise SystemExit(main())
