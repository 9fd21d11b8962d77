"""What a suite found, as one table: compared levels in rows, blocks in columns."""

from collections import Counter
from collections.abc import Callable, Sequence

from study_rates import STUDIES, missing, read_study

from hmpo.lab.statistics.intervals import paired_t
from hmpo.lab.study.analysis import Contrast, Study, block_of
from hmpo.lab.study.controls import controls
from hmpo.lab.study.page import finding
from hmpo.lab.study.plan import Cell

MARKS = {"better": "+", "worse": "-", "no difference": "=", "undecided": "?"}


def sentences(study: Study) -> list[str]:
    """What a suite found, in the words that its numbers allow."""
    told = [finding(study, c) for c in study.contrasts if c.verdict is not None]
    return [f"* {one['text']}{' (' + one['late'] + ')' if one['late'] else ''}." for one in told]


def controls_of(study: Study) -> str:
    """The controls that a suite has, in one line."""
    told = [c for c in controls(study) if c.cell]
    states = {True: "passed", False: "**failed**", None: "not run"}
    return (
        "Controls: "
        + "; ".join(f"{c.kind} {c.cell} {states[c.passed]} {c.detail}" for c in told)
        + "."
    )


def matrix(name: str) -> Callable[[], str]:
    """The table of one suite of studies/, or the line that says how many runs are missing."""

    def table() -> str:
        if not (STUDIES / f"{name}.toml").exists():
            return f"There is no suite `{name}`."
        return matrix_of(read_study(name))

    return table


def matrix_of(study: Study) -> str:
    """Success in percent with its interval and marks of the verdicts, once all runs are done."""
    plan = study.plan
    wanted = sum(len(cell.seeds) for cell in plan.cells)
    if left := missing(study):
        done = "has not run" if left == wanted else f"lacks {left} of {wanted} runs"
        return f"`{plan.name}` {done}; it is compared when it is complete."
    cells = [cell for cell in plan.cells if "+".join(cell.levels.values()) == cell.name]
    levels = list(dict.fromkeys(cell.levels[plan.factor] for cell in cells))
    blocks = list(dict.fromkeys(block_of(plan, cell) for cell in cells))
    heads = [", ".join(level for _, level in block) or "success, percent" for block in blocks]
    lines = [f"| {plan.factor} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for level in levels:
        found = {block_of(plan, c): c for c in cells if c.levels[plan.factor] == level}
        lines.append(
            f"| {level} | " + " | ".join(_told(study, found.get(b)) for b in blocks) + " |"
        )
    seeds = sorted({len(cell.seeds) for cell in cells})
    to = " and ".join(plan.to)
    note = (
        f"Success in percent (95 % interval over {' or '.join(map(str, seeds))} seeds). Against "
        f"{to}: + better, - worse, = no difference as large as {100 * plan.smallest:g} points, ? "
        "undecided; Holm within a column."
    )
    more = sentences(study) if len(blocks) == 1 else []
    told = _listed([*more, *_further(study)])
    folded = decided(study) if len(blocks) > 1 else []
    return "\n".join([*lines, "", note, *told, "", controls_of(study), *folded])


def decided(study: Study) -> list[str]:
    """Every difference that was decided, folded away; each pair of baselines once."""
    seen: set[frozenset[str]] = set()
    found = []
    for contrast in study.contrasts:
        pair = frozenset((contrast.cell, contrast.against))
        if contrast.verdict is None or contrast.verdict.word == "undecided" or pair in seen:
            continue
        seen.add(pair)
        found.append(contrast)
    words = Counter(contrast.verdict.word for contrast in found if contrast.verdict)
    head = ", ".join(f"{words[word]} {word}" for word in MARKS if words[word])
    if not found:
        return []
    lines = [f"* {finding(study, contrast)['text']}." for contrast in found]
    summary = f"<summary>All that was decided: {head}</summary>"
    return ["", '<details markdown="1">', summary, "", *lines, "", "</details>"]


def _listed(lines: Sequence[str]) -> list[str]:
    return ["", *lines] if lines else []


def _told(study: Study, cell: Cell | None) -> str:
    """One cell of the table; its verdicts in the order of the baselines."""
    if cell is None:
        return ""
    by_level: dict[str, Contrast] = {}
    for contrast in study.contrasts:
        other = study.plan.cell(contrast.against)
        if contrast.cell == cell.name and other is not None:
            by_level[other.levels[study.plan.factor]] = contrast
    found = [by_level[level].verdict for level in study.plan.to if level in by_level]
    marks = " ".join(MARKS[v.word] for v in found if v is not None)
    return f"{success(study.successes(cell.name))} {marks}".strip()


def _further(study: Study) -> list[str]:
    """What became of cells beside the product that are no controls."""
    roles = {cell.name: cell.role for cell in study.plan.cells}
    told = [c for c in study.others if roles[c.cell] in ("main", "null") and c.verdict is not None]
    return [f"* {finding(study, c)['text']}." for c in told]


def success(values: Sequence[float]) -> str:
    """Mean with Student's interval, in percent."""
    if len(values) < 2:
        return f"{100 * values[0]:.1f} (one seed)" if values else ""
    e = paired_t(values, 0.95)
    assert e.low is not None and e.high is not None
    return f"{100 * e.value:.1f} ({100 * max(0.0, e.low):.1f} to {100 * e.high:.1f})"
