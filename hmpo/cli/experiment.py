"""`hmpo experiment`: many runs, compared."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from hmpo.cli.arguments import AnyCount, AnyNumber, AnyPath, AnyText, Positional
from hmpo.cli.preflight import expanded, refuse_parts, refuse_several_processes
from hmpo.errors import ConfigError, HmpoError
from hmpo.lab.suite.cells import Cell
from hmpo.lab.suite.reading import Suite
from hmpo.lab.suite.watch import SuiteResult
from hmpo.telemetry.visible import writable

app = tyro.extras.SubcommandApp()

Only = Annotated[
    tuple[tuple[str, ...], ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(metavar="CELL|FACTOR=LEVEL,LEVEL ..."),
]
Runs = Sequence[tuple[Cell, int]]


@app.command
def run(
    suite: Positional[str],
    /,
    *,
    only: Only = (),
    seeds: AnyText = None,
    jobs: AnyCount = None,
    gpus: int = 0,
    on: AnyText = None,
    dry_run: bool = False,
    again: bool = False,
    sample: AnyCount = None,
    out: Path = Path("experiments"),
    quiet: bool = False,
) -> int:
    """Make the runs of a suite that have no outcome yet; stopped or killed, it goes on.

    Args:
        suite: TOML file, or `module:function` or `file.py:function` that returns the same.
        only: cells by name, or by levels such as `member=grpo,gspo regime=stale` (`role=main`).
        seeds: only these, such as 100-104,110.
        jobs: runs at once; by default as many as the cores hold.
        gpus: graphics cards to spread the runs over, one for each run.
        on: `ray` (a cluster on this machine) or `ray://HOST:PORT`: make the runs as tasks of Ray.
        dry_run: list the cells and what they will take, from one measured rollout, update and
            evaluation of each.
        again: make also the runs whose outcome is committed, and say whether the numbers are equal.
        sample: with --again, only so many of the committed ones, drawn by the suite's hash, under
            the OMP_NUM_THREADS and ATEN_CPU_CAPABILITY of this shell; their table is saved.
        out: folder that holds the suite's folder.
        quiet: only the result.
    """
    refuse_several_processes("a suite")
    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs: got {jobs}, expected an integer >= 1")
    if on is not None and (gpus or jobs is not None):
        raise ConfigError(f"--on {on}: Ray spreads the runs; leave --jobs and --gpus out")
    if dry_run and (on is not None or quiet):
        given = "--quiet" if on is None else f"--on {on}"
        raise ConfigError(f"{given}: --dry-run measures and tells on this machine; leave it out")
    from hmpo.lab.suite.reading import read_suite
    from hmpo.lab.suite.run import default_jobs
    from hmpo.lab.suite.selection import chosen_cells, chosen_runs, chosen_seeds

    whole = read_suite(suite)
    wanted = [item for group in only for item in group]
    cells = chosen_cells(whole.cells, wanted)
    runs = chosen_runs(cells, chosen_seeds(seeds))
    _check_cells(whole.cells)
    _refuse_missing_gpus(gpus)
    if sample is not None:
        runs = _drawn(whole, runs, expanded(out), sample, again=again)
    at_once = 1 if on is not None else jobs or gpus or default_jobs([cell for cell, _ in runs])
    if dry_run:
        return _dry_run(whole, runs, at_once, expanded(out), again=again)
    result = _run(whole, runs, at_once, gpus, on, expanded(out), again=again, quiet=quiet)
    if sample is not None:
        _save_again(whole, result, expanded(out))
    return 0 if result.signal is None else 128 + result.signal


@app.command
def report(
    suite: Positional[str],
    /,
    *,
    out: Path = Path("experiments"),
    into: AnyPath = None,
    save_outcomes: AnyPath = None,
) -> int:
    """Write a suite's page, tables, figures and Markdown, finished or not; say what it found.

    Args:
        suite: as for `run`, or the suite's folder.
        out: folder that holds the suite's folder.
        into: folder for what is written; by default the suite's.
        save_outcomes: also write all outcomes into this file (.jsonl or .jsonl.gz), which a suite
            may name in `outcomes`.
    """
    from hmpo.cli import experiment_after

    return experiment_after.report(suite, expanded(out), _expanded(into), _expanded(save_outcomes))


@app.command
def compare(one: Positional[Path], other: Positional[Path], /) -> int:
    """Set two cells against each other, seed by seed: difference, interval, settings that differ.

    Args:
        one: folder of a cell, with a run's folder for each seed, or of one run.
        other: the same.
    """
    from hmpo.lab.study.compare import compare

    print(compare(expanded(one), expanded(other)).text())
    return 0


@app.command
def probe(
    target: Positional[Path],
    /,
    *,
    exponents: tuple[float, ...] = (),
    clip: AnyNumber = None,
    updates: AnyCount = None,
    json: AnyPath = None,
    out: AnyPath = None,
    allow_code: bool = False,
) -> int:
    """Say whether p can matter in a run, from one rollout under every exponent and member.

    Args:
        target: a run's folder, or a recorded batch (.safetensors).
        exponents: to compare; by default -2, -1, -0.5, 0, 0.5, 1, 2.
        clip: half-width (nat) of the token clip that they share; by default 0.4.
        updates: of the whole run that a recorded batch is of, where its facts do not tell.
        json: file for everything.
        out: folder for the heat maps, probe.svg and probe.png.
        allow_code: run the code that a run's folder names.
    """
    from hmpo.lab.probe.command import run_probe
    from hmpo.lab.probe.variants import CLIP, EXPONENTS

    return run_probe(
        expanded(target),
        exponents=exponents or EXPONENTS,
        clip=CLIP if clip is None else clip,
        updates=updates,
        json_file=_expanded(json),
        out=_expanded(out),
        allow_code=allow_code,
    )


@app.command
def power(
    suite: Positional[str],
    /,
    *,
    difference: AnyNumber = None,
    seeds: AnyCount = None,
    out: Path = Path("experiments"),
) -> int:
    """Say how many seeds each comparison needs, from the differences that a pilot has shown.

    Args:
        suite: as for `run`, or the suite's folder; two shared seeds at least must have ended.
        difference: of success that matters, such as 0.02; by default the protocol's smallest.
        seeds: say what this many seeds can see; by default those there are.
        out: folder that holds the suite's folder.
    """
    from hmpo.cli import experiment_after

    return experiment_after.power(suite, expanded(out), difference, seeds)


def _expanded(path: Path | None) -> Path | None:
    return None if path is None else expanded(path)


def _check_cells(cells: Sequence[Cell]) -> None:
    """Refuse a policy, task or reward that is not there, and settings that nothing reads.

    Raises:
        ConfigError: one line that names the cell.
    """
    for cell in cells:
        try:
            refuse_parts(cell.config, fresh=True)
        except HmpoError as error:
            raise ConfigError(f"cell {cell.name}: {error}") from None


def _run(
    suite: Suite,
    runs: Runs,
    jobs: int,
    gpus: int,
    on: str | None,
    out: Path,
    *,
    again: bool,
    quiet: bool,
) -> SuiteResult:
    """Make the runs and say what they came to."""
    from hmpo.cli.suite_screen import SuiteScreen, result_lines
    from hmpo.lab.suite.run import local, run_suite

    maker = local(jobs, gpus)
    if on is not None:
        from hmpo.lab.suite.on_ray import on_ray

        maker = on_ray(on)
    with SuiteScreen(suite.name, quiet=quiet) as screen:
        if suite.outcomes is not None and not suite.outcomes.exists() and not quiet:
            screen.say(f"hmpo: {suite.outcomes}: no outcomes are committed there yet")
        result = run_suite(
            suite,
            runs=runs,
            out=out,
            jobs=jobs,
            maker=maker,
            again=again,
            keeps=on is None,
            watcher=screen,
        )
    command = shlex.join(["hmpo", *sys.argv[1:]])
    for line in result_lines(result, suite.name, command):
        screen.say(line)
    if result.problem:
        raise ConfigError(f"{result.problem}; mend that and give the same command again")
    return result


def _drawn(suite: Suite, runs: Runs, out: Path, count: int, *, again: bool) -> Runs:
    """The committed runs that `--sample` takes.

    Raises:
        ConfigError: without --again, or the folder holds the committed runs themselves.
    """
    from hmpo.lab.suite.again import (
        again_file,
        drawn,
        refuse_committed_runs,
        refuse_other_suite,
    )
    from hmpo.lab.suite.folder import SuiteFolder
    from hmpo.lab.suite.run import committed_outcomes

    if not again:
        raise ConfigError(f"--sample {count}: only --again reads it; give both")
    place = SuiteFolder(suite, out)
    committed = committed_outcomes(suite, place)
    chosen = drawn(suite, runs, committed, count)
    refuse_committed_runs(place, chosen, committed)
    refuse_other_suite(again_file(suite), suite)
    return chosen


def _save_again(suite: Suite, result: SuiteResult, out: Path) -> None:
    """Show and save what the runs made again came to."""
    from hmpo.lab.suite.again import again_file, save_again, table_lines, table_of
    from hmpo.lab.suite.folder import SuiteFolder
    from hmpo.lab.suite.run import committed_outcomes

    rows = table_of(suite, committed_outcomes(suite, SuiteFolder(suite, out)), result.outcomes)
    path = again_file(suite)
    if rows:
        save_again(path, suite, rows)
    for line in [*table_lines(rows), f"saved: {path}"] if rows else []:
        print(writable(line))


def _dry_run(suite: Suite, runs: Runs, jobs: int, out: Path, *, again: bool) -> int:
    """Say what would be run and how long it would take."""
    from hmpo.cli.suite_screen import duration
    from hmpo.lab.suite.predict import predict
    from hmpo.lab.suite.run import runs_left

    left = runs_left(suite, runs, out, again=again)
    names = list(dict.fromkeys(cell.name for cell, _ in runs))
    count = {name: sum(cell.name == name for cell, _ in left) for name in names}
    of = {name: sum(cell.name == name for cell, _ in runs) for name in names}
    print(f"suite {suite.name}: {len(names)} cells, {len(left)} of {len(runs)} runs to make")

    def told(name: str, seconds: float) -> None:
        each = f"{duration(seconds)} each, {duration(seconds * count[name])} in all"
        print(f"{name}: {count[name]} of {of[name]} runs, {each}", flush=True)

    for name in names:
        if not count[name]:
            print(f"{name}: 0 of {of[name]} runs")
    prediction = predict(left, jobs, told)
    for name, problem in prediction.problems.items():
        print(f"{name}: cannot be measured, its runs will fail: {problem}")
    print(f"in all about {duration(prediction.total)} with {jobs} at once")
    return 0


def _refuse_missing_gpus(gpus: int) -> None:
    """Refuse more graphics cards than there are.

    Raises:
        ConfigError: one line.
    """
    if gpus < 0:
        raise ConfigError(f"--gpus: got {gpus}, expected an integer >= 0")
    if gpus:
        import torch

        found = torch.cuda.device_count()
        if gpus > found:
            raise ConfigError(f"--gpus: got {gpus}, torch sees {found} here; leave it out")
