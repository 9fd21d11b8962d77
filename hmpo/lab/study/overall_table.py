"""T1-all: each level of the compared factor over all blocks."""

from hmpo.lab.study.analysis import Study, block_of
from hmpo.lab.study.further import wins_over_blocks
from hmpo.lab.study.main_table import average, count_of, iqm_of
from hmpo.lab.study.tabular import EMPTY, Column, Table, estimate, rows_of, share, whole, word


def overall_table(study: Study) -> Table | None:
    """Each level of the compared factor over all blocks; None with fewer than two of those."""
    factor = study.plan.factor
    cells = [cell for cell in study.compared if factor in cell.levels]
    blocks = list(dict.fromkeys(block_of(study.plan, cell) for cell in cells))
    if len(blocks) < 2:
        return None
    columns = (
        Column(factor, factor, numeric=False),
        Column("blocks", "blocks"),
        Column("iqm", "success, IQM"),
        Column("worst", "worst block", title="lowest mean success of a block"),
        Column("wins", "wins", title="chance that a run ends above one of the first baseline"),
        Column("collapsed", "collapsed"),
        Column("better", "better", title="blocks in which it is better than the first baseline"),
        Column("worse", "worse"),
        Column("same", "no difference"),
        Column("undecided", "undecided"),
    )
    rows = []
    for level in dict.fromkeys(cell.levels[factor] for cell in cells):
        own = [cell for cell in cells if cell.levels[factor] == level]
        by_task = [study.successes(cell.name) for cell in own]
        if not all(by_task):
            continue
        firsts = [
            c
            for cell in own
            for c in study.contrasts
            if c.cell == cell.name and c.against == study.baselines(cell)[0]
        ]
        words = [c.verdict.word for c in firsts if c.verdict]
        runs = [run for cell in own for run in study.runs[cell.name].values()]
        means = [average(values, study) for values in by_task]
        row = {
            factor: word(level),
            "blocks": whole(len(own)),
            "iqm": estimate(iqm_of(by_task, study), share),
            "worst": estimate(min(means, key=lambda e: e.value), share),
            "wins": estimate(wins_over_blocks(study, firsts), share),
            "collapsed": count_of(sum(run.score.collapsed for run in runs), len(runs)),
        }
        keys = {
            "better": "better",
            "worse": "worse",
            "same": "no difference",
            "undecided": "undecided",
        }
        row |= {key: whole(words.count(told)) if words else EMPTY for key, told in keys.items()}
        rows.append(row)
    note = (
        "Interquartile mean over all runs of all blocks, bootstrapped within blocks: with fewer "
        "than four blocks of five seeds each its interval is too narrow. The words count blocks. "
        "Wins: as in T1b, mean over blocks. Collapses are of all runs, of whatever block, with "
        "Wilson's interval."
    )
    return Table("T1-all", "Over all blocks", note, columns, rows_of(columns, rows))
