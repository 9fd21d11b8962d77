"""How long things take to start: `import hmpo`, `hmpo --help`, and a run's first update.

python benchmarks/bench_start.py

Every measurement is a process of its own, started afresh and in turn. "first update" starts
`hmpo demo` and stops the clock when the first optimizer update is in the telemetry; what comes
before it (loading, the evaluation of the untrained policy, one rollout) is part of it.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import save

COMMAND = [sys.executable, "-m", "hmpo.cli"]
TARGETS = {"import hmpo": ("wall_s", 0.5), "first update": ("cpu_s", 6.0)}
SETTINGS = os.environ | {"OMP_NUM_THREADS": "1"}


def whole(*command: str) -> dict[str, float]:
    """CPU and wall seconds of a process from start to end."""
    before, began = os.times(), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=SETTINGS)
    wall, after = time.perf_counter() - began, os.times()
    cpu = after.children_user + after.children_system - before.children_user
    return {"cpu_s": cpu - before.children_system, "wall_s": wall}


def first_update() -> dict[str, float]:
    """CPU and wall seconds of `hmpo demo` until its first update is written."""
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        process = subprocess.Popen(
            [*COMMAND, "demo", "--quiet", "--out", out],
            env=SETTINGS,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        telemetry = Path(out) / "demo" / "telemetry.jsonl"
        while not (telemetry.exists() and '"type":"step"' in telemetry.read_text()):
            assert process.poll() is None, "the run ended before its first update"
            time.sleep(0.02)
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        wall = time.perf_counter() - began
        process.kill()
        process.wait()
    ticks = int(fields[11]) + int(fields[12])  # user and system time
    return {"cpu_s": ticks / os.sysconf("SC_CLK_TCK"), "wall_s": wall}


RUNS = {
    "python": lambda: whole(sys.executable, "-c", "pass"),
    "import hmpo": lambda: whole(sys.executable, "-c", "import hmpo"),
    "hmpo --help": lambda: whole(*COMMAND, "--help"),
    "first update": first_update,
}


def main() -> None:
    """Medians of each, in turn."""
    for run in RUNS.values():
        run()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in RUNS}
    for _ in range(5):
        for name, run in RUNS.items():
            found[name].append(run())
    rows: list[dict[str, Any]] = []
    for name, runs in found.items():
        row = {"what": name} | {
            kind: round(statistics.median(run[kind] for run in runs), 3)
            for kind in ("cpu_s", "wall_s")
        }
        if name in TARGETS:
            row["target_kind"], row["target"] = TARGETS[name]
        rows.append(row)
    save("start", "python benchmarks/bench_start.py", rows)


if __name__ == "__main__":
    main()
