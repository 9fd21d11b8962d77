"""[GPU] The hot paths on a GPU beside their peers, with the roofline of the card.

python benchmarks/bench_gpu.py --part head        the vocabulary projection, bfloat16
python benchmarks/bench_gpu.py --part generate    rollouts against `generate`
python benchmarks/bench_gpu.py --part update      whole updates against TRL's trainer
python benchmarks/bench_gpu.py --part smollm2     training SmolLM2-135M: speed, and its parts
python benchmarks/bench_gpu.py --device cpu --tiny      every part on small sizes, in a minute

Each part takes a minute or two and writes results/gpu_PART_DEVICE.json after every row, so that
what was measured is there wherever it is cut off; `scripts/gpu_check.sh` runs them all.
Times are medians of CUDA events after warm-up, sides taking turns; memory is the allocator's
peak above what was there before. Without CUDA the same code runs on the CPU (CPU seconds, no
memory): a check of the code, which says nothing of a GPU; what `--tiny` writes is named
gpu_cpu_path.json (gpu_PART_cpu_path.json of one part) and marked so in every row.

Where a peer cannot be imported its row says so: `head` and `update` want trl (and the packages
that it imports, datasets among them), `head` also liger_kernel. `smollm2` takes the model where it
is at hand (`hmpo fetch-model smollm2`, or --model FOLDER), else random weights of its shape, which
its rows say.
"""

import argparse
import dataclasses
import importlib
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import one_thread, roofline, save
from transformers import LlamaConfig, LlamaForCausalLM

from hmpo.config import HMPOConfig, PolicyConfig, TaskConfig
from hmpo.errors import ModelError
from hmpo.logprobs import fold as fold_module
from hmpo.logprobs.fold import triton_kernels
from hmpo.logprobs.head import block_rows
from hmpo.models import load_policy, stop_token_ids
from hmpo.rewards import Rewards
from hmpo.stopwatch import Stopwatch
from hmpo.tasks import make_task
from hmpo.trainer.power_mean import HMPOTrainer

PARTS = ("head", "generate", "update", "smollm2")
HEAD = {False: (8192, 4096, 151_936), True: (128, 32, 1000)}  # rows, width, vocabulary
LAUNCHES = [(block, warps) for block in (1024, 2048, 4096, 8192, 16384) for warps in (4, 8, 16)]
SMOLLM2 = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100_000.0,
    "tie_word_embeddings": True,
}
LARGE = {  # the shape of Qwen2-0.5B
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
}


