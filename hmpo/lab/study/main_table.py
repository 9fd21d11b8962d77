"""T1: what each cell came to and how it differs from the baselines."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hmpo.lab.statistics.intervals import Estimate, paired_t, rate
from hmpo.lab.statistics.resampling import iqm, stratified_iqm
from hmpo.lab.statistics.survival import kaplan_meier
from hmpo.lab.study.analysis import COMPARED, Contrast, Run, Study, block_of
from hmpo.lab.study.plan import Cell
from hmpo.lab.study.scores import pass_rate, time_to
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
    signed,
    whole,
    word,
)

DRAWS = 1000
"""Resamples of each bootstrap in a table."""
TONES = {"better": "good", "worse": "bad"}
SHOWN = (*COMPARED, "again", "negative", "positive", "placebo")
"""Roles of the cells that stand in the main table."""


def identity_columns(study: Study) -> tuple[Column, ...]:
    """Columns that say which cell a row is of: the block's factors, then what is compared."""
    used = {factor for cell in study.cells(*SHOWN) for factor in cell.levels}
    names = [factor for factor in study.plan.within if factor in used]
    names += [factor for factor in sorted(used) if factor not in (*names, study.plan.factor)]
    names += [study.plan.factor] if study.plan.factor in used else []
    columns = [Column(name, name, numeric=False, minor=True) for name in names]
    role = Column("role", "role", numeric=False)
    return (Column("cell", "cell", numeric=False), *columns, role)


def rows_in_order(study: Study) -> list[Cell]:
    """The cells of a table: those of one block together, controls at the end."""
    cells = study.cells(*SHOWN)
    order = {
        block: i for i, block in enumerate(dict.fromkeys(block_of(study.plan, c) for c in cells))
    }
    return sorted(cells, key=lambda c: (c.role not in COMPARED, order[block_of(study.plan, c)]))


def identity(study: Study, cell: Cell) -> dict[str, Item]:
    """The items of those columns; a main cell's role goes without saying."""
    items = {factor: word(level) for factor, level in cell.levels.items()}
    role = "" if cell.role == "main" else cell.role
    late = study.late(cell)
    if late:
        role = f"{role}, exploratory: {late}".lstrip(", ")
    return items | {"cell": word(cell.name), "role": word(role)}


COMPARISON = (
    Column("seeds", "seeds"),
    Column("success", "success"),
    Column("against", "against", numeric=False),
    Column("difference", "difference, points"),
    Column("verdict", "verdict", numeric=False),
    Column("detectable", "detectable"),
)
"""What tables beside the main one say of a cell's success."""


def main_table(study: Study) -> Table:
    """T1, one row for each cell and baseline that it is compared with."""
    level = f"{100 * (1 - study.plan.alpha):.0f} %"
    columns = (
        *identity_columns(study),
        Column("seeds", "seeds"),
        Column("iqm", "success, IQM", title=f"interquartile mean with its {level} interval"),
        Column("against", "against", numeric=False),
        Column("difference", "difference, points", title="mean of the paired differences"),
        Column("new_prompts", "on new prompts", title="the same, seeds and prompts resampled"),
        Column("p", "p, Holm", title="paired t, corrected within the block"),
        Column("verdict", "verdict", numeric=False),
        Column("detectable", "detectable", title="difference seen with chance .8, in points"),
        Column("more", "more seeds", title="that would decide, at the spread seen"),
        Column("auc", "area", title="mean height of the success over the run"),
        Column("updates", "updates to target", title="median by Kaplan and Meier"),
        Column(
            "tokens",
            "tokens to target, thousands",
            title="median; prompts and responses of all rollouts begun by then",
        ),
        Column("reached", "reached target"),
        Column("failed", "failed"),
        Column("pass_at_k", "pass@k"),
        Column("entropy", "entropy, end"),
    )
    rows = []
    for cell in rows_in_order(study):
        own = _own(study, cell)
        contrasts = [c for c in (*study.contrasts, *study.others) if c.cell == cell.name]
        for contrast in contrasts or [None]:
            rows.append(own | compared(contrast))
    note = (
        f"Success is the mean of the last {study.plan.last} evaluations; a crash "
        f"{'counts as 0' if study.plan.crash_is_zero else 'is left out'}. Brackets are {level} "
        "intervals: bootstrap over seeds for the IQM, paired t for differences. A target is half "
        "way from the start to the end of the block's first baseline; a run that never reached it "
        "counts as censored. A time is that of the first evaluation above it, and a median has "
        'an interval from about six seeds on. "detectable" is the smallest difference that these '
        f"seeds see with chance .8; differences below {100 * study.plan.smallest:g} points do not "
        "matter."
    )
    return Table("T1", "Main table", note, columns, rows_of(columns, rows))


