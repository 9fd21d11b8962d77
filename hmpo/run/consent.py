"""Code that a run's folder names is run with consent only: the folder may be a stranger's.

`rewards.functions`, `task.name` and `task.environment` may name any attribute of any module,
`subprocess:Popen` too, and a folder's prompts would be its arguments. The user's own file or
command line is consent; a folder's config.json is not. No torch in here.
"""

import shlex
from collections.abc import Collection, Iterable
from pathlib import Path

from hmpo.config import RunConfig
from hmpo.errors import ConfigError
from hmpo.tasks.gym import PREFIX

OWN = "hmpo.tasks."
"""Modules of ours whose names need no consent: they make tasks, and run nothing that is named."""


def code_of(config: RunConfig, given: Collection[str] = ()) -> list[str]:
    """What a run's own settings name to be imported and called, apart from hmpo's own tasks.

    Args:
        config: the run's settings.
        given: dotted names of settings that the user gave, which are the user's own.
    """
    named = [] if {"rewards", "rewards.functions"} & {*given} else [*config.rewards.functions]
    task = config.task.name
    if ":" in task and not task.startswith(PREFIX) and not {"task", "task.name"} & {*given}:
        named.append(task)
    environment = config.task.environment
    if environment and not {"task", "task.environment"} & {*given}:
        named.append(environment)
    return [spec for spec in named if not spec.startswith(OWN)]


def resume_command(config: RunConfig, folder: Path) -> str:
    """The command that goes on with a run, consent included where it is needed."""
    consent = " --allow-code" if code_of(config) else ""
    return f"hmpo train --resume {shlex.quote(str(folder))}{consent}"


def refuse_code(folder: Path, specs: Iterable[str]) -> None:
    """Refuse to run what a folder names.

    Raises:
        ConfigError: one line that names it and how to allow it.
    """
    named = list(dict.fromkeys(specs))
    if named:
        raise ConfigError(
            f"{folder}: its settings name code that would run with your rights: "
            f"{', '.join(spec[:120] for spec in named[:4])}; if you trust it, add --allow-code"
        )
