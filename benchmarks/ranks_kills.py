"""Kill single ranks of runs at random instants and resume them; results/ranks_kills.json.

    python -m benchmarks.ranks_kills [KILLS] [SEED] [MINUTES]     (`make test-ranks-kills`)

KILLS for each case of `tests.faults.rank_kills`, 25 if it is not given: two kinds of runs, each
over two and four ranks. No run is begun after MINUTES (60); what was done until then is written.
The policy is tiny and the folder in memory. SIGKILL keeps the page cache: this says nothing of a
power loss.
"""

import dataclasses
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import save

from tests.faults.rank_kills import TIMEOUT_S, campaign
from tests.faults.storage import fast_folder


def main() -> int:
    """Run, print, record, failures too; exit code 1 unless every run came out identical."""
    given = sys.argv[1:]
    kills, seed, minutes = (
        int(given[k]) if len(given) > k else default for k, default in enumerate((25, 0, 60))
    )
    torch.set_num_threads(1)
    began = time.monotonic()
    with fast_folder() as root:
        tallies = campaign(root, kills=kills, seed=seed, until=began + 60 * minutes)
    rows = [
        {"case": name, **dataclasses.asdict(tally), "timeout_s": TIMEOUT_S}
        for name, tally in tallies.items()
    ]
    command = f"python -m benchmarks.ranks_kills {kills} {seed} {minutes}"
    save("ranks_kills", command, rows)
    return int(any(tally.failures or tally.identical < tally.runs for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
