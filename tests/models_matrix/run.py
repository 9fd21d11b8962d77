"""Ask every family everything, one process each, and write benchmarks/results/models.json.

    python -m tests.models_matrix.run [--again] [--seconds 120] [FAMILY ...]

A family that is in the file already is left as it is unless `--again` says otherwise, so the run
can be stopped and resumed. A crash or a time-out is a row of its own.
"""

import argparse
import json
import logging
import multiprocessing
import platform
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "models.json"


def main() -> int:
    """Run what is missing and write after each family."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--seconds", type=float, default=120.0, help="of CPU, a family")
    options = parser.parse_args()
    import torch
    import transformers

    from tests.models_matrix.cells import COMPILED, LIMIT, LIMIT_FLOAT32
    from tests.models_matrix.clipping import STEPS
    from tests.models_matrix.families import families

    torch.set_num_threads(1)
    logging.getLogger("hmpo").addHandler(logging.NullHandler())  # what is told stands in the cells
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {"families": {}}
    known = list(families())
    for name in options.families or known:
        if name in found["families"] and not options.again:
            continue
        found["families"][name] = asked(name, options.seconds) | {"commit": commit()}
        found |= {
            "command": "make test-models",
            "limit": LIMIT,
            "limit_float32": LIMIT_FLOAT32,
            "compiled": [*COMPILED],
            "steps": STEPS,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }
        found["families"] = {k: found["families"][k] for k in known if k in found["families"]}
        RESULT.write_text(json.dumps(found, indent=1) + "\n")
        sys.stdout.write(f"{name} {summary(found['families'][name])}\n")
        sys.stdout.flush()
    wrong = [name for name, row in found["families"].items() if "wrong" in statuses(row)]
    count = len(found["families"])
    sys.stdout.write(f"{count} families, wrong in silence: {', '.join(wrong) or 'none'}\n")
    return bool(wrong)


def asked(name: str, seconds: float) -> dict[str, Any]:
    """The cells of a family, from a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(name, sender, seconds))
    began = time.monotonic()
    process.start()
    sender.close()
    got: dict[str, Any] = {"unbuilt": f"no answer in {20 * seconds:g} s"}
    try:
        if receiver.poll(20 * seconds):  # the limit is of CPU time; this one is for what sleeps
            got = receiver.recv()
    except EOFError:
        process.join()
        late = process.exitcode == -signal.SIGXCPU
        why = f"no answer in {seconds:g} s of CPU" if late else f"ended with {process.exitcode}"
        got = {"unbuilt": f"its process: {why}"}
    process.kill()
    process.join()
    return got | {"seconds": round(time.monotonic() - began, 1)}


def answer(name: str, sender: Any, seconds: float) -> None:
    """In the process of a family: its cells, or why it cannot be built."""
    import transformers

    from tests.models_matrix.cells import family_cells, told
    from tests.models_matrix.families import build

    limit = int(seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))  # SIGXCPU first, which says why
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    try:
        kind = type(build(name)).__name__
    except BaseException as error:
        sender.send({"unbuilt": told(error)})
        return
    sender.send({"model": kind, **family_cells(name)})


def statuses(row: dict[str, Any]) -> list[str]:
    """Of the cells of a family."""
    return [cell["status"] for cell in row.values() if isinstance(cell, dict)]


def summary(row: dict[str, Any]) -> str:
    """A family on one line."""
    if "unbuilt" in row:
        return f"not built: {row['unbuilt']}"
    return " ".join(f"{k}={v['status']}" for k, v in row.items() if isinstance(v, dict))


def commit() -> str:
    """Of the working tree."""
    line = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
