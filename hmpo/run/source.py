"""Which files of a hub a run was made on: the commits, found once and kept in its folder.

A branch or a tag moves, so a run that names one (or nothing, the main branch) writes down which
commit that was when it began: of its policy, and of the policy below adapters. Whatever takes the
run up again takes the files of that commit, also where a folder of that name is here by then.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hmpo.config import PolicyConfig, RunConfig
from hmpo.errors import ModelError
from hmpo.models.paths import base_of, is_adapter, is_hub_name, resolve_policy_path

KEPT_IN = "environment.json"
KEY = "policy"
COMMITS = {"revision": "commit", "base_revision": "base_commit"}
"""By setting of the policy what keeps its commit."""


def pinned(config: RunConfig, folder: Path | None) -> RunConfig:
    """`config` with the commits of its policy where that comes from a hub; else as it is.

    Args:
        config: of the run, its paths as they are found.
        folder: of the run where it has begun, whose commits are taken; else the hub is asked.

    Raises:
        ModelError: the policy cannot be had.
    """
    kept = config if folder is None else kept_commits(config, folder)
    if kept is not config:
        return kept
    policy, commits = config.policy, {}
    place = Path(policy.path)
    if is_hub_name(policy.path, policy.revision):
        place = resolve_policy_path(policy.path, policy.revision)
        commits["revision"] = place.name
    base = _hub_base(policy, place)
    if base is not None:
        commits["base_revision"] = resolve_policy_path(*base).name
    return _with_policy(config, **commits) if commits else config


def kept_commits(config: RunConfig, folder: Path) -> RunConfig:
    """`config` with the commits that the run in a folder keeps of the same policy, if it does.

    Nothing is looked for on the disk or at a hub.
    """
    policy, kept = config.policy, _kept(folder)
    path = kept.get("path")
    here = [str(Path(place) / path) for place in config.relative_to] if path else []
    if not path or policy.path not in (path, *here):
        return config
    commits = {}
    for setting, name in COMMITS.items():
        commit, given = kept.get(name, ""), getattr(policy, setting)
        if given not in (kept.get(setting, ""), commit):
            return config
        commits[setting] = commit or given
    at_hub = path if commits["revision"] else policy.path
    return _with_policy(config, path=at_hub, **commits)


def _kept(folder: Path) -> Mapping[str, str]:
    """What the run in a folder keeps of its policy; nothing where that cannot be read."""
    try:
        kept = json.loads((folder / KEPT_IN).read_text(encoding="utf-8"))[KEY]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    sound = isinstance(kept, dict) and all(isinstance(value, str) for value in kept.values())
    return kept if sound else {}


def described(written: RunConfig, used: RunConfig) -> dict[str, Any]:
    """What environment.json keeps of a hub's policy; nothing of any other.

    Args:
        written: the settings as the user wrote them.
        used: the same after `pinned`.
    """
    given, policy = written.policy, used.policy
    kept = {"path": given.path}
    if is_hub_name(policy.path, policy.revision):
        kept |= {"revision": given.revision, "commit": policy.revision}
    if policy.base_revision:
        kept |= {"base_revision": given.base_revision, "base_commit": policy.base_revision}
    return {KEY: kept} if len(kept) > 1 else {}


def with_commits(written: RunConfig, used: RunConfig) -> RunConfig:
    """The settings as the user wrote them, but for the commits that the run used."""
    return _with_policy(written, **{name: getattr(used.policy, name) for name in COMMITS})


def _hub_base(policy: PolicyConfig, folder: Path) -> tuple[str, str] | None:
    """Name and revision of the hub's policy below the adapters in a folder, if that is so."""
    try:
        folder = folder.expanduser()
        name, own = base_of(folder) if is_adapter(folder) else ("", "")
    except (ModelError, OSError, RuntimeError):  # loading it says what is wrong
        return None
    revision = policy.base_revision or own
    return (name, revision) if is_hub_name(name, revision) else None


def _with_policy(config: RunConfig, **changes: Any) -> RunConfig:
    return dataclasses.replace(config, policy=dataclasses.replace(config.policy, **changes))
