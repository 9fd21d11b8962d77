"""How often the controllers' statistics see what is not there.

python benchmarks/agm_false_alarms.py [--windows N]     writes results/agm_false_alarms.json
"""

import argparse
import math
import random
from collections.abc import Iterator

from common import save

from hmpo.agm.primitives import line


def noise(rng: random.Random, memory: float) -> Iterator[float]:
    """Stationary noise of variance 1 with lag-1 autocorrelation `memory`."""
    x = rng.gauss(0, 1)
    while True:
        yield x
        x = memory * x + math.sqrt(1 - memory * memory) * rng.gauss(0, 1)


def trends(size: int, memory: float, windows: int, seed: int) -> dict[str, float | int | str]:
    """Share of trendless windows in which |t| > 3, and with an oscillation."""
    rng = random.Random(seed)
    steps, alarms, oscillating = range(size), 0, 0
    for _ in range(windows):
        source = noise(rng, memory)
        found = line(steps, [next(source) for _ in steps])
        assert found is not None
        alarms += abs(found.t) > 3
        oscillating += found.oscillation > 0
    return {
        "what": "trendless window",
        "size": size,
        "memory": memory,
        "windows": windows,
        "t_above_3": alarms / windows,
        "oscillating": oscillating / windows,
    }


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=20000)
    windows = parser.parse_args().windows
    rows = [
        trends(size, memory, windows, seed=1000 * size + int(10 * memory))
        for size in (20, 50, 100)
        for memory in (0.0, 0.5, 0.8)
    ]
    save("agm_false_alarms", f"python benchmarks/agm_false_alarms.py --windows {windows}", rows)


if __name__ == "__main__":
    main()
