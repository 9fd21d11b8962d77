"""`hmpo agm`: the controllers over recorded runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from hmpo.cli.arguments import AnyCount, AnyPath, AnyText, Positional
from hmpo.cli.preflight import expanded
from hmpo.errors import ConfigError
from hmpo.telemetry.visible import writable

app = tyro.extras.SubcommandApp()

Grid = Annotated[
    tuple[tuple[str, ...], ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(metavar="KEY=VALUE,VALUE ..."),
]


@app.command
def replay(
    run: Positional[Path],
    /,
    *,
    config: AnyPath = None,
    out: AnyPath = None,
    adapter: AnyText = None,
    until: AnyCount = None,
    state_in: AnyPath = None,
    state_out: AnyPath = None,
    strict: bool = False,
    compare: bool = False,
) -> int:
    """Let the controllers decide on every record of a run or of any log.

    Args:
        run: a run's folder, or a log: JSON lines, CSV, gzipped or not, or TRL's trainer_state.json.
        config: TOML or JSON file with an [agm] table; by default the run's own.
        out: file for the decisions, replaced at once.
        adapter: hmpo, hmpo-legacy, agm-payload, trl or verl; by default the log tells.
        until: last step.
        state_in: go on from a state that --state-out wrote, after the records it has seen.
        state_out: file for the state of the controllers after the last record.
        strict: stop at the first malformed line instead of counting it.
        compare: exit 1 at the first difference from the decisions in the log.
    """
    from hmpo.lab.decisions import summarize_decisions
    from hmpo.lab.replay import first_difference, load_source, replay_file

    if compare and (until is not None or state_in is not None):
        raise ConfigError("replay: --compare needs the whole log; leave --until, --state-in out")
    source = load_source(expanded(run), _expanded(config), adapter, strict)
    decisions = replay_file(
        source,
        out=_expanded(out),
        until=until,
        state_in=_expanded(state_in),
        state_out=_expanded(state_out),
    )
    _show_source(source)
    if compare:
        difference = first_difference(source, decisions)
        same = f"equal to the {len(decisions)} decisions in the log"
        _say(same if difference is None else f"differs at {difference}")
        return 0 if difference is None else 1
    _show(summarize_decisions(decisions))
    return 0


@app.command
def summarize(run: Positional[Path], /, *, adapter: AnyText = None) -> int:
    """Count the decisions in a log: regimes, phases, actions, how long they last, stops.

    Args:
        run: a run's folder or a log; without decisions in it, those of a replay.
        adapter: kind of log; by default the log tells.
    """
    from hmpo.lab.decisions import summarize_decisions

    source, decisions = _decided(run, adapter)
    _show_source(source)
    _show(summarize_decisions(decisions))
    return 0


@app.command
def plot(run: Positional[Path], /, *, out: AnyPath = None, adapter: AnyText = None) -> int:
    """Draw the decisions over time: reward, gap and target, regime, phase, lr, p and level.

    Args:
        run: a run's folder or a log; without decisions in it, those of a replay.
        out: PNG file; by default plots/decisions.png in the run's folder, or beside the log.
        adapter: kind of log; by default the log tells.
    """
    from hmpo.checkpoint import write_atomic
    from hmpo.lab.timeline import render_timeline

    run, out = expanded(run), _expanded(out)
    source, decisions = _decided(run, adapter)
    if out is None:
        out = run / "plots" / "decisions.png" if run.is_dir() else run.with_suffix(".png")
    write_atomic(out, render_timeline(source, decisions, run.resolve().name), make_folder=True)
    _say(f"plot: {out}")
    return 0


@app.command
def sweep(
    run: Positional[Path],
    /,
    *,
    grid: Grid,
    out: AnyPath = None,
    config: AnyPath = None,
    adapter: AnyText = None,
) -> int:
    """Replay a run under every combination of settings, one line each.

    Args:
        run: a run's folder or a log.
        grid: settings of [agm] with their values, such as `adapter.gap_target=1e-3,4e-3`.
        out: CSV file for the lines.
        config: TOML or JSON file with an [agm] table; by default the run's own.
        adapter: kind of log; by default the log tells.
    """
    from hmpo.checkpoint import write_atomic
    from hmpo.lab.decisions import sweep_row
    from hmpo.lab.replay import grid_of, load_source, sweep
    from hmpo.telemetry.csvlog import table_csv

    source = load_source(expanded(run), _expanded(config), adapter)
    _show_source(source)
    choices = [item for group in grid for item in group]
    rows = [
        {**changes, **sweep_row(outcome)} for changes, outcome in sweep(source, grid_of(choices))
    ]
    text = table_csv(rows[0], (row.values() for row in rows))
    _say(text.removesuffix("\n"))
    if out is not None:
        write_atomic(expanded(out), text, make_folder=True)
    return 0


@app.command
def diff(first: Positional[Path], second: Positional[Path], /, *, lines: int = 10) -> int:
    """Compare the decisions of two runs, or of a run and a replay; exit 1 where they differ.

    Args:
        first: a run's folder, a log, or what `replay --out` wrote.
        second: the other.
        lines: differing decisions that are shown; the rest is counted.
    """
    from hmpo.lab.decisions import compare_decisions

    differences, fields = compare_decisions(_decided(first, None)[1], _decided(second, None)[1])
    _say("\n".join(differences[:lines]) if differences else "no difference")
    if differences:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(fields.items()))
        _say(f"{len(differences)} decisions differ: {counts or 'present in one only'}")
    return 1 if differences else 0


def _expanded(path: Path | None) -> Path | None:
    return None if path is None else expanded(path)


def _decided(run: Path, adapter: str | None) -> tuple[Any, list[dict[str, Any]]]:
    """A log and the decisions in it; where it holds none, those of a replay."""
    from hmpo.lab.replay import load_source, replay_file

    source = load_source(expanded(run), adapter=adapter)
    if source.log.decisions:
        return source, list(source.log.decisions)
    print("no decisions in the log; these are of a replay")
    return source, replay_file(source)


def _show_source(source: Any) -> None:
    """What the log is, where it is not simply ours."""
    log = source.log
    if log.adapter != "hmpo":
        estimated = sum(record.get("approx") is True for record in log.steps)
        _say(f"{source.path}: {log.adapter}, {estimated} of {len(log.steps)} gaps approximate")
    if not log.steps and not log.evals:
        _say(f"{source.path}: no updates and no evaluations, nothing to decide on")
    for note in log.notes:
        _say(f"note: {note}")
    for problem in log.problems:
        if problem.kind == "malformed":
            _say(f"malformed: line {problem.line}: {problem.message}")


def _show(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    _say("\n".join(f"{name:{width}}  {text}" for name, text in rows))


def _say(text: str) -> None:
    """Print what a log may have written: no character of it steers the terminal."""
    print(writable(text))
