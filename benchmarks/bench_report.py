"""CPU time and memory of the report of a suite of 600 finished runs.

python benchmarks/bench_report.py

The suite is generated (54 cells of ten seeds in six blocks, controls, a tuning grid), its runs are
summarised already, as those of a suite are when they end. Importing is told apart. The target is
10 s of CPU time and 1 GB of memory for everything: records read, tables, figures, page.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MEMBERS = ("grpo", "dr_grpo", "gspo", "gmpo", "hmpo", "sign", "pmpo", "cispo", "reinforce")
TASKS = {"dense": 0.6, "sparse": 0.5, "gym": 0.4}
REPEATS = 3


def generate(folder: Path) -> int:
    """A suite of 600 finished runs; returns how many."""
    from tests.lab.study.suites import cell, make_outcome, place, write_plan

    seeds = list(range(100, 110))
    cells, count = [], 0

    def add(name: str, end: float, own: list[int], **about: object) -> None:
        nonlocal count
        settings = about.pop("settings", {})
        cells.append(cell(name, own, settings=settings, **about))  # pyrefly: ignore
        about.pop("against", None)
        for seed in own:
            shift = 0.01 * (seed % 5) + 0.003 * ((seed * 7 + len(name)) % 3)
            place(folder, make_outcome(name, seed, end + shift, noise=0.02, **about))  # pyrefly: ignore
            count += 1

    for i, member in enumerate(MEMBERS):
        for task, end in TASKS.items():
            for regime in ("fresh", "stale"):
                lag = 8 if regime == "stale" else 0
                settings = {
                    "objective": {"member": member, "p": float(1 - i % 3)},
                    "rollout": {"lag": lag},
                }
                levels = {"member": member, "task": task, "regime": regime}
                gain = 0.01 * (i - 4) if lag else 0.0
                add("+".join(levels.values()), end + gain, seeds, levels=levels, settings=settings)
    base = "grpo+dense+fresh"
    add("again", 0.6, [seed + 1000 for seed in seeds], role="again", against=base)
    add("positive", 0.3, seeds, role="positive", against=base)
    add("placebo", 0.2, seeds, role="placebo")
    for member in MEMBERS[:5]:
        for rate in (1e-4, 1e-3):
            settings = {"optimizer": {"lr": rate}}
            levels = {"member": member}
            name = f"tune-{member}-{rate:g}"
            add(name, 0.5, [900, 901, 902], role="tuning", levels=levels, settings=settings)
    write_plan(folder, cells)
    return count


def measured(folder: Path) -> dict[str, float | int]:
    """One report in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    import_s, report_s, peak_mb, page_mb, outcomes = done.stdout.split()
    return {
        "runs": int(outcomes),
        "import_s": float(import_s),
        "report_s": float(report_s),
        "peak_mb": float(peak_mb),
        "page_mb": float(page_mb),
    }


def one(folder: Path) -> None:
    """Import, report, and print the figures."""
    began = time.process_time()
    from hmpo.lab.study.report import report_suite

    imported = time.process_time()
    written = report_suite(folder)
    spent = time.process_time() - imported
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    size = written.page.stat().st_size / 1e6
    print(f"{imported - began:.2f} {spent:.2f} {peak:.0f} {size:.1f} {written.outcomes}")


def main() -> None:
    """Measure and write the result."""
    from benchmarks.common import save

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "headline"
        generate(folder)
        rows = [measured(folder) for _ in range(REPEATS)]
    save("report", "python benchmarks/bench_report.py", rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(Path(sys.argv[2]))
    else:
        main()
