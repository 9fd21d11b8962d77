"""Processes that make one group, for tests: each runs a module and leaves what it found."""

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills, once for all workers of pytest-xdist; the others wait for it."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / name
    with FileLock(base / f"{name}.lock"):
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


def run_ranks(
    module: str, size: int, folder: Path, timeout: float = 400, kind: str = ""
) -> list[Path]:
    """Run `python -m module FILE RANK SIZE OUT [KIND]` once for each rank, beside each other.

    Returns:
        The OUT of each rank.

    Raises:
        AssertionError: one of them failed; with what it wrote.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outs = [folder / f"{size}-{rank}.pt" for rank in range(size)]
    start, end = ["-m", module, str(folder / f"meet-{size}")], [kind] if kind else []
    _run([[*start, str(r), str(size), str(out), *end] for r, out in enumerate(outs)], timeout)
    return outs


def run_script(text: str, folder: Path, size: int = 2, timeout: float = 240) -> None:
    """Run a script with the arguments RANK FILE once for each rank, beside each other.

    Raises:
        AssertionError: one of them failed; with what it wrote.
    """
    script = folder / "rank.py"
    script.write_text(textwrap.dedent(text))
    _run([[str(script), str(rank), str(folder / "store")] for rank in range(size)], timeout)


def _run(ranks: list[list[str]], timeout: float) -> None:
    """Python with these arguments, one process for each, beside each other."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for arguments in ranks
    ]
    try:
        told = [process.communicate(timeout=timeout)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    for rank, (process, text) in enumerate(zip(running, told)):
        assert process.returncode == 0, f"rank {rank}: {text[-3000:]}"
