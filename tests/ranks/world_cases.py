"""What one rank of several finds, for a process of its own: see `test_world.py`."""

import sys
from typing import Any

import torch
import torch.distributed as dist

from hmpo.errors import RankError, RewardError
from hmpo.ranks.world import Ranks


def failing() -> None:
    raise RewardError("no\nreward")


def refused(call: Any) -> str:
    try:
        call()
    except (RankError, RewardError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def gradients(rank: int) -> list[torch.Tensor | None]:
    """Sums of: one that all have, one that the second alone has, none, and one in 16 bits."""
    parameters = [torch.zeros(3, requires_grad=True) for _ in range(3)]
    half = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    parameters[0].grad = torch.full((3,), float(rank + 1))
    half.grad = torch.full((2,), 256.0 if rank == 0 else 1.0, dtype=torch.bfloat16)
    if rank == 1:
        parameters[1].grad = torch.tensor([1.0, 2.0, 3.0])
    Ranks.of_processes().add_gradients([*parameters, half])
    return [p.grad for p in (*parameters, half)]


def main(file: str, rank: str, size: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=int(rank), world_size=2)
    ranks = Ranks.of_processes()
    mine = [[4, 1, 3], [2, 0]][ranks.rank]
    pieces = torch.tensor(mine)
    values = torch.stack([torch.full((2 + ranks.rank,), float(piece)) for piece in mine])
    none = [2, 0, 1] if ranks.rank else []
    found = {
        "ranks": ranks,
        "joined": ranks.join(values, pieces, 5, fill=-1),
        "flags": ranks.join(pieces % 2 == 0, pieces, 5),
        "of one": ranks.join(*[torch.tensor(none, dtype=torch.int64)] * 2, 3),
        "wide": ranks.join(
            torch.zeros(len(none), 2, dtype=torch.float64 if none else torch.bfloat16),
            torch.tensor(none, dtype=torch.int64),
            3,
        ),
        "dtypes": refused(lambda: ranks.join(values.double() if ranks.rank else values, pieces, 5)),
        "total": ranks.total(torch.tensor([1.0, float(ranks.rank)])),
        "any": (ranks.any(ranks.rank == 1), ranks.any(False)),
        "gradients": gradients(ranks.rank),
        "once": ranks.once(lambda: {"made by": ranks.rank}),
        "failed": refused(lambda: ranks.once(failing)),
        "agree": refused(lambda: ranks.agree("seed", "0")),
        "differ": refused(lambda: ranks.agree("seed", str(ranks.rank))),
    }
    torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
