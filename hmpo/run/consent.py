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
from hmpo.rewards.library.options import ACTING, is_named
from hmpo.tasks.gym import PREFIX

OWN = "hmpo.tasks."
"""Modules of ours whose names need no consent: they make tasks, and run nothing that is named."""


def code_of(config: RunConfig, given: Collection[str] = ()) -> list[str]:
    """What a run's own settings name to be imported and called, apart from hmpo's own tasks.

    Args:
        config: the run's settings.
        given: dotted names of settings that the user gave, which are the user's own.
    """
    named = [spec for spec in config.rewards.functions if not _is_own(spec, config, {*given})]
    task = config.task.name
    if ":" in task and not task.startswith(PREFIX) and not {"task", "task.name"} & {*given}:
        named.append(task)
    environment = config.task.environment
    if environment and not {"task", "task.environment"} & {*given}:
        named.append(environment)
    return [spec for spec in named if not spec.startswith(OWN)]


def _is_own(spec: str, config: RunConfig, given: set[str]) -> bool:
    """Whether a reward function needs no consent: the user named it, or it can do no harm.

    Functions of the library run no code but ours. Those of `ACTING` run or send what a folder's
    options say, so that these must be the user's as well.
    """
    named = bool({"rewards", "rewards.functions"} & given)
    if not is_named(spec):
        return named
    options = config.rewards.options.get(spec, {})
    chosen = {"rewards", "rewards.options", f"rewards.options.{spec}"} & given
    return options.get("function", spec) not in ACTING or (named and bool(chosen or not options))


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
