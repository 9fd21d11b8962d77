"""Policies from a hub, and no hub for what lies on the disk. No torch in here.

A download takes what a causal language model is made of and nothing that could run: settings, the
tokenizer's files, and safetensors. The small files come first, so that a model which cannot be
used is refused before its weights are fetched. Files lie in the cache that transformers uses too.
"""

import errno
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hmpo.errors import ModelError

logger = logging.getLogger(__name__)

SETTINGS = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "model.safetensors.index.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "README.md",
    "LICENSE*",
    "NOTICE*",
)
"""Files of a policy beside its weights, as patterns: data all of them."""
WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
"""Weights in one file; those in several are named by their index."""
WAITS = (2.0, 8.0)
"""Seconds before a server that is busy or broken is asked again, beyond what the hub's own client
does, which repeats questions after files but not all others."""
BUSY = (429, 500, 502, 503, 504)
"""Answers after which it is."""


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


def fetch_policy(name: str, revision: str = "") -> Path:
    """Folder of a hub's policy in the cache, downloaded if it is not there; its name is the commit.

    `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_CACHE` and `HF_HUB_OFFLINE` are huggingface_hub's. Where the
    hub does not answer, what the cache has whole is taken.

    Args:
        name: `organisation/name`.
        revision: a branch, tag or commit; empty takes the main branch.

    Raises:
        ModelError: one line; there is no such model, it may not be had, it has no safetensors, its
            architecture is not one of transformers, or the hub cannot be reached.
    """
    folder = _snapshot(name, revision, SETTINGS)
    if not any((folder / kind).is_file() for kind in ("config.json", "adapter_config.json")):
        raise ModelError(f"policy {name!r}: has no config.json at {constants.ENDPOINT}")
    if (folder / "config.json").is_file():
        check_architecture(folder, name)
    parts = _parts(folder, name)
    _snapshot(name, folder.name, parts or WEIGHTS)
    missing = [part for part in parts if not (folder / part).is_file()]
    if missing or not any((folder / part).is_file() for part in (*parts, *WEIGHTS)):
        lacks = missing[0] if missing else WEIGHTS["adapter" in _kind(folder)]
        raise ModelError(
            f"policy {name!r}: has no {lacks} at {constants.ENDPOINT}; only safetensors are loaded,"
            " no pickled weights: name a revision or a copy that has them"
        )
    return folder


def check_architecture(folder: Path, path: str) -> None:
    """Only the architectures that transformers itself implements.

    Args:
        folder: of the policy.
        path: how the user named it.

    Raises:
        ModelError: config.json names another, or none.
    """
    from transformers import CONFIG_MAPPING, __version__

    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = settings["model_type"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise ModelError(f"policy {path!r}: config.json names no model_type") from None
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ModelError(
            f"policy {path!r}: model_type {kind!r} is not one of transformers {__version__}; "
            "code that comes with a model is never run"
        )


def _kind(folder: Path) -> str:
    return "adapter" if (folder / "adapter_config.json").is_file() else "policy"


def _parts(folder: Path, name: str) -> list[str]:
    """Files that hold the weights by their index; none without one."""
    index = folder / "model.safetensors.index.json"
    if _kind(folder) == "adapter" or not index.is_file():
        return []
    try:
        parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        fits = all(part.endswith(".safetensors") and ".." not in part for part in parts)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        parts, fits = [], False
    if not parts or not fits:
        raise ModelError(f"policy {name!r}: {index.name} names no safetensors files")
    return parts


def _snapshot(name: str, revision: str, patterns: Sequence[str]) -> Path:
    """The cache's folder of one commit with all files of these patterns that the hub has."""
    for wait in (*WAITS, None):
        try:
            found = snapshot_download(name, revision=revision or None, allow_patterns=[*patterns])
            return Path(found)
        except Exception as error:  # what the network raises is of several libraries
            causes = list(_causes(error))
            status = next((s for s in map(_status, causes) if s is not None), None)
            if wait is None or status not in BUSY:
                raise ModelError(f"policy {name!r}: {_why(causes, status, revision)}") from error
            line = "policy %r: %s answers %s; asked again in %.0f s"
            logger.warning(line, name, constants.ENDPOINT, status, wait)
            time.sleep(wait)
    raise AssertionError("the last attempt raises or returns")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it: the hub's client wraps what a server said."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The server's answer, where an error is one."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _why(causes: Sequence[BaseException], status: int | None, revision: str) -> str:
    """What a download failed for, and the remedy."""
    hub = constants.ENDPOINT
    here = "" if revision else "no such folder here, and "

    def is_a(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    token = "set HF_TOKEN (or log in with `hf auth login`)"
    if is_a(HFValidationError):
        return "no such folder, nor a name that a hub could have; expected organisation/name"
    if is_a(GatedRepoError):
        return f"is gated at {hub}; accept its terms on its page there and {token}"
    if is_a(RepositoryNotFoundError):
        return f"{here}no such model at {hub}; check the name, or {token} where it is private"
    if is_a(RevisionNotFoundError):
        return f"has no revision {revision!r} at {hub}; set policy.revision to one that it has"
    if is_a(OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return (
            f"{here}not whole in the cache {constants.HF_HUB_CACHE}, while "
            "HF_HUB_OFFLINE keeps from asking a hub; unset it, or name a local folder"
        )
    if status in (401, 403):
        return f"{hub} does not let it be read ({status}); {token} with one that may"
    if any(isinstance(c, OSError) and c.errno == errno.ENOSPC for c in causes):
        return f"no room for it in {constants.HF_HUB_CACHE}; make some, or set HF_HUB_CACHE"
    if status is not None:
        return f"{hub} answers {status} each time; try later, or name a local folder"
    last = causes[-1]
    said = (str(last).strip().splitlines() or [""])[0][:200]
    return (
        f"{here}it could not be downloaded from {hub} "
        f"({type(last).__name__}: {said}); try again, or name a local folder"
    )
