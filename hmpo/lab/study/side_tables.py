"""T2, T3, T5, T6: risk, stability, controllers, cost."""

from collections.abc import Sequence
from typing import Any

from hmpo.lab.study.analysis import Study
from hmpo.lab.study.grid_tables import setting
from hmpo.lab.study.main_table import (
    COMPARISON,
    SHOWN,
    average,
    compared,
    count_of,
    identity,
    identity_columns,
    numbers,
    rows_in_order,
)
from hmpo.lab.study.plan import Cell
from hmpo.lab.study.tabular import (
    EMPTY,
    Column,
    Item,
    Table,
    digits,
    estimate,
    plain,
    rows_of,
    share,
    whole,
    word,
)

RISK = (
    ("adv_var", "advantage variance"),
    ("ratio_sd", "ratio sd"),
    ("clip_frac_pos", "clipped, A > 0"),
    ("clip_frac_neg", "clipped, A < 0"),
    ("clip_low_share", "below, of clipped"),
    ("kl3_mean", "KL, k3"),
    ("g_mean", "log gap"),
    ("ess_mean", "ESS, tokens"),
    ("sigma", "sigma"),
    ("sigma_sqrt_l", "sigma sqrt L"),
    ("length_mean", "length"),
)
"""Columns of T2 that are means over updates, by their names in an outcome."""


def risk_table(study: Study) -> Table | None:
    """T2; None where no run logged any of it."""
    columns = (
        *identity_columns(study),
        Column("seeds", "seeds"),
        *(Column(name, label) for name, label in RISK),
        Column("ratio_min", "smallest ratio"),
        Column("ratio_max", "largest ratio"),
    )
    rows = []
    for cell in rows_in_order(study):
        runs = study.runs[cell.name]
        row = {**identity(study, cell), "seeds": whole(len(runs))}
        row |= {name: _mean(study, cell, name) for name, _ in RISK}
        for name, how in (("ratio_min", min), ("ratio_max", max)):
            values = numbers(runs, name)
            row[name] = plain(how(values)) if values else EMPTY
        rows.append(row)
    note = (
        "Means over a run's updates, then over seeds with Student's interval; the smallest and the "
        "largest ratio of all updates and seeds are extremes and have none."
    )
    table = Table("T2", "Risk profile", note, columns, rows_of(columns, rows)).shown()
    return table if {column.key for column in table.columns} & {name for name, _ in RISK} else None


def _mean(study: Study, cell: Cell, name: str) -> Item:
    values = numbers(study.runs[cell.name], name)
    return estimate(average(values, study)) if values else EMPTY


def stability_table(study: Study) -> Table:
    """T3."""
    columns = (
        *identity_columns(study),
        Column("seeds", "seeds"),
        Column("max_qk", "max QK, mean"),
        Column("max_qk_all", "max QK of all"),
        Column("qk_clip_share", "updates clipped"),
        Column("nonfinite", "non-finite"),
        Column("skipped", "skipped updates"),
        Column("diverged", "diverged"),
        Column("collapsed", "collapsed"),
        Column("failed", "failed"),
    )
    rows = []
    for cell in rows_in_order(study):
        runs = study.runs[cell.name]
        largest = numbers(runs, "max_qk")
        row = {
            **identity(study, cell),
            "seeds": whole(len(runs)),
            "max_qk": _mean(study, cell, "max_qk"),
            "max_qk_all": plain(max(largest)) if largest else EMPTY,
            "qk_clip_share": _mean(study, cell, "qk_clip_share"),
            "diverged": count_of(sum(run.score.diverged for run in runs.values()), len(runs)),
            "collapsed": count_of(sum(run.score.collapsed for run in runs.values()), len(runs)),
            "failed": count_of(sum(run.score.failed for run in runs.values()), len(runs)),
        }
        for name in ("nonfinite", "skipped"):
            values = numbers(runs, name)
            row[name] = whole(round(sum(values))) if values else EMPTY
        rows.append(row)
    note = (
        "Non-finite tensors and skipped updates are sums over seeds. A run diverged if its mean "
        "log gap reached 1 nat or its last success was below half of its best; it collapsed if it "
        "failed, ended below half of its best, or below its start by more than chance. Shares "
        "have Wilson's interval."
    )
    return Table("T3", "Stability", note, columns, rows_of(columns, rows)).shown()


