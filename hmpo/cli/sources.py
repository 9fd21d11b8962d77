"""Settings that come out of a run's folder: to go on with it, or to start another from it."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from hmpo.cli.preflight import expanded
from hmpo.config import RunConfig
from hmpo.config.overrides import overridden
from hmpo.config.places import BUNDLED
from hmpo.config.reading import load_run_config, read_tables, run_config
from hmpo.errors import ConfigError, RunFolderError
from hmpo.models.paths import is_hub_name
from hmpo.run.consent import code_of, refuse_code
from hmpo.run.folder import refuse_foreign, renamed
from hmpo.run.masked import refuse_masked
from hmpo.run.place import found_place, split_place
from hmpo.run.source import kept_commits

READ_TABLES = ("policy", "task", "rewards")
"""Tables of which an evaluation reads everything."""
READ = (
    "seed",
    "device",
    "threads",
    "eval.batch_size",
    "eval.success",
    "trainer.max_length",
    "trainer.temperature",
    "trainer.decoder",
    "trainer.autocast",
    "trainer.on_reward_error",
    "trainer.reward_timeout",
)
"""What else it reads."""
INSTEAD = {
    "eval.prompts": "--prompts",
    "eval.final_prompts": "--prompts",
    "eval.pass_at": "--pass-at",
}


def asked_run(
    config: Path | None,
    settings: list[str],
    resume: Path | None,
    start: str | None,
    overwrite: bool,
    allow_code: bool,
) -> RunConfig:
    """The settings of the run that `hmpo train` was asked for.

    Raises:
        HmpoError: one line.
    """
    if resume is not None:
        if config is not None or start is not None or overwrite:
            raise ConfigError(
                "train: --resume RUN goes on as the run began; give a TOML file, --from or "
                "--overwrite without it (one of the two)"
            )
        return resumed_run(expanded(resume), settings, allow_code=allow_code)
    if start is not None:
        file = None if config is None else expanded(config)
        return new_run(start, file, settings, allow_code=allow_code)
    if config is None:
        hint = _lost(settings)
        raise ConfigError(
            f"train: give a TOML file, or --resume RUN (one of the two), or --from RUN{hint}"
        )
    return load_run_config(config, settings)


def _lost(settings: list[str]) -> str:
    """A hint where `--set` swallowed the file."""
    swallowed = [item for item in settings if "=" not in item]
    return f"; put {swallowed[0]} before --set" if swallowed else ""


def resumed_run(folder: Path, settings: Sequence[str], *, allow_code: bool) -> RunConfig:
    """The configuration of the run in a folder, which may have been moved or renamed.

    Raises:
        RunFolderError: it holds no run.
        ConfigError: a setting is wrong or decided by the folder, or names code that is not
            allowed.
    """
    for name in sorted({"name", "out"} & overridden(settings)):
        raise ConfigError(f"--set {name}: the folder behind --resume decides it; rename that")
    if folder.name in ("", ".."):
        folder = folder.resolve()
    refuse_foreign(folder)
    refuse_no_run(folder)
    return renamed(_own_settings(folder, settings, allow_code=allow_code), folder)


def _own_settings(folder: Path, settings: Sequence[str], *, allow_code: bool) -> RunConfig:
    """A run's own configuration under overrides.

    Raises:
        ConfigError: it is wrong, or names code, and `allow_code` does not allow it.
    """
    config = load_run_config(folder / "config.json", settings)
    refuse_masked(config, folder)
    if not allow_code:
        refuse_code(folder, code_of(config, overridden(settings)))
    return config


def new_run(
    start: str, file: Path | None, settings: Sequence[str], *, allow_code: bool
) -> RunConfig:
    """The configuration of a new run that begins with the weights of another one's checkpoint.

    Args:
        start: `RUN` or `RUN@STEP`.
        file: its settings; None takes those of the other run, with a name that is free beside it.
        settings: overrides.
        allow_code: run the code that the other run's own settings name.

    Raises:
        HmpoError: no such run or checkpoint, or a setting is wrong.
    """
    refuse_no_run(split_place(start)[0])
    if "policy.start" in overridden(settings):
        raise ConfigError(f"--set policy.start: --from {start} decides it; give one of the two")
    run, step = found_place(start)
    refuse_foreign(run)
    if file is not None:
        config = load_run_config(file, settings)
    else:
        config = _own_settings(run, settings, allow_code=allow_code)
        given = overridden(settings)
        out = config.out if "out" in given else str(run.parent)
        name = config.name if "name" in given else free_name(Path(out), run.name)
        config = dataclasses.replace(config, out=out, name=name)
    config = kept_commits(config, run)
    policy = dataclasses.replace(config.policy, start=f"{run}@{step}")
    return dataclasses.replace(config, policy=policy)


def measured_run(
    target: Path, task: str | None, settings: Sequence[str], *, allow_code: bool
) -> RunConfig | None:
    """The configuration of a run that is to be measured; None where the target is a model.

    Raises:
        HmpoError: it is neither, or of another trainer, or a setting is wrong.
    """
    if str(target) in BUNDLED or is_hub_name(target.as_posix()):
        return None
    if not target.exists():
        raise RunFolderError(f"{target}: no such run or model folder; give one that is there")
    if not target.is_dir():
        raise RunFolderError(f"{target}: is a file; give a run's folder, or a model's with --task")
    if any(os.path.lexists(target / name) for name in ("telemetry.jsonl", "checkpoints")):
        refuse_foreign(target)  # a model's folder may be one of links, as in a hub's cache
    if is_model(target):
        return None
    if not (target / "config.json").is_file():
        models = [path for path in sorted(target.iterdir()) if path.is_dir() and is_model(path)]
        what = "holds neither a run (no config.json) nor a model"
        if _of_another_trainer(target):
            what = "is a run of another trainer, such as TRL"
        hint = f"its model {models[-1]}" if models else "a model's folder"
        raise RunFolderError(f"{target}: {what}; measure {hint} with --task NAME")
    if task is not None:
        own = load_run_config(target / "config.json", settings).task.name
        name = "task.name" if task == own else "task"
        value = json.dumps(task) if task == own else f"{{name = {json.dumps(task)}}}"
        settings = [f"{name}={value}", *settings]
    return _own_settings(target, settings, allow_code=allow_code)


def measured_model(target: Path, task: str | None, settings: Sequence[str]) -> RunConfig:
    """The configuration under which a model is measured on a task.

    Raises:
        ConfigError: no task is named.
    """
    given = overridden(settings)
    if task is None and not given & {"task", "task.name"}:
        raise ConfigError(f"{target}: is a model, not a run; say what to measure with --task NAME")
    named = [] if task is None else [f"task.name={json.dumps(task)}"]
    path = target.as_posix() if is_hub_name(target.as_posix()) else str(target)
    return run_config({"policy": {"path": path}}, [*named, *settings])


def refuse_unread(settings: Sequence[str], run: Path | None, task: str | None) -> None:
    """Refuse what an evaluation does not read.

    Args:
        settings: overrides.
        run: the run that is measured; None for a model.
        task: that of `--task`, if it is given.

    Raises:
        ConfigError: one line that names the setting.
    """
    for name in sorted(overridden(settings)):
        if name in ("policy", "policy.path") and run is None:
            raise ConfigError(f"--set {name}: the model is the argument; give it alone")
        if name in ("task", "task.name") and task is not None:
            raise ConfigError(f"--task: got {task!r} beside --set {name}; give one of the two")
        read = name in READ or name.partition(".")[0] in READ_TABLES
        if not read or name == "policy.start":
            remedy = f"give {INSTEAD[name]}" if name in INSTEAD else "leave it out"
            raise ConfigError(f"--set {name[:80]}: hmpo eval does not read it; {remedy}")


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model (or adapters) in Hugging Face's layout."""
    if (folder / "adapter_config.json").is_file():
        return True
    try:
        data = read_tables(folder / "config.json")
    except ConfigError:
        return False
    return isinstance(data, dict) and "model_type" in data


