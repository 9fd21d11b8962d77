"""T1b and T1c: what stands beside the differences of T1, and whether curves were foretold."""

from hmpo.lab.study.analysis import Contrast, Study
from hmpo.lab.study.further import collapses, equal_kl, foretold, log_ranks, wins
from hmpo.lab.study.main_table import (
    chance,
    compared,
    count_of,
    identity,
    identity_columns,
    rows_in_order,
)
from hmpo.lab.study.tabular import (
    EMPTY,
    Column,
    Item,
    Table,
    estimate,
    plain,
    rows_of,
    share,
    signed,
    whole,
    word,
)

TONES = {"fell short": "bad", "went further": "good"}


def further_table(study: Study) -> Table | None:
    """T1b, one row for each comparison; None where there is none."""
    level = f"{100 * (1 - study.plan.alpha):.0f} %"
    columns = (
        *identity_columns(study),
        Column("against", "against", numeric=False),
        Column("pairs", "pairs", title="runs of both on the same seeds"),
        Column("verdict", "verdict", numeric=False, title="as in T1"),
        Column("wins", "wins", title="chance that a run ends above one of the baseline; 0.5 is no "
               "difference"),
        Column("at_kl", "at equal KL, points", title="difference of success where both have spent "
               "as much KL"),
        Column("at_kl_pairs", "pairs at equal KL"),
        Column("kl", "up to KL", title="nat/token, summed over updates: what every run spent"),
        Column("log_rank", "times, p", title="log-rank of the updates to the target, Holm within "
               "the block"),
        Column("collapsed", "collapsed"),
        Column("base_collapsed", "baseline collapsed"),
        Column("collapse_difference", "more collapsed, points"),
    )  # fmt: skip
    times = log_ranks(study)
    rows = []
    for cell in rows_in_order(study):
        contrasts = [c for c in (*study.contrasts, *study.others) if c.cell == cell.name]
        rows += [identity(study, cell) | _beside(study, c, times) for c in contrasts]
    note = (
        f"Brackets are {level} intervals. Wins: the chance that a run ends above one of the "
        "baseline, all pairs of runs compared, ties half (DeLong). Equal KL: the mean difference "
        "of success at ten equal amounts of KL spent, which is the sum over updates of k3 between "
        "the policy that sampled and the one that is updated; runs that failed are left out with "
        "their partner. Times: log-rank over the runs as independent ones. A run collapsed if it "
        "failed, ended below half of its best, or below its start by more than chance; shares have "
        "Wilson's interval, their difference Newcombe's."
    )
    return (
        Table("T1b", "Further comparisons", note, columns, rows_of(columns, rows)) if rows else None
    )


def _beside(
    study: Study, contrast: Contrast, times: dict[tuple[str, str], float]
) -> dict[str, Item]:
    found, level = collapses(study, contrast), equal_kl(study, contrast)
    row = {
        "against": word(contrast.against),
        "pairs": whole(len(contrast.seeds)),
        "verdict": compared(contrast).get("verdict", EMPTY),
        "wins": estimate(wins(study, contrast), share),
        "log_rank": chance(times.get((contrast.cell, contrast.against))),
        "collapsed": count_of(found.count, found.total),
        "base_collapsed": count_of(found.base, found.base_total),
        "collapse_difference": estimate(found.difference, signed, 100.0),
    }
    if level is None:
        return row
    return row | {
        "at_kl": estimate(level.mean, signed, 100.0),
        "at_kl_pairs": whole(level.mean.n),
        "kl": plain(float(level.kl[-1])),
    }


def foretold_table(study: Study) -> Table | None:
    """T1c, one row for each cell; None where no curve has ten points."""
    columns = (
        *identity_columns(study),
        Column("curve", "curve", numeric=False),
        Column("seeds", "seeds"),
        Column("points", "points"),
        Column("end", "second half", title="mean over it"),
        Column("missed", "less foretold", title="the same less the fit of the first half"),
        Column("error", "rms error", title="of the points of the mean curve about the fit"),
        Column("noise", "a point's noise", title="standard error of one point of the mean curve"),
        Column("word", "so it", numeric=False),
    )
    rows = []
    for cell in rows_in_order(study):
        found = foretold(study, cell)
        if found is None:
            continue
        told = found.word(study.plan.smallest)
        rows.append(
            {
                **identity(study, cell),
                "curve": word(found.curve),
                "seeds": whole(found.seeds),
                "points": whole(found.points),
                "end": estimate(found.end, share),
                "missed": estimate(found.missed, "{:+.3f}".format),
                "error": plain(found.error, "{:.3f}"),
                "noise": plain(found.noise, "{:.3f}"),
                "word": word(told, TONES.get(told, "")),
            }
        )
    note = (
        "A sigmoid of updates fitted on the first half of the mean curve, tested on the second: of "
        "success where there are ten evaluations, else of the reward in training. Intervals are "
        "over seeds, with what they do to the fit (delta method). Below "
        f"{study.plan.smallest:g} it was as foretold. Runs that failed, and those of another "
        "length, are left out."
    )
    made = Table("T1c", "Curves foretold", note, columns, rows_of(columns, rows))
    return made.shown() if rows else None
