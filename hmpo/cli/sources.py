"""Settings that come out of a run's folder: to go on with it, or to start another from it."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from hmpo.config import RunConfig
from hmpo.config.overrides import overridden
from hmpo.config.reading import load_run_config
from hmpo.errors import ConfigError, RunFolderError
from hmpo.run.place import found_place


def resumed_run(folder: Path, settings: Sequence[str]) -> RunConfig:
    """The configuration of the run in a folder, which may have been moved or renamed.

    Raises:
        RunFolderError: it holds no run.
        ConfigError: a setting is wrong, or decided by the folder.
    """
    for name in sorted({"name", "out"} & overridden(settings)):
        raise ConfigError(f"--set {name}: the folder behind --resume decides it; rename that")
    if folder.name in ("", ".."):
        folder = folder.resolve()
    refuse_no_run(folder)
    config = load_run_config(folder / "config.json", settings)
    return dataclasses.replace(config, out=str(folder.parent), name=folder.name)


def new_run(start: str, file: Path | None, settings: Sequence[str]) -> RunConfig:
    """The configuration of a new run that begins with the weights of another one's checkpoint.

    Args:
        start: `RUN` or `RUN@STEP`.
        file: its settings; None takes those of the other run, with a name that is free beside it.
        settings: overrides.

    Raises:
        HmpoError: no such run or checkpoint, or a setting is wrong.
    """
    if "policy.start" in overridden(settings):
        raise ConfigError(f"--set policy.start: --from {start} decides it; give one of the two")
    run, step = found_place(start)
    if file is not None:
        config = load_run_config(file, settings)
    else:
        refuse_no_run(run)
        config = load_run_config(run / "config.json", settings)
        given = overridden(settings)
        out = config.out if "out" in given else str(run.parent)
        name = config.name if "name" in given else free_name(Path(out), run.name)
        config = dataclasses.replace(config, out=out, name=name)
    policy = dataclasses.replace(config.policy, start=f"{run}@{step}")
    return dataclasses.replace(config, policy=policy)


def refuse_no_run(folder: Path) -> None:
    """Refuse a folder that holds no run, and say what it holds instead.

    Raises:
        RunFolderError: one line.
    """
    if not (folder / "config.json").is_file():
        what = "holds no run (no config.json)" if folder.is_dir() else "holds no run (no folder)"
        if (folder / "trainer_state.json").is_file() or (folder / "telemetry.jsonl").is_file():
            what = "holds a run of another trainer, such as TRL, which resumes it by itself"
        raise RunFolderError(f"{folder}: {what}; start it from a file")
    try:
        data = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return  # reading it as settings says what is wrong
    if isinstance(data, dict) and "model_type" in data:
        raise RunFolderError(
            f"{folder}: is a model's folder, not a run's; train it from a file with "
            f"--set policy.path={folder}"
        )


def free_name(out: Path, name: str) -> str:
    """`name-2`, or the first of `name-3`, `name-4`, ... that is not taken in a folder."""
    taken = (f"{name[:90]}-{i}" for i in range(2, 100_000))
    return next(free for free in taken if not (out / free).exists())
