"""What can be refused before anything heavy is imported: mistakes cost no five seconds of torch."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from hmpo.config import RunConfig
from hmpo.config.places import located
from hmpo.errors import ConfigError
from hmpo.models.paths import resolve_policy_path
from hmpo.rewards.loading import check_spec
from hmpo.tasks import check_name

COMMANDS = ("agm", "demo", "train", "eval", "report", "fetch-model", "doctor")
FETCHED = ("smollm2",)
"""Policies whose own loading says how to get them."""
AGM_COMMANDS = ("replay", "summarize", "plot", "sweep", "diff")


def refuse_unknown_command(arguments: Sequence[str]) -> None:
    """Refuse a command that does not exist, in one line with the nearest one.

    Raises:
        ConfigError: it does not exist.
    """
    known, words = COMMANDS, list(arguments)
    if words[:1] == ["agm"]:
        known, words = AGM_COMMANDS, words[1:]
    if not words or words[0].startswith("-") or words[0] in known:
        return
    close = difflib.get_close_matches(words[0], known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(known)}"
    raise ConfigError(f"{words[0]}: no such command; {hint}")


def refuse_several_processes() -> None:
    """Refuse to be one of several processes, each of which would train alone.

    Raises:
        ConfigError: a launcher such as torchrun has set WORLD_SIZE above 1.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size.isdigit() and int(size) > 1:
        raise ConfigError(
            f"WORLD_SIZE = {size}: hmpo trains in one process; start it without torchrun, or "
            "train in several processes inside TRL (hmpo.adapters.trl)"
        )


def refuse_parts(config: RunConfig) -> None:
    """Refuse a policy, task or reward that is not there; nothing of the user's own code is run.

    Raises:
        HmpoError: one line that names it.
    """
    config = located(config)
    check_name(config.task)
    for spec in config.rewards.functions:
        check_spec(spec)
    if config.policy.path not in FETCHED:
        resolve_policy_path(config.policy.path)


def expanded(path: Path) -> Path:
    """The path with `~` as a home folder.

    Raises:
        ConfigError: there is no such user.
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path}: {str(error).rstrip('.')}") from None