def compared(contrast: Contrast | None) -> dict[str, Item]:
    """Difference, interval, word and what could have been seen."""
    if contrast is None or contrast.estimate is None:
        return {}
    found: dict[str, Item] = {
        "against": word(contrast.against),
        "difference": estimate(contrast.estimate, signed, 100.0),
    }
    v = contrast.verdict
    if v is None or v.estimate.low is None:
        return found | {"verdict": word("not paired" if v is None else "one seed")}
    needed = v.seeds_needed
    return found | {
        "new_prompts": estimate(contrast.resampled, signed, 100.0),
        "p": chance(contrast.adjusted),
        "verdict": word(v.word, TONES.get(v.word, "")),
        "detectable": EMPTY if v.detectable is None else _points(v.detectable),
        "more": EMPTY if needed is None else whole(needed),
    }


def chance(p: float | None) -> Item:
    """A p value."""
    if p is None or p >= 0.001:
        return plain(p, "{:.3f}")
    return Item("< 0.001", p, {"": p})


def _points(value: float) -> Item:
    return Item(f"{100 * value:.1f}", value, {"": value})


def _own(study: Study, cell: Cell) -> dict[str, Item]:
    runs = study.runs[cell.name]
    successes = study.successes(cell.name)
    areas = [run.score.auc for run in runs.values() if run.score.auc is not None]
    ends = numbers(runs, "entropy_end")
    return {
        **identity(study, cell),
        "seeds": whole(len(runs)),
        "iqm": estimate(iqm_of([successes], study), share) if successes else EMPTY,
        "auc": estimate(average(areas, study), share) if areas else EMPTY,
        "entropy": estimate(average(ends, study)) if ends else EMPTY,
        "failed": count_of(sum(run.score.failed for run in runs.values()), len(runs)),
        "pass_at_k": _passes(runs, study),
        **_times(study, cell),
    }


def numbers(runs: Mapping[int, Run], name: str) -> list[float]:
    """One metric of each run that logged it."""
    found = (run.outcome.metrics.get(name) for run in runs.values())
    return [float(value) for value in found if value is not None]


def average(values: Sequence[float], study: Study) -> Estimate:
    """The mean with Student's interval."""
    return paired_t(values, 1 - study.plan.alpha)


def iqm_of(by_task: Sequence[Sequence[float]], study: Study) -> Estimate:
    """With an interval, inside of [0, 1], where every block has two seeds at least."""
    level = 1 - study.plan.alpha
    if min(map(len, by_task)) < 2:
        every = [value for values in by_task for value in values]
        return Estimate(iqm(every), None, None, level, min(map(len, by_task)))
    found = stratified_iqm(by_task, draws=DRAWS, seed=0, level=level)
    assert found.low is not None and found.high is not None
    return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))


def count_of(count: int, total: int) -> Item:
    """Such as 3/10, with Wilson's interval of the share."""
    found = rate(count, total)
    raw: dict[str, Any] = {"": count, "_n": total, "_low": found.low, "_high": found.high}
    return Item(f"{count}/{total}", found.value, raw, f"{found.low:.2f}, {found.high:.2f}")


def _passes(runs: Mapping[int, Run], study: Study) -> Item:
    """The mean over seeds of the share of prompts that one of k samples solves."""
    found = [pass_rate(run.outcome.after) for run in runs.values()]
    rates = [k / n for k, n, _ in filter(None, found)]
    return estimate(average(rates, study), share) if rates else EMPTY


def _times(study: Study, cell: Cell) -> dict[str, Item]:
    target = study.target(cell)
    if target is None:
        return {}
    times, tokens, reached = time_table(study, cell, target)
    return {
        "updates": _median(times, reached, "{:.0f}".format),
        "tokens": _median(tokens, reached, digits, 1e-3),
        "reached": count_of(sum(reached), len(reached)),
    }


def _median(
    times: Sequence[float],
    reached: Sequence[bool],
    form: Callable[[float], str],
    unit: float = 1.0,
) -> Item:
    """The median time to a target; the times themselves where they are too few for an interval."""
    found = kaplan_meier(times, reached).median
    if found is None:
        told = "fewer than half reach it" if any(reached) else "not reached"
        return Item(told, None, {"": None})
    if found.low or found.high is not None:
        return estimate(found, form, unit)
    seen = [unit * time for time, hit in zip(times, reached) if hit]
    told = f"seeds {form(min(seen))} to {form(max(seen))}{'' if all(reached) else ' or never'}"
    raw: dict[str, Any] = {"": found.value, "_low": None, "_high": None, "_n": found.n}
    alone = "no interval" if len(times) == 1 else f"no interval; {told}"
    return Item(form(unit * found.value), found.value, raw, alone)


def time_table(
    study: Study, cell: Cell, target: float
) -> tuple[list[float], list[float], list[bool]]:
    """Updates, tokens and whether the target was reached, by run.

    A crash before the target is censored at the cell's last update, not at the crash.
    """
    times, tokens, reached = [], [], []
    runs = study.runs[cell.name].values()
    horizon = max(run.outcome.updates for run in runs), max(run.outcome.tokens for run in runs)
    for run in runs:
        step, hit = time_to(run.outcome, target)
        token, _ = time_to(run.outcome, target, "tokens")
        censored = run.score.failed and not hit
        times.append(float(horizon[0]) if censored else step)
        tokens.append(float(horizon[1]) if censored else token)
        reached.append(hit)
    return times, tokens, reached
