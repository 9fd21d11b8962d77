"""What a launcher has told this process of itself; nothing here needs torch."""

import os

from hmpo.errors import ConfigError


def launched() -> int:
    """How many processes torchrun, or a launcher like it, has started with this one; 0 for none.

    Raises:
        ConfigError: one line: there are several, and nobody has said which one this is.
    """
    size, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK")
    if not size.isdigit() or int(size) < 2:
        return 0
    if rank is None or not rank.isdigit():
        raise ConfigError(
            f"WORLD_SIZE = {size} and no RANK: each process would train alone; start them by "
            "torchrun or --ranks, or take WORLD_SIZE out of the environment"
        )
    return int(size)


def rank_of_launch() -> int:
    """This process's rank among them; 0 of a process alone."""
    return int(os.environ["RANK"]) if launched() else 0


def who() -> str:
    """What a message begins with where ranks share a terminal: "rank 2: "; "" of the first."""
    size, rank = os.environ.get("WORLD_SIZE", ""), os.environ.get("RANK", "")
    several = size.isdigit() and int(size) > 1 and rank.isdigit() and int(rank) > 0
    return f"rank {rank}: " if several else ""


def restarts() -> int:
    """How many times torchrun has started this group anew after a failure."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return int(count) if count.isdigit() else 0


def launcher() -> int | None:
    """Process id of the torchrun that has started this process; None where none has."""
    return os.getppid() if "TORCHELASTIC_RESTART_COUNT" in os.environ else None


def ranks_here() -> int:
    """How many of them are on this machine; 1 of a process alone."""
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(here) if launched() and here.isdigit() and int(here) else max(1, launched())


def device_of_rank(device: str) -> str:
    """The device of this rank: of several GPUs the one of its own number on its machine.

    Raises:
        ConfigError: one line: all ranks would share one GPU, or nobody has said which is whose.
    """
    if not launched() or not device.startswith("cuda"):
        return device
    number = os.environ.get("LOCAL_RANK", "")
    if device != "cuda" or not number.isdigit():
        got = f"device = {device!r}" if device != "cuda" else "no LOCAL_RANK"
        raise ConfigError(
            f"{got} with {launched()} ranks: each takes the GPU of its own number; give "
            'device = "cuda", and start the ranks by torchrun or --ranks'
        )
    return f"cuda:{number}"
