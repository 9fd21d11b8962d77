"""One of two ranks stops answering, for processes of their own: see `test_start.py`."""

import os
import sys
import time
from pathlib import Path

import torch

from hmpo.errors import RankError
from hmpo.ranks.start import joined

PATIENCE_S = 3.0


def main(file: str, rank: str, size: str, out: str) -> None:
    os.environ |= {"RANK": rank, "WORLD_SIZE": size}
    told = Path(out).with_name("told.txt")
    with joined("cpu", timeout_s=PATIENCE_S) as ranks:
        ranks.total(torch.ones(1))
        if ranks.rank:
            while not told.exists():
                time.sleep(0.05)
        else:
            try:
                ranks.total(torch.ones(1))
            except RankError as error:
                told.write_text(str(error))
        torch.save(ranks, out)
        os._exit(0)  # a group that was given up cannot be left in order


if __name__ == "__main__":
    main(*sys.argv[1:])
