"""No hub is asked for what lies on the disk; what others load is theirs to decide."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants


@contextmanager
def no_hub() -> Iterator[None]:
    """Whatever runs inside asks no hub, unless `HF_HUB_OFFLINE` says what to do.

    The setting is of the process, so it is put back: reward models may come from a hub.
    """
    if os.environ.get("HF_HUB_OFFLINE") is not None:
        yield
        return
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