def controller_table(study: Study) -> Table | None:
    """T5: cells with controllers off, advising and applying; None where none differ in that."""
    modes = {cell.name: _mode(cell) for cell in study.cells(*SHOWN)}
    if len(set(modes.values())) < 2:
        return None
    columns = (
        *identity_columns(study),
        Column("mode", "controllers", numeric=False),
        *COMPARISON,
        Column("stopped", "stopped early"),
        Column("identical", "identical to off", title="runs whose curves equal those with off"),
    )
    rows = []
    matched = _matched(study, modes)
    for cell in rows_in_order(study):
        if matched and cell.name not in matched:
            continue
        runs = study.runs[cell.name]
        contrast = next((c for c in (*study.contrasts, *study.others) if c.cell == cell.name), None)
        row = {
            **identity(study, cell),
            "mode": word(modes[cell.name]),
            "seeds": whole(len(runs)),
            "success": _success(study, cell),
            "stopped": count_of(
                sum(run.outcome.status == "stopped" for run in runs.values()), len(runs)
            ),
            "identical": _identical(study, cell, modes),
        }
        told = compared(contrast)
        row |= {key: told[key] for key in ("against", "difference", "verdict", "detectable")
                if key in told}  # fmt: skip
        rows.append(row)
    note = 'With "advise" decisions are logged and the run stays as with "off", to the bit.'
    return Table("T5", "Controllers", note, columns, rows_of(columns, rows)).shown()


def _success(study: Study, cell: Cell) -> Item:
    values = study.successes(cell.name)
    return estimate(average(values, study), share) if values else EMPTY


def _mode(cell: Cell) -> str:
    return str(setting(cell, "agm", "mode") or "off")


def _matched(study: Study, modes: dict[str, str]) -> set[str]:
    """Cells that differ from another one in the controllers' mode and in nothing else."""
    cells = study.cells(*SHOWN)
    return {
        cell.name
        for cell in cells
        for other in cells
        if modes[cell.name] != modes[other.name] and _without_mode(cell) == _without_mode(other)
    }


def _identical(study: Study, cell: Cell, modes: dict[str, str]) -> Item:
    """How many runs have the curves of the same seed in the cell that differs by `off` alone."""
    if modes[cell.name] == "off":
        return EMPTY
    own = _without_mode(cell)
    base = next(
        (
            other
            for other in study.cells(*SHOWN)
            if modes[other.name] == "off" and _without_mode(other) == own
        ),
        None,
    )
    if base is None:
        return EMPTY
    pairs = [
        (run.outcome, study.runs[base.name][seed].outcome)
        for seed, run in study.runs[cell.name].items()
        if seed in study.runs[base.name]
    ]
    if not pairs:
        return EMPTY
    same = sum((a.evals, a.reward, a.curves) == (b.evals, b.reward, b.curves) for a, b in pairs)
    return Item(f"{same}/{len(pairs)}", same / len(pairs), {"": same, "_n": len(pairs)})


def _without_mode(cell: Cell) -> dict[str, Any]:
    """A cell's settings without its controllers'."""
    return {name: value for name, value in cell.settings.items() if name != "agm"}


def cost_table(study: Study) -> Table:
    """T6."""
    columns = (
        *identity_columns(study),
        Column("seeds", "seeds"),
        Column("updates", "updates"),
        Column("tokens", "tokens, thousands"),
        Column("cpu_s", "CPU s"),
        Column("wall_s", "wall s"),
        Column("tokens_per_s", "tokens/s"),
        Column("relative", "CPU, of baseline", title="mean ratio by seed"),
    )
    rows = []
    for cell in rows_in_order(study):
        runs = study.runs[cell.name].values()
        row = {**identity(study, cell), "seeds": whole(len(runs))}
        row["updates"] = estimate(
            average([float(run.outcome.updates) for run in runs], study), "{:.0f}".format
        )
        tokens = [float(run.outcome.tokens) for run in runs]
        row["tokens"] = estimate(average(tokens, study), digits, 1e-3)
        for name in ("cpu_s", "wall_s", "tokens_per_s"):
            values = _costs(study, cell.name, name)
            row[name] = estimate(average(values, study), digits) if values else EMPTY
        row["relative"] = _relative(study, cell)
        rows.append(row)
    note = "Times are of the machine that ran them, with whatever else it did; tokens are not."
    return Table("T6", "Cost", note, columns, rows_of(columns, rows)).shown()


def _costs(study: Study, cell: str, name: str) -> list[float]:
    found = (run.outcome.cost.get(name) for run in study.runs.get(cell, {}).values())
    return [value for value in found if value is not None]


def _relative(study: Study, cell: Cell) -> Item:
    """Mean ratio by seed to the first baseline; nothing where no seed is shared."""
    for base in study.baselines(cell)[:1]:
        pairs: Sequence[tuple[float | None, float | None]] = [
            (run.outcome.cost.get("cpu_s"), study.runs[base][seed].outcome.cost.get("cpu_s"))
            for seed, run in study.runs[cell.name].items()
            if seed in study.runs[base]
        ]
        ratios = [a / b for a, b in pairs if a and b]
        if ratios:
            return estimate(average(ratios, study), "{:.2f}".format)
    return EMPTY
