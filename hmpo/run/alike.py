"""Ranks that are not the same run: other settings, other code, another torch."""

import functools
import hashlib
from pathlib import Path

import torch

import hmpo
from hmpo.config import RunConfig
from hmpo.config.identity import changed_settings
from hmpo.errors import RankError
from hmpo.ranks.world import Ranks


def refuse_unlike(ranks: Ranks, config: RunConfig) -> None:
    """Refuse ranks that would not compute the same, before anything is loaded.

    Raises:
        RankError: one line that names the rank and what differs.
    """
    if ranks.alone:
        return
    first = ranks.once(lambda: config)
    changed = changed_settings(first, config)
    if ranks.any(bool(changed)):
        names = ", ".join(line.partition(" was ")[0] for line in changed) or "none, another rank"
        raise RankError(
            f"rank {ranks.rank} of {ranks.size}: other settings than those of rank 0 ({names}); "
            "start every rank with the same ones"
        )
    ranks.agree("configuration", repr(config))
    ranks.agree("code of hmpo", code_digest())
    ranks.agree("version of torch", torch.__version__)


@functools.cache
def code_digest() -> bytes:
    """SHA-256 of this package's own files."""
    digest, root = hashlib.sha256(), Path(hmpo.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.digest()
