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
    "grpo with reference and stop": {"objective__member": "grpo", "objective__kl_coef": 0.05},
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
    "gspo baseline": "minibatches without common padding, one more or less digit; more metrics",
}
"""Cases that may differ, and why."""
CHILD = """
import json, sys, warnings, logging
import torch
torch.set_num_threads(1)
logging.disable(logging.WARNING); warnings.simplefilter("ignore")
from hmpo import train
from tests.faults.micro import micro_config, micro_policy
from pathlib import Path
place, name, changes, stop = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
policy = place / "policy"
if not policy.exists():
    micro_policy(policy)
changes = dict(changes)
if changes.get("objective__kl_coef"):
    changes["policy__reference"] = "start"
config = micro_config(Path("policy"), Path("."), name, **changes)
import os
os.chdir(place)
try:
    from hmpo.run import Observer
except ImportError:
    from hmpo.observer import Observer
class Stop(Observer):
    def on_update(self, record, timing):
        if stop and record["step"] + 1 == stop:
            raise KeyboardInterrupt
train(config, resume=True, exist_ok=True, observer=Stop())
"""


def run(tree: Path, place: Path, name: str, changes: dict[str, Any], stop: int = 0) -> str:
    """Make or continue a run by `tree`; its error, or nothing."""
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    arguments = [str(place), name, json.dumps(changes), str(stop)]
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
    errors = [
        run(old, place, "old", changes),
        run(ROOT, place, "new", changes),
        run(old, place, "handed", changes, STOP_AT),
        run(ROOT, place, "handed", changes),
    ]
    if any(errors):
        return {"case": name, "error": next(filter(None, errors))}
    ids = {run: json.loads((place / run / "telemetry.jsonl").open().readline())["run_id"] for run in ("old", "new", "handed")}
    sides = {}
    for run_name, run_id in ids.items():
        log = place / run_name / "telemetry.jsonl"
        log.write_bytes(log.read_bytes().replace(run_id.encode(), b"RUN"))
        sides[run_name] = left(place / run_name)
    differ = {
        side: sorted(
            f for f in {*sides["old"], *sides[side]} if sides["old"].get(f) != sides[side].get(f)
        )
        for side in ("new", "handed")
    }
    return {"case": name, "files": len(sides["old"]), "differ": differ, "may": CHANGED.get(name)}


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
    bad = [row for row in rows if "error" in row or (any(row["differ"].values()) and not row["may"])]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
