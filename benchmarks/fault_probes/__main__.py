"""Run the probes and keep what they found: `python -m benchmarks.fault_probes [hmpo trl verl]`."""

import argparse
import functools
import importlib.util
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch

from benchmarks.fault_probes.every import PROBES
from benchmarks.fault_probes.protocol import Outcome, Subject, run_probes

RESULTS = Path(__file__).parents[1] / "results"


def subject(name: str) -> Subject:
    """The subject of that name.

    Raises:
        ImportError: its library is not installed.
    """
    if name == "verl":
        from benchmarks.fault_probes.subject_verl import Verl

        return Verl()
    if name == "trl":
        from benchmarks.fault_probes.subject_trl import Trl

        return Trl()
    from benchmarks.fault_probes.subject_hmpo import Hmpo

    return Hmpo()


def show(subject: str, probe: str, outcome: Outcome) -> None:
    """One line."""
    print(f"{subject:5} {outcome.status:15} {probe}: {outcome.line}", flush=True)


def main() -> None:
    """Write a file for each subject."""
    parser = argparse.ArgumentParser(description=__doc__)
    there = [name for name in ("trl",) if importlib.util.find_spec(name)]
    parser.add_argument("subjects", nargs="*", default=["hmpo", *there])
    parser.add_argument("--only", nargs="*", default=(), choices=list(PROBES), metavar="PROBE")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.subjects:
        library, begin = subject(name), time.perf_counter()
        found = run_probes(library, given.only, functools.partial(show, name))
        record: dict[str, Any] = {
            "subject": name,
            "versions": {"python": platform.python_version()} | library.versions(),
            "date": time.strftime("%Y-%m-%d"),
            "seconds": round(time.perf_counter() - begin, 1),
            "probes": found,
        }
        if not given.only:
            path = RESULTS / f"fault_probes-{name}.json"
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
