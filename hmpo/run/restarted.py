"""A group of ranks that torchrun has started anew after a failure goes on with its own run."""

import contextlib
import json
from pathlib import Path

from hmpo.ranks.launched import launcher, restarts
from hmpo.run.folder import refuse_foreign


def ways_of_start(
    folder: Path, *, resume: bool, exist_ok: bool, overwrite: bool
) -> dict[str, bool]:
    """How a run is begun: as asked, or after a restart as a resume of what this launch has begun.

    The launcher's process id in timing.jsonl tells whose run it is: one that was there before is
    refused, or overwritten, as it was at the first start.

    Args:
        folder: of the run.
        resume: as in `hmpo.train`.
        exist_ok: as there.
        overwrite: as there.
    """
    if restarts() and _begun_by(folder) == launcher():
        return {"resume": True, "exist_ok": True, "overwrite": False}
    return {"resume": resume, "exist_ok": exist_ok, "overwrite": overwrite}


def _begun_by(folder: Path) -> int | None:
    """The launcher of the last process that wrote into a run's folder."""
    refuse_foreign(folder)
    try:
        lines = (folder / "timing.jsonl").read_bytes().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        with contextlib.suppress(ValueError):  # a line that a kill has cut off
            record = json.loads(line)
            if isinstance(record, dict) and record.get("type") == "segment":
                return record.get("launcher")
    return None
