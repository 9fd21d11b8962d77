"""The global random states of Python, NumPy and torch: seeded, kept and put back.

hmpo itself draws from generators of its own; tasks, rewards and dropout may use these.
"""

import contextlib
import hashlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed all of them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """All of them, as plain values and tensors for a checkpoint."""
    state: Any = np.random.get_state()
    name, keys, *rest = state
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype("int64")), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None,
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` gave; states of GPUs only where there are GPUs."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextlib.contextmanager
def random_state_kept() -> Iterator[dict[str, Any]]:
    """What is drawn inside leaves no trace; gives the state at its begin."""
    state = random_state()
    try:
        yield state
    finally:
        restore_random_state(state)


def keyed_seed(seed: int, purpose: str, index: int) -> int:
    """A seed of 63 bits for each (seed, purpose, index)."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def keyed_generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """A generator of its own for each (seed, purpose, index): nothing to save, nothing shared."""
    return torch.Generator().manual_seed(keyed_seed(seed, purpose, index))
