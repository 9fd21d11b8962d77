"""Processes that make one group, for tests: each runs a module and leaves what it found."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_ranks(module: str, size: int, folder: Path, timeout: float = 400) -> list[Path]:
    """Run `python -m module FILE RANK SIZE OUT` once for each rank, beside each other.

    Returns:
        The OUT of each rank.

    Raises:
        AssertionError: one of them failed; with what it wrote.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outs = [folder / f"{size}-{rank}.pt" for rank in range(size)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", module, str(folder / f"meet-{size}")]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(out)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    try:
        told = [process.communicate(timeout=timeout)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    for rank, (process, text) in enumerate(zip(running, told)):
        assert process.returncode == 0, f"rank {rank}: {text[-3000:]}"
    return outs
