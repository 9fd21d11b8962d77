"""What MuonClip costs. Each part prints its rows and writes a result file of its own.

python benchmarks/bench_muonclip.py [part ...]      all parts, or some of PARTS by name
"""

import sys

import muon_step
import tracker_cost
import tracker_kernels
from common import one_thread

PARTS = {
    "tracker": tracker_cost.main,
    "kernels": tracker_kernels.main,
    "muon": muon_step.main,
}


def main() -> None:
    """Run the parts that were named."""
    one_thread()
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()


if __name__ == "__main__":
    main()
