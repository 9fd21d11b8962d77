"""Which files of a hub a run was made on: the commit, found once and kept in its folder.

A branch or a tag moves, so a run that names one (or nothing, the main branch) writes down which
commit that was when it began. Whatever takes the run up again takes the files of that commit.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from hmpo.config import RunConfig
from hmpo.models.paths import is_hub_name, resolve_policy_path

KEPT_IN = "environment.json"
KEY = "policy"


def pinned(config: RunConfig, folder: Path | None) -> RunConfig:
    """`config` with the commit of its policy where that comes from a hub; else as it is.

    Args:
        config: of the run, its paths as they are found.
        folder: of the run where it has begun, whose commit is taken; else the hub is asked.

    Raises:
        ModelError: the hub's policy cannot be had.
    """
    policy = config.policy
    if not is_hub_name(policy.path):
        return config
    kept = config if folder is None else kept_commit(config, folder)
    if kept is not config:
        return kept
    return _with_revision(config, resolve_policy_path(policy.path, policy.revision).name)


def kept_commit(config: RunConfig, folder: Path) -> RunConfig:
    """`config` with the commit that the run in a folder keeps of the same policy, if it does."""
    policy = config.policy
    try:
        kept = json.loads((folder / KEPT_IN).read_text(encoding="utf-8"))[KEY]
        same = (kept["path"], kept["revision"]) == (policy.path, policy.revision)
        commit = kept["commit"]
    except (OSError, ValueError, KeyError, TypeError):
        return config
    if not same or not isinstance(commit, str) or not is_hub_name(policy.path):
        return config
    return _with_revision(config, commit)


def described(written: RunConfig, used: RunConfig) -> dict[str, Any]:
    """What environment.json keeps of a hub's policy; nothing of any other.

    Args:
        written: the settings as the user wrote them.
        used: the same after `pinned`.
    """
    if not is_hub_name(used.policy.path):
        return {}
    policy = written.policy
    kept = {"path": policy.path, "revision": policy.revision, "commit": used.policy.revision}
    return {KEY: kept}


def _with_revision(config: RunConfig, revision: str) -> RunConfig:
    return dataclasses.replace(config, policy=dataclasses.replace(config.policy, revision=revision))