def _of_another_trainer(folder: Path) -> bool:
    """Whether a folder without settings of ours holds a log or state of a training."""
    names = ("trainer_state.json", "telemetry.jsonl", "training_args.bin")
    return any((folder / name).is_file() for name in names) or any(folder.glob("checkpoint-*"))


def refuse_no_run(folder: Path) -> None:
    """Refuse a folder that holds no run, and say what it holds instead.

    Raises:
        RunFolderError: one line.
    """
    if is_model(folder):
        raise RunFolderError(
            f"{folder}: is a model's folder, not a run's; train it from a file with "
            f"--set policy.path={folder}"
        )
    if not (folder / "config.json").is_file():
        run, step = split_place(str(folder))
        if step is not None and run.is_dir():
            raise RunFolderError(
                f"{folder}: names a checkpoint, expected a run; give {run} (`hmpo export` takes "
                f"--step {step})"
            )
        what = (
            "holds no run (no config.json)" if folder.is_dir() else "holds no run (no such folder)"
        )
        if _of_another_trainer(folder):
            what = "is a run of another trainer, such as TRL, which resumes it by itself"
        raise RunFolderError(f"{folder}: {what}; start it from a file")


def free_name(out: Path, name: str) -> str:
    """`name-2`, or the first of `name-3`, `name-4`, ... that is not taken in a folder."""
    taken = (f"{name[:90]}-{i}" for i in range(2, 100_000))
    return next(free for free in taken if not (out / free).exists())
