"""What can be refused before anything heavy is imported: mistakes cost no five seconds of torch."""

import contextlib
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hmpo.config import RunConfig, TaskConfig
from hmpo.config.advantages import refuse_unread_advantages
from hmpo.config.places import is_path_name, located
from hmpo.config.unread import refuse_unread_mismatch, refuse_unread_objective
from hmpo.config.unread_run import refuse_unread_run
from hmpo.errors import ConfigError, require, require_installed
from hmpo.models.paths import is_hub_name, resolve_policy_path
from hmpo.ranks.launched import launched
from hmpo.rewards.loading import check_spec
from hmpo.rewards.parameters import OF_ENVIRONMENT
from hmpo.run.source import kept_commits
from hmpo.tasks import BUILT_IN, check_name, make_task
from hmpo.telemetry.secrets import mask_credentials

COMMANDS = (
    "agm",
    "demo",
    "init",
    "train",
    "eval",
    "export",
    "report",
    "experiment",
    "fetch-model",
    "doctor",
)
FETCHED = ("smollm2",)
"""Policies whose own loading says how to get them."""
LARGE = 2**26
"""Bytes of a file of prompts that is read once only."""
INNER = {
    "agm": ("replay", "summarize", "plot", "sweep", "diff"),
    "experiment": ("run", "report", "compare", "probe", "power"),
}
"""Commands that have commands of their own."""


def refuse_unknown_command(arguments: Sequence[str]) -> None:
    """Refuse a command that does not exist, in one line with the nearest one.

    Raises:
        ConfigError: it does not exist.
    """
    known, words = COMMANDS, list(arguments)
    if words and words[0] in INNER:
        known, words = INNER[words[0]], words[1:]
    if not words or words[0].startswith("-") or words[0] in known:
        return
    close = difflib.get_close_matches(words[0], known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(known)}"
    raise ConfigError(f"{words[0]}: no such command; {hint}")


def refuse_several_processes(what: str) -> None:
    """Refuse to be one of several processes, each of which would do the same alone.

    Args:
        what: cannot be shared.

    Raises:
        ConfigError: a launcher such as torchrun has set WORLD_SIZE above 1.
    """
    if size := launched():
        raise ConfigError(
            f"WORLD_SIZE = {size}: {what} is made by one process; start it without torchrun"
        )


def refuse_ranks(count: int | None, device: str) -> None:
    """Refuse a number of ranks that this machine, or the launch, cannot give.

    Args:
        count: `--ranks`; None without it.
        device: cpu, cuda or auto.

    Raises:
        ConfigError: one line.
    """
    if count is None:
        return
    require(count >= 1, "--ranks", count, "an integer >= 1")
    require(
        launched() in (0, count), "--ranks", count, f"the {launched()} that torchrun has started"
    )
    if device == "cpu" or count == 1:
        return
    named = "auto, cpu or cuda with --ranks: each takes the GPU of its own number"
    require(device in ("auto", "cuda"), "device", device, named)
    import torch

    gpus = torch.cuda.device_count()
    if device == "auto" and not gpus:
        return
    what = 'one GPU for each, or device = "cpu"'
    require(count <= gpus, "--ranks", count, f"at most {gpus} ({what})")


def refuse_parts(config: RunConfig, *, fresh: bool, run: Path | None = None) -> None:
    """Refuse a policy, task or reward that is not there; nothing of the user's own code is run.

    Args:
        config: the run.
        fresh: a new run, whose settings must all be read.
        run: its folder where it has begun, which keeps what its policy is.

    Raises:
        HmpoError: one line that names it.
    """
    if fresh:
        refuse_unread_run(config)
        if config.algorithm != "gspo":
            refuse_unread_objective(config.objective)
            refuse_unread_mismatch(config.mismatch)
            refuse_unread_advantages(config.advantages, config.trainer.advantage_scale)
    if config.optimizer.name == "adamw8bit":
        require_installed("bitsandbytes", 'optimizer.name = "adamw8bit"', "quant")
    config = located(config)
    check_name(config.task)
    columns = None
    if config.task.name in BUILT_IN and not _is_large(config.task):
        columns = [*make_task(config.task, config.seed).train(0).columns]
        columns += [OF_ENVIRONMENT] if config.task.environment else []
    for spec in config.rewards.functions:
        options = config.rewards.options.get(spec, {})
        _refuse_credentials(spec, options)
        check_spec(spec, options, columns)
    policy = (config if run is None else kept_commits(config, run)).policy
    if policy.path not in FETCHED and not is_hub_name(policy.path, policy.revision):
        resolve_policy_path(policy.path, policy.revision)


def _refuse_credentials(function: str, options: Mapping[str, Any]) -> None:
    """Refuse a credential among a reward's options, which are written into the run's folder."""
    for name, value in options.items():
        if isinstance(value, str) and not is_path_name(name) and mask_credentials(value) != value:
            raise ConfigError(
                f"rewards.options.{function}.{name}: holds what looks like a credential; the run's "
                "folder would keep it, so put it into the environment"
            )


def expanded(path: Path) -> Path:
    """The path with `~` as a home folder.

    Raises:
        ConfigError: there is no such user, or the path cannot be looked for.
    """
    try:
        whole = path.expanduser()
        whole.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a folder that is closed
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        shown = str(path) if len(str(path)) <= 100 else f"{str(path)[:100]}..."
        raise ConfigError(f"{shown}: {reason}; give another path") from None
    return whole


def _is_large(task: TaskConfig) -> bool:
    """Whether reading the prompts twice would be felt."""
    if task.options.get("dataset"):
        return True
    size = 0
    for name in ("path", "train", "held_out"):
        value = task.options.get(name, "")
        for text in value if isinstance(value, list) else [value]:
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                size += Path(str(text)).expanduser().stat().st_size
    return size > LARGE
