"""What two ranks with other settings or code are told, for processes: see `test_alike.py`."""

import dataclasses
import sys

import torch
import torch.distributed as dist

from hmpo.config import ObjectiveConfig, RunConfig
from hmpo.errors import RankError
from hmpo.ranks.world import Ranks
from hmpo.run import alike


def refused(ranks: Ranks, config: RunConfig) -> str:
    try:
        alike.refuse_unlike(ranks, config)
    except RankError as error:
        return str(error)
    return "nothing"


def main(file: str, rank: str, size: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=int(rank), world_size=2)
    ranks, plain = Ranks.of_processes(), RunConfig()
    other = plain
    if ranks.rank:
        other = dataclasses.replace(plain, seed=1, objective=ObjectiveConfig(p=-0.5))
    found = {
        "same": refused(ranks, plain),
        "settings": refused(ranks, other),
        "sizes of logs": refused(ranks, dataclasses.replace(plain, samples=ranks.rank)),
    }
    alike.code_digest = lambda: bytes([ranks.rank])  # type: ignore[assignment]
    found["code"] = refused(ranks, plain)
    torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
