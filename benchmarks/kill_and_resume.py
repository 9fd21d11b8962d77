"""Kill whole runs at random instants and resume them; writes results/kill_and_resume.json.

    python -m benchmarks.kill_and_resume [KILLS] [SEED]

The model is tiny and the folder in memory, so that hundreds of kills fit in minutes. SIGKILL
keeps the page cache: this says nothing of a power loss (the order of fsync has its own tests).
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from hmpo.run.environment import describe_environment
from tests.faults.kill_runs import kill_and_resume
from tests.faults.storage import fast_folder

RESULT = Path(__file__).parent / "results" / "kill_and_resume.json"


def main() -> int:
    """Run, print, record; exit code 1 unless every run came out identical."""
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    torch.set_num_threads(1)
    with fast_folder() as root:
        tally = kill_and_resume(root, kills=kills, seed=seed)
    result = {
        "command": f"python -m benchmarks.kill_and_resume {kills} {seed}",
        **dataclasses.asdict(tally),
        "environment": describe_environment(),
    }
    text = json.dumps(result, indent=2) + "\n"
    print(text)
    good = not tally.failures and tally.resumed == tally.kills and tally.identical == tally.runs
    if good:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(text, encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