class Meter:
    """Seconds and bytes on a device."""

    def __init__(self, device: str) -> None:
        self.device, self.cuda = torch.device(device), device != "cpu"

    def seconds(self, run: Callable[[], Any]) -> float:
        """Of one run: between CUDA events, or of CPU time."""
        if not self.cuda:
            began = time.process_time()
            run()
            return time.process_time() - began
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        run()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3

    def medians(
        self, sides: dict[str, Callable[[], Any]], repeats: int, *, warm: bool = False
    ) -> dict[str, float]:
        """Median seconds of each side, in turn, after one run each unless they are `warm`."""
        spent: dict[str, list[float]] = {name: [] for name in sides}
        for repeat in range(warm, repeats + 1):
            for name, run in sides.items():
                taken = self.seconds(run)
                spent[name] += [taken] if repeat else []
        return {name: statistics.median(values) for name, values in spent.items()}

    def peak_mib(self, run: Callable[[], Any]) -> float | None:
        """Peak of the allocator above what was there; None on a CPU."""
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - base) / 2**20, 1)

    def ceilings(self) -> dict[str, float]:
        """10^9 operations a second of a large bfloat16 product, 10^9 bytes a second of a copy."""
        size, length = (8192, 1 << 30) if self.cuda else (256, 1 << 22)
        x, w = (torch.randn(size, size, device=self.device).bfloat16() for _ in range(2))
        source = torch.empty(length, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        best = self.medians({"mm": lambda: x @ w, "copy": lambda: target.copy_(source)}, 9)
        return {
            "gflop_s": round(2 * size**3 / best["mm"] / 1e9, 1),
            "gbyte_s": round(2 * length / best["copy"] / 1e9, 1),
        }


def missing(name: str) -> str | None:
    """Why a module cannot be imported, or None where it can."""
    try:
        importlib.import_module(name)
    except Exception as error:  # a peer's own import may raise anything
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


# ---------------------------------------------------------------------------------------- head


def head(meter: Meter, tiny: bool) -> Iterator[dict[str, Any]]:
    """Every scheme and peer on one projection; then the two elementwise passes alone."""
    from bench_logprobs import PRODUCTS, RESPONSE, STORE_ALL, Work

    rows, width, vocab = HEAD[tiny]
    work, top = Work(rows, width, vocab), meter.ceilings()
    for name, value in vars(work).items():
        kind = torch.bfloat16 if name in ("hidden", "weight") else None
        setattr(work, name, value.to(meter.device, kind))
    sides: dict[str, Callable[[], Any]] = {
        "recompute": lambda: work.ours(store=0),
        "store": lambda: work.ours(store=STORE_ALL),
        "one pass": work.one_pass,
        "frozen": lambda: work.ours(frozen=True),
        "recompute, entropy's gradient": lambda: work.ours(store=0, slope=True),
    }
    peers: dict[str, tuple[str, Callable[[], Any]]] = {
        "TRL": ("trl.kernels", work.trl),
        "TRL, entropy's gradient": ("trl.kernels", lambda: work.trl(slope=True)),
        "Liger": ("liger_kernel.chunked_loss.fused_linear_ppo", work.liger),
        "torch": ("torch", work.torch_fused),
        "naive": ("torch", work.naive),
    }
    for name, (module, run) in peers.items():
        reason = missing(module) or fault(run)
        if reason is None:
            sides[name] = run
        else:
            yield {"case": "head", "side": name, "skipped": reason}
    seconds = meter.medians(sides, 5)
    unit, traffic = 2.0 * rows * width * vocab, 2.0 * 2 * (rows + vocab) * width
    for name, spent in seconds.items():
        row = {
            "case": "head",
            "side": name,
            "ours": name not in peers,
            "size": [rows, width, vocab],
            "response": RESPONSE,
            "products": PRODUCTS.get(name, 4),
            "ms": round(1e3 * spent, 3),
            "peak_mib": meter.peak_mib(sides[name]),
            **roofline((2 if name == "frozen" else 3) * unit, traffic, spent, top),
        }
        if "TRL" in seconds:
            row["of_trl"] = round(spent / seconds["TRL"], 3)
        yield row
    yield from kernels(meter, work.weight, top)


def fault(run: Callable[[], Any]) -> str | None:
    """Why a side cannot run at this size (memory, a missing function), or None; it is run once."""
    try:
        run()
    except (RuntimeError, AttributeError, TypeError, ImportError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def kernels(meter: Meter, weight: torch.Tensor, top: dict[str, float]) -> Iterator[dict[str, Any]]:
    """The passes over one block of logits: by Triton for each launch, and by torch."""
    rows, vocab = block_rows(weight, 512), len(weight)
    logits = torch.randn(rows, vocab, device=meter.device).bfloat16()
    targets = torch.randint(vocab, (rows,), device=meter.device)
    ones = torch.ones(rows, device=meter.device)
    with mock.patch.object(fold_module, "triton_kernels", lambda _: None):
        _, lse, entropy = fold_module.fold(logits, targets)
        known = targets, lse, entropy, ones, ones
        plain = {
            "fold": lambda: fold_module.fold(logits, targets),
            "gradient": lambda: fold_module.gradient_in_place(logits.clone(), *known),
        }
        times = {("torch", 0, 0): meter.medians(plain, 5)}
    found = triton_kernels(meter.device)
    for block, warps in LAUNCHES if found is not None else []:
        how = {"block": block, "warps": warps}
        sides = {
            "fold": lambda how=how: found.fold(logits, targets, **how),
            "gradient": lambda how=how: found.gradient_in_place(logits.clone(), *known, **how),
        }
        times["triton", block, warps] = meter.medians(sides, 5)
    copied = meter.medians({"clone": logits.clone}, 5)["clone"]
    for (by, block, warps), spent in times.items():
        size = 2.0 * logits.numel()
        gradient = max(spent["gradient"] - copied, 1e-9)
        yield {
            "case": "passes over logits",
            "by": by,
            "block": block,
            "warps": warps,
            "size": [rows, vocab],
            "fold_ms": round(1e3 * spent["fold"], 4),
            "gradient_ms": round(1e3 * gradient, 4),
            "fold_of_copy": round(size / spent["fold"] / 1e9 / top["gbyte_s"], 3),
            "gradient_of_copy": round(2 * size / gradient / 1e9 / top["gbyte_s"], 3),
        }


# ------------------------------------------------------------------------------------ generate


def generate(meter: Meter, tiny: bool) -> Iterator[dict[str, Any]]:
    """Rollouts of random bfloat16 models: `generate` as TRL calls it, modules, decoders."""
    import bench_sampling

    bench_sampling.SIZES["0.5B"], bench_sampling.HEADS["0.5B"] = LARGE, 14
    known = {case.name: case for case in bench_sampling.CASES}
    cases = [
        known["1M"],
        bench_sampling.Case("0.5B", "0.5B", 16, 8, 256, 128, target=0.25, repeats=1),
        dataclasses.replace(known["58M"], new=64, repeats=3),
        dataclasses.replace(known["1M, spread lengths"], repeats=2),
        dataclasses.replace(known["1M, long prompt"], repeats=3),
    ]
    if tiny:
        cases = [dataclasses.replace(cases[0], prompts=2, group=2, prompt=8, new=12, repeats=1)]
    for case in cases:
        yield rollouts(meter, case)


def rollouts(meter: Meter, case: Any) -> dict[str, Any]:
    """Milliseconds a rollout, and tokens a second, of every side."""
    import bench_sampling

    with meter.device:  # random numbers of half a billion weights
        model, ids, mask = bench_sampling.build(case)
    kind = torch.bfloat16 if meter.cuda else torch.float32
    model = model.to(meter.device, kind)
    ids, mask = ids.to(meter.device), mask.to(meter.device)
    runs = bench_sampling.sides(case, model, ids, mask)
    if meter.cuda:
        runs["fast, no graphs"] = without_graphs(runs["fast"])
    tokens: dict[str, list[int]] = {name: [] for name in runs}

    def counted(name: str) -> Callable[[], None]:
        return lambda: tokens[name].append(runs[name]())

    torch.manual_seed(0)
    peaks = {name: meter.peak_mib(counted(name)) for name in runs}  # the first run warms up
    seconds = meter.medians({name: counted(name) for name in runs}, case.repeats, warm=meter.cuda)
    made = {name: statistics.mean(values[1:]) for name, values in tokens.items()}
    speed = {name: made[name] / spent for name, spent in seconds.items()}
    operations, bytes_ = bench_sampling.necessary(case, model, ids, mask)
    return {
        "case": case.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "rows": case.prompts * case.group,
        "prompt_tokens": case.prompt,
        "new_tokens": case.new,
        "ms": {name: round(1e3 * spent, 2) for name, spent in seconds.items()},
        "tokens_per_s": {name: round(value) for name, value in speed.items()},
        "ratio": round(speed["generate"] / speed["fast"], 3),
        "target": case.target,
        **roofline(operations, bytes_ * kind.itemsize / 4, seconds["fast"], meter.ceilings()),
        "peak_mib": peaks,
    }


def without_graphs(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same rollout by the decoder that launches every kernel."""
    from hmpo.sampling import engines

    def stepwise() -> Any:
        with mock.patch.object(engines, "GRAPHS", False):
            return run()

    return stepwise


# -------------------------------------------------------------------------------------- update


def update(meter: Meter, tiny: bool) -> Iterator[dict[str, Any]]:
    """Whole updates by TRL's trainer and ours, bfloat16 autocast on both sides."""
    if (reason := missing("trl") or missing("datasets")) is not None:
        yield {"case": "update", "skipped": reason}
        return
    import bench_trl

    cases = [dataclasses.replace(case, device=meter.device.type) for case in bench_trl.CASES]
    if tiny:
        small = {"prompts": 2, "group": 2, "prompt": 8, "new": 8, "repeats": 1}
        cases = [dataclasses.replace(cases[3], **small)]
    top = meter.ceilings()
    for case in cases:
        row = bench_trl.measure(case)
        row["seconds"] = row.pop("cpu_s")
        work = (1e9 * row["necessary"][name] for name in ("gflop", "gbyte"))
        row |= roofline(*work, row["seconds"]["ours"], top)
        if case.memory_target and meter.cuda:
            later = {side: bench_trl.one_update(case, side, 1) for side in ("trl", "ours")}
            row["peak_mib"] = {side: meter.peak_mib(run) for side, run in later.items()}
        yield row


# ------------------------------------------------------------------------------------- smollm2


def even_share(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The share of even token ids: a reward that random weights differ in."""
    return [sum(i % 2 == 0 for i in ids) / max(1, len(ids)) for ids in completion_ids]


def smollm2_work(device: str, tiny: bool, path: str) -> tuple[str, Any, Any, Any, int]:
    """(what it is, policy with its tokenizer, task, reward function, tokens of a response).

    Random weights of SmolLM2-135M's shape where the model is not at hand, with the tokenizer and
    the prompts of tiny-sort and 64 tokens a response.
    """
    largest = TaskConfig(name="sort") if tiny else TaskConfig(name="largest", shots=1)
    try:
        loaded = load_policy(PolicyConfig(path="tiny-sort" if tiny else path), device=device)
        task = make_task(largest)
        return path if not tiny else "tiny-sort", loaded, task, task.reward, task.max_new_tokens
    except ModelError as error:
        print(f"{error}; random weights instead")
    loaded, task = load_policy(PolicyConfig(path="tiny-sort")), make_task(TaskConfig(name="sort"))
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**SMOLLM2, attn_implementation="sdpa"))
    loaded = dataclasses.replace(loaded, model=model)
    return "random weights, SmolLM2-135M's shape", loaded, task, even_share, 64


def smollm2(meter: Meter, tiny: bool, path: str = "smollm2") -> Iterator[dict[str, Any]]:
    """Training on the largest of four numbers: tokens a second, and where the time goes."""
    rollouts, prompts, group = (1, 2, 2) if tiny else (10, 32, 8)
    name, loaded, task, reward, length = smollm2_work(meter.device.type, tiny, path)
    config = HMPOConfig(
        group_size=group,
        max_length=length,
        minibatches=2,
        autocast="bfloat16" if meter.cuda else "none",
        eos_token=stop_token_ids(loaded.tokenizer, task.stop),
        pad_token=loaded.tokenizer.pad_token_id,
    )
    trainer = HMPOTrainer(
        loaded.model,
        None,
        torch.optim.AdamW(loaded.model.parameters(), lr=2e-5, fused=meter.cuda),
        config,
        Rewards(reward),
        tokenizer=loaded.tokenizer,
        stop=task.stop,
    )
    watch = Stopwatch()
    for index in range(rollouts + 1):
        examples = [task.train(index * prompts + i) for i in range(prompts)]
        columns = {key: [e.columns[key] for e in examples] for key in examples[0].columns}
        texts = [example.prompt for example in examples]
        seen = trainer.totals["num_tokens"]
        record: dict[str, Any] = {}

        def rollout(texts: Any = texts, columns: Any = columns) -> None:
            trainer.begin_rollout(texts, columns)

        def updates(record: dict[str, Any] = record) -> None:
            while trainer.pending_updates:
                record |= trainer.next_update()

        with watch:
            spent = {"rollout": meter.seconds(rollout), "updates": meter.seconds(updates)}
        parts = watch.take()
        made = trainer.totals["num_tokens"] - seen
        if index:  # the first one warms up
            yield {
                "case": name,
                "rollout": index,
                "responses": prompts * group,
                "reward": round(record["reward/mean"], 4),
                "tokens": made,
                "tokens_per_s": round(made / sum(spent.values())),
                "seconds": {key: round(value, 4) for key, value in spent.items()},
                "host_seconds": {key: round(value, 4) for key, value in parts.items()},
            }


def main() -> None:
    """Run one part, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--model", default="smollm2")
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore", message="one update per rollout")
    if chosen.device is None and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu --tiny checks the code without one")
        return
    chosen.device = chosen.device or "cuda"
    if chosen.device == "cpu":
        one_thread()
    meter = Meter(chosen.device)
    run = {"head": head, "generate": generate, "update": update}
    command = f"python benchmarks/bench_gpu.py --device {chosen.device}"
    command += " --tiny" if chosen.tiny else ""
    command += f" --part {chosen.part}" if chosen.part else ""
    name = f"gpu_{chosen.part or 'all'}_{chosen.device}"
    if chosen.tiny:
        name = f"gpu_{chosen.part}_{chosen.device}_path".replace("_None", "")
    rows = []
    for part in (chosen.part,) if chosen.part else PARTS:
        if part == "smollm2":
            found = smollm2(meter, chosen.tiny, chosen.model)
        else:
            found = run[part](meter, chosen.tiny)
        for row in found:
            print(row, flush=True)
            mark = {"check": "of the code only: tiny sizes"} if chosen.tiny else {}
            rows.append({"part": part, **mark, **row})
            save(name, command, rows, show=False)


if __name__ == "__main__":
    main()
