"""Kill suites at random instants and start them again; writes results/kill_suite.json.

    python -m benchmarks.kill_suite [KILLS] [SEED]

KILLS of parents and workers together, 50 if it is not given. A suite is eight runs of a tiny
policy in a folder in memory, two at once. SIGKILL keeps the page cache: this says nothing of a
power loss.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

from hmpo.run.environment import describe_environment
from tests.faults.storage import fast_folder
from tests.lab.suite.kills import campaign

RESULT = Path(__file__).parent / "results" / "kill_suite.json"


def main() -> int:
    """Run, print, record; exit code 1 unless every suite came out identical."""
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    began = time.time()
    with fast_folder() as root:
        tally = campaign(root, kills=kills, seed=seed)
    result = {
        "command": f"python -m benchmarks.kill_suite {kills} {seed}",
        "seconds": round(time.time() - began),
        **dataclasses.asdict(tally),
        "environment": describe_environment(),
    }
    text = json.dumps(result, indent=2) + "\n"
    print(text)
    if tally.failures or tally.identical != tally.suites:
        return 1
    RESULT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
