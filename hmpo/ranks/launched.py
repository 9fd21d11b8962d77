"""What a launcher has told this process of itself; nothing here needs torch."""

import os


def launched() -> int:
    """How many processes torchrun, or a launcher like it, has started with this one; 0 for none."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if "RANK" in os.environ and size.isdigit() and int(size) > 1 else 0


def rank_of_launch() -> int:
    """This process's rank among them; 0 of a process alone."""
    return int(os.environ["RANK"]) if launched() else 0


def device_of_rank(device: str) -> str:
    """The device of this rank: of several GPUs the one of its own number on its machine."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if launched() and device == "cuda" else device
