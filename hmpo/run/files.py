"""A run's folder: whether it may be used, what it keeps of the configuration, what is litter."""

import shutil
from pathlib import Path

from hmpo.config import RunConfig, to_dict
from hmpo.config.identity import changed_settings
from hmpo.config.reading import load_run_config, run_config
from hmpo.errors import ConfigError, RunFolderError
from hmpo.telemetry.secrets import mask_secrets


def check_folder(config: RunConfig, folder: Path, *, resume: bool, exist_ok: bool) -> None:
    """Refuse a folder that does not fit, before anything is read or written there.

    Raises:
        RunFolderError: it holds a run and this is no resume, or the other way round.
        ConfigError: the run in it was started with other settings that decide its numbers.
    """
    try:
        started = (folder / "config.json").is_file()
        remains = [n for n in ("checkpoints", "telemetry.jsonl") if (folder / n).exists()]
    except OSError as error:
        raise RunFolderError(
            f"{folder}: cannot be looked into ({error.strerror}); choose another `out`"
        ) from None
    if started and not resume:
        raise RunFolderError(
            f"{folder}: holds a run already; resume it with `hmpo train --resume {folder}`, or "
            "choose another name"
        )
    if remains and not started:
        raise RunFolderError(
            f"{folder}: holds {remains[0]} of a run but no config.json; put that back, or choose "
            "another name"
        )
    if resume and not started and not exist_ok:
        raise RunFolderError(f"{folder}: holds no run (no config.json); start it without --resume")
    if started:
        changed = changed_settings(load_run_config(folder / "config.json"), as_stored(config))
        if changed:
            raise ConfigError(
                f"{folder}: cannot be resumed with other settings, which would change its "
                f"numbers: {'; '.join(changed)}; leave them as they were, or start a new run"
            )


def as_stored(config: RunConfig) -> RunConfig:
    """The configuration as config.json keeps it: secrets masked."""
    plain = to_dict(config)
    return run_config(mask_secrets(plain) | {"name": config.name, "out": config.out})


def sweep(folder: Path) -> None:
    """Delete what killed processes left half-written in a folder that is ours alone."""
    for path in folder.glob(".policy-*"):
        shutil.rmtree(path)
    for name in ("config.json", "environment.json"):
        for path in folder.glob(f".{name}.tmp-*"):
            path.unlink()
