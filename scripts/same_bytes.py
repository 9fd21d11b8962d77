"""Whether two trees of this project give the same bytes: runs made whole by each, and handed over.

A refactoring changes no number. For each configuration below, a run is made whole by the old
tree, whole by this one, and begun by the old one, stopped inside a rollout, and finished by this
one. Telemetry, completions, final weights and optimizer state are compared byte by byte.

    python scripts/same_bytes.py OLD_TREE        prints a table, writes the result file

Both trees run with the present interpreter, one thread, on this machine.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "same_bytes.json"
STOP_AT = 5
"""Updates before the interruption: inside the third rollout."""
CASES: dict[str, dict[str, Any]] = {
    "hmpo": {},
    "grpo with a reference": {
        "objective__member": "grpo",
        "objective__kl_coef": 0.05,
        "reference": "start",
    },
    "gmpo, epochs and micro-batches": {
        "objective__member": "gmpo",
        "trainer__epochs": 2,
        "trainer__micro_batch_size": 2,
    },
    "learnable p, muon": {
        "objective__member": "hmpo",
        "objective__exponent": {"kind": "learnable"},
        "optimizer__name": "muon",
    },
    "apmpo": {"objective__member": "apmpo"},
    "calibrated clip": {"objective__clip_share": 0.2, "objective__clip_rollouts": 2},
    "pmpo, bfloat16 sampling": {
        "objective__member": "pmpo",
        "trainer__sampling_dtype": "bfloat16",
    },
    "controllers apply": {
        "agm": {"mode": "apply", "controls": ["lr", "clip", "stop"]},
    },
    "scheduled p": {"objective__exponent": {"kind": "linear", "end": -2.0}},
    "gspo baseline": {
        "algorithm": "gspo",
        "objective__member": "gspo",
    },
}
CHANGED = {
    "gspo baseline": "its log holds more metrics; weights and completions are equal",
}
"""Cases that may differ, and why."""
CHILD = """
import json, logging, os, sys, warnings
from pathlib import Path
import torch
from hmpo import train
from tests.faults.micro import micro_config, micro_policy
try:
    from hmpo.run import Observer
except ImportError:
    from hmpo.observer import Observer

class Stop(Observer):
    def on_update(self, record, timing):
        if stop and record["step"] + 1 == stop:
            raise KeyboardInterrupt

torch.set_num_threads(1)
logging.disable(logging.WARNING)
warnings.simplefilter("ignore")
changes, stop = json.loads(sys.argv[2]), int(sys.argv[3])
os.chdir(sys.argv[1])
if not os.path.exists("policy"):
    micro_policy(Path("policy"))
config = micro_config(Path("policy"), Path("."), **changes)
train(config, resume=True, exist_ok=True, observer=Stop())
"""


def run(tree: Path, place: Path, changes: dict[str, Any], stop: int = 0) -> str:
    """Make or continue a run by `tree`; its error, or nothing."""
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    arguments = [str(place), json.dumps(changes), str(stop)]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
    )
    stopped = stop and "KeyboardInterrupt" in done.stderr
    return "" if done.returncode == 0 or stopped else done.stderr[-2000:]


def left(folder: Path) -> dict[str, str]:
    """SHA-256 of what a run leaves, by file."""
    names = ["telemetry.jsonl", "completions.jsonl"]
    found = {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    for path in sorted([*newest.glob("*.safetensors"), *(folder / "policy").glob("*.safetensors")]):
        found[str(path.relative_to(folder))] = path.read_bytes()
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}


def compare(old: Path, place: Path, name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """What differs between the trees in one case."""
    sides = {side: place / side for side in ("old", "new", "handed")}
    for folder in sides.values():
        folder.mkdir()
    errors = [
        run(old, sides["old"], changes),
        run(ROOT, sides["new"], changes),
        run(old, sides["handed"], changes, STOP_AT),
        run(ROOT, sides["handed"], changes),
    ]
    if any(errors):
        return {"case": name, "error": next(filter(None, errors))}
    files = {side: left(folder / "run") for side, folder in sides.items()}
    whole = files.pop("old")
    differ = {
        side: sorted(f for f in {*whole, *found} if whole.get(f) != found.get(f))
        for side, found in files.items()
    }
    return {"case": name, "files": len(whole), "differ": differ, "may": CHANGED.get(name)}


def main() -> int:
    """Compare all cases; 1 where something differs that may not."""
    old = Path(sys.argv[1]).resolve()
    rows = []
    for name, changes in CASES.items():
        with tempfile.TemporaryDirectory() as place:
            rows.append(compare(old, Path(place), name, changes))
        row = rows[-1]
        print(name, "|", row.get("error") or row["differ"], flush=True)
    return finish(old, rows)


def finish(old: Path, rows: list[dict[str, Any]]) -> int:
    """Write the result file; the exit code."""
    commit = ["git", "rev-parse", "--short=12", "HEAD"]
    commits = {
        name: subprocess.run(commit, cwd=tree, capture_output=True, text=True).stdout.strip()
        for name, tree in (("old", old), ("new", ROOT))
    }
    result = {"commits": commits, "machine": platform.machine(), "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    bad = [
        row for row in rows if "error" in row or (any(row["differ"].values()) and not row["may"])
    ]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
