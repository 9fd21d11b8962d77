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


def device_of_rank(device: str) -> str:
    """The device of this rank: of several GPUs the one of its own number on its machine."""
    if not launched() or device != "cuda":
        return device
    return "cuda:" + os.environ["LOCAL_RANK"]
