"""What every benchmark shares: alternating runs, medians of CPU time, limits, a result file."""

import ctypes
import gc
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from hmpo.run.environment import describe_environment

RESULTS = Path(os.environ.get("BENCH_RESULTS") or Path(__file__).parent / "results")


def alternate(
    sides: Mapping[str, Callable[[], Any]], repeats: int, *, warm: bool = False
) -> dict[str, float]:
    """Median CPU seconds of each side, run in turn so that a noisy machine hits all alike.

    Each side runs once uncounted, unless they are `warm` already.
    """
    for run in () if warm else sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            began = time.process_time()
            run()
            seconds[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def ceilings() -> dict[str, float]:
    """What this machine reaches at its best: 10^9 operations and 10^9 bytes a second.

    Operations: a product of (512, 1024) by (1024, 1024), by the faster of torch's two libraries.
    """
    x, w, big = torch.randn(512, 1024), torch.randn(1024, 1024), torch.randn(32_000_000)
    out = torch.empty_like(big)

    def best(run: Callable[[], Any]) -> float:
        run()
        spent = []
        for _ in range(9):
            began = time.process_time()
            run()
            spent.append(time.process_time() - began)
        return min(spent)

    def dnn() -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")

    with torch.inference_mode():
        product = min(best(lambda: x.mm(w)), best(dnn))
        return {
            "gflop_s": round(2 * 512 * 1024 * 1024 / product / 1e9, 1),
            "gbyte_s": round(2 * 4 * big.numel() / best(lambda: out.copy_(big)) / 1e9, 1),
        }


def roofline(flops: float, bytes: float, seconds: float, top: dict[str, float]) -> dict[str, Any]:
    """How far from the machine's limit a run was.

    Args:
        flops: floating-point operations that the work cannot do without.
        bytes: bytes of memory that it must read and write.
        seconds: CPU seconds that it took.
        top: what `ceilings` returned in the same minute.

    Returns:
        `necessary` (10^9 operations and bytes), `ceilings`, `floor_s` (the larger of both over
        their ceilings), `share` of the limit that was reached.
    """
    floor = max(flops / top["gflop_s"], bytes / top["gbyte_s"]) / 1e9
    return {
        "necessary": {"gflop": round(flops / 1e9, 3), "gbyte": round(bytes / 1e9, 4)},
        "ceilings": top,
        "floor_s": round(floor, 4),
        "share": round(floor / seconds, 3),
    }


def peak_memory(build: Callable[..., Callable[[], Any]], *arguments: Any) -> float:
    """MiB that a run holds at once above what was there before it, in a process of its own.

    Args:
        build: makes the run from `arguments`, both picklable; what it allocates, or touches by a
            small first run, is not counted.
        arguments: handed to `build`.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (build, *arguments))


def _peak(build: Callable[..., Callable[[], Any]], *arguments: Any) -> float:
    """The measured process: its high-water mark is set back once everything is built."""
    one_thread()
    run = build(*arguments)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed counts as free
    Path("/proc/self/clear_refs").write_text("5")
    base = _memory("VmRSS")
    kept = run()
    peak = _memory("VmHWM") - base
    del kept
    return round(peak, 1)


def _memory(kind: str) -> float:
    """MiB of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(kind + ":"))
    return int(line.split()[1]) / 1024


def commit() -> str:
    """The commit that was measured, with a mark where more than results and pages has changed.

    BENCH_COMMIT names it where the code is a copy without its history.
    """
    if told := os.environ.get("BENCH_COMMIT"):
        return told
    name = _git("describe", "--always", "--abbrev=12")
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs")
    return (name + ("-dirty" if changed else "")) or "unknown"


def _git(*arguments: str) -> str:
    """What git says, or nothing."""
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()


def save(name: str, command: str, rows: list[dict[str, Any]], *, show: bool = True) -> Path:
    """Write `results/NAME.json`: command, commit, machine, rows; `show` prints them too."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    facts = {
        "command": command,
        "commit": commit(),
        "environment": describe_environment(),
        "rows": rows,
    }
    path.write_text(json.dumps(facts, indent=2) + "\n")
    for row in rows if show else ():
        print(row)
    if show:
        print(f"written: {os.path.relpath(path)}")
    return path


def one_thread() -> None:
    """Benchmarks run on one thread; process CPU time then compares like with like."""
    torch.set_num_threads(1)
