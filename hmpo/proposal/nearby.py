"""What a user most likely means: models and files of prompts in the current folder."""

import contextlib
from pathlib import Path

from hmpo.errors import HmpoError
from hmpo.models.paths import resolve_policy_path
from hmpo.proposal.data import files_in


def model_here(folder: Path = Path()) -> str:
    """A model in a folder or right below it, else `smollm2` where it was fetched; else nothing.

    Args:
        folder: to look in.
    """
    with contextlib.suppress(OSError):
        inner = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        for place in (*inner, *(p for one in inner for p in sorted(one.iterdir()) if p.is_dir())):
            if (place / "config.json").is_file() and _is_model(f"./{place}"):
                return f"./{place}"
    return "smollm2" if _is_model("smollm2") else ""


def data_here(folder: Path = Path()) -> str:
    """A file of prompts in a folder or in its `data`, one of training before others; else nothing.

    Args:
        folder: to look in.
    """
    found = [*files_in(folder), *files_in(folder / "data")]
    train = [path for path in found if "train" in path.name]
    return str((train or found or [""])[0])


def _is_model(path: str) -> bool:
    try:
        resolve_policy_path(path)
    except (HmpoError, OSError):
        return False
    return True
