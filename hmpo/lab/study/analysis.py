"""The runs of a suite set against each other: pairs by seed, blocks, tests, verdicts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hmpo.lab.statistics.equivalence import two_one_sided
from hmpo.lab.statistics.intervals import Estimate, holm, paired_t, welch
from hmpo.lab.statistics.resampling import two_level_bootstrap
from hmpo.lab.statistics.verdicts import Verdict, verdict
from hmpo.lab.study.outcomes import Outcome
from hmpo.lab.study.plan import Cell, Plan
from hmpo.lab.study.scores import Score, bits, score

COMPARED = ("main", "null")
"""Roles of the cells of blocks, but for those that name the one cell that they are held against."""


@dataclass(frozen=True)
class Run:
    """An outcome and what it is judged by."""

    outcome: Outcome
    score: Score


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """One cell against another: differences of the endpoint by shared seed.

    Example: `Contrast(cell="gspo+dense", against="grpo+dense", seeds=(1, 2), ...)`.
    """

    cell: str
    against: str
    block: tuple[tuple[str, str], ...]
    """Levels that both share, by the factors of `compare.within`."""
    seeds: tuple[int, ...]
    """Shared ones; () where the runs are not paired."""
    left_out: int
    """Runs of either side without a partner."""
    estimate: Estimate | None
    """Mean difference; None where no pair counts."""
    adjusted: float | None
    """p after Holm's correction within the block."""
    verdict: Verdict | None
    confirmatory: bool
    """Whether all of its runs were decided on before the first that counted."""
    late: str = ""
    """How many were not, such as `2 of 8 runs`; "" where none or where there is no protocol."""
    resampled: Estimate | None = None
    """The same difference for new prompts too; None where prompts were not kept apart."""


@dataclass(frozen=True)
class Study:
    """Everything a report says of a suite.

    Example: `Study.of(plan, outcomes).contrasts`.
    """

    plan: Plan
    runs: Mapping[str, Mapping[int, Run]]
    """By cell and seed, in the order of the plan; cells without a finished run are not in it."""
    contrasts: tuple[Contrast, ...]
    """Of the blocks, in the order of the plan."""
    others: tuple[Contrast, ...]
    """Of cells that name the cell which they are compared with."""

    @classmethod
    def of(cls, plan: Plan, outcomes: Iterable[Outcome]) -> "Study":
        """The analysis of these outcomes by this plan."""
        outcomes = list(outcomes)
        plan = _told(plan, outcomes)
        runs: dict[str, dict[int, Run]] = {cell.name: {} for cell in plan.cells}
        for outcome in outcomes:
            if outcome.cell in runs:
                runs[outcome.cell][outcome.seed] = Run(outcome, score(outcome, plan))
        known = {name: found for name, found in runs.items() if found}
        return cls(plan, known, tuple(_blocks(plan, known)), tuple(_others(plan, known)))

    def cells(self, *roles: str) -> list[Cell]:
        """Cells with at least one outcome, of these roles or of all."""
        return [
            cell
            for cell in self.plan.cells
            if cell.name in self.runs and (not roles or cell.role in roles)
        ]

    @property
    def compared(self) -> list[Cell]:
        """Cells with an outcome that the blocks are made of."""
        return _compared(self.plan, self.runs)

    def successes(self, cell: str) -> list[float]:
        """The endpoint of each run of a cell that has one."""
        return list(endpoints(self.runs.get(cell, {})).values())

    def late(self, cell: Cell) -> str:
        """How many runs of this cell were not decided on before the first that counted.

        Returns:
            Such as `2 of 4`; "" where all were, or where there is no protocol.
        """
        return _late(self.plan, [(cell.name, seed) for seed in self.runs.get(cell.name, {})])

    @property
    def late_runs(self) -> int:
        """Runs that there are and that were not decided on before the first one that counted."""
        return sum(
            not self.plan.confirmatory(name, [seed])
            for name, found in self.runs.items()
            for seed in found
        )

    @property
    def standing(self) -> str:
        """What the protocol makes of these runs: confirmatory, or why not."""
        if not self.plan.registered:
            return "exploratory: no protocol"
        if not self.plan.unchanged:
            return "the protocol changed after its first run"
        runs, late = sum(len(found) for found in self.runs.values()), self.late_runs
        return f"exploratory: {late} of {runs} runs" if late else "confirmatory"

    def contrast(self, cell: str, against: str) -> Contrast | None:
        """The comparison of these two, or None."""
        found = (c for c in (*self.contrasts, *self.others) if c.cell == cell)
        return next((c for c in found if c.against == against), None)

    def baselines(self, cell: Cell) -> list[str]:
        """Names of the cells that this one is compared with."""
        found = [c.against for c in (*self.contrasts, *self.others) if c.cell == cell.name]
        return list(dict.fromkeys(found))

    def target(self, cell: Cell) -> float | None:
        """Success that runs of this cell's block are timed to, the same for all methods of it.

        Half way from the start to where the first baseline ended, or, where there is no baseline,
        to where the best cell of the block did.
        """
        block = block_of(self.plan, cell)
        peers = [c for c in self.compared if block_of(self.plan, c) == block]
        firsts = [c for c in peers if c.levels.get(self.plan.factor) in self.plan.to[:1]]
        ends = [mean(self.successes(c.name)) for c in firsts or peers if self.successes(c.name)]
        starts = [
            run.score.start
            for peer in peers
            for run in self.runs[peer.name].values()
            if run.score.start is not None
        ]
        if not ends or not starts:
            return None
        start = mean(starts)
        return start + max(max(ends) - start, 2 * self.plan.smallest) / 2


def _told(plan: Plan, outcomes: Iterable[Outcome]) -> Plan:
    """The plan, with the runs in it that say themselves that they were not decided on before."""
    known = ("", plan.first_protocol_hash or plan.protocol_hash)
    late: dict[str, frozenset[int]] = dict(plan.exploratory)
    for outcome in outcomes:
        if outcome.registered not in known:
            late[outcome.cell] = late.get(outcome.cell, frozenset()) | {outcome.seed}
    return replace(plan, exploratory=late)


def endpoints(runs: Mapping[int, Run]) -> dict[int, float]:
    """The endpoint by seed, of runs that have one."""
    found = {seed: run.score.success for seed, run in runs.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean of at least one value."""
    return sum(values) / len(values)


def block_of(plan: Plan, cell: Cell) -> tuple[tuple[str, str], ...]:
    """Levels of the factors within which cells are compared."""
    return tuple((factor, cell.levels.get(factor, "")) for factor in plan.within)


def _compared(plan: Plan, runs: Mapping[str, Mapping[int, Run]]) -> list[Cell]:
    """The cells of the blocks.

    Not among them, and no baseline, whatever its levels: a cell that names the one that it is held
    against, and one beside the product that has the levels of an earlier one.
    """
    found: list[Cell] = []
    for cell in plan.cells:
        if cell.role not in COMPARED or cell.against:
            continue
        taken = bool(cell.levels) and any(other.levels == cell.levels for other in found)
        if not taken:
            found.append(cell)
    return [cell for cell in found if cell.name in runs]


def _blocks(plan: Plan, runs: Mapping[str, Mapping[int, Run]]) -> list[Contrast]:
    """Every cell against each baseline that shares all its other levels; Holm by block."""
    cells = _compared(plan, runs)
    by_levels = {tuple(sorted(cell.levels.items())): cell for cell in cells if cell.levels}
    by_block: dict[tuple[tuple[str, str], ...], list[Contrast]] = {}
    for cell in cells:
        if plan.factor not in cell.levels:
            continue
        for level in plan.to:
            wanted = tuple(sorted({**cell.levels, plan.factor: level}.items()))
            base = by_levels.get(wanted)
            if base is None or base.name == cell.name:
                continue
            block = block_of(plan, cell)
            by_block.setdefault(block, []).append(_contrast(plan, runs, cell, base, block))
    return [found for block in by_block.values() for found in _adjusted(plan, block, runs)]


def _others(plan: Plan, runs: Mapping[str, Mapping[int, Run]]) -> list[Contrast]:
    found = []
    for cell in plan.cells:
        base = plan.cell(cell.against)
        if base is not None and cell.name in runs and base.name in runs:
            found.append(_judged(plan, _contrast(plan, runs, cell, base, ()), runs))
    return found


def _late(plan: Plan, runs: Sequence[tuple[str, int]]) -> str:
    """`2 of 4` of these runs, cell and seed; "" for none."""
    count = sum(not plan.confirmatory(cell, [seed]) for cell, seed in runs)
    return f"{count} of {len(runs)}" if count and plan.registered else ""


def _contrast(
    plan: Plan,
    runs: Mapping[str, Mapping[int, Run]],
    cell: Cell,
    base: Cell,
    block: tuple[tuple[str, str], ...],
) -> Contrast:
    one, other = endpoints(runs[cell.name]), endpoints(runs[base.name])
    seeds = tuple(seed for seed in one if seed in other)
    left = len(one) + len(other) - 2 * len(seeds)
    estimate = None
    if seeds:
        estimate = paired_t([one[seed] - other[seed] for seed in seeds], 1 - plan.alpha)
    elif len(one) > 1 and len(other) > 1:
        estimate, left = welch([*one.values()], [*other.values()], 1 - plan.alpha), 0
    used = [(cell.name, seed) for seed in seeds or one]
    used += [(base.name, seed) for seed in seeds or other]
    late = _late(plan, used)
    return Contrast(
        cell=cell.name,
        against=base.name,
        block=block,
        seeds=seeds,
        left_out=left,
        estimate=estimate,
        adjusted=None,
        verdict=None,
        confirmatory=plan.registered and not late,
        late=late,
    )


def _adjusted(
    plan: Plan, block: Sequence[Contrast], runs: Mapping[str, Mapping[int, Run]]
) -> list[Contrast]:
    """Holm over the tests of a block, and over its two one-sided tests: two families."""
    apart = [c.estimate.p_value if c.estimate else None for c in block]
    equal = [
        two_one_sided(gaps, plan.smallest, plan.alpha).p_value if gaps else None
        for gaps in (_gaps(contrast, runs) for contrast in block)
    ]
    return [
        _judged(plan, contrast, runs, *adjusted)
        for contrast, *adjusted in zip(block, _holm(apart), _holm(equal), strict=True)
    ]


def _holm(chances: Sequence[float | None]) -> list[float | None]:
    """Holm's p of those that there are, in their places."""
    known = [p for p in chances if p is not None]
    raised = iter(float(p) for p in holm(known)) if known else iter(())
    return [None if p is None else next(raised) for p in chances]


def _gaps(contrast: Contrast, runs: Mapping[str, Mapping[int, Run]]) -> list[float]:
    """Differences of the endpoint on the shared seeds."""
    one, other = endpoints(runs[contrast.cell]), endpoints(runs[contrast.against])
    return [one[seed] - other[seed] for seed in contrast.seeds]


def _judged(
    plan: Plan,
    contrast: Contrast,
    runs: Mapping[str, Mapping[int, Run]],
    adjusted: float | None = None,
    equal: float | None = None,
) -> Contrast:
    """With the word that the numbers allow; unpaired runs get an interval alone."""
    if not contrast.seeds:
        return contrast
    word = verdict(
        _gaps(contrast, runs),
        plan.smallest,
        adjusted,
        plan.alpha,
        adjusted_equivalence=equal,
        method=contrast.cell,
        baseline=contrast.against,
    )
    both = _over_prompts(plan, contrast, runs)
    return replace(contrast, adjusted=adjusted, verdict=word, resampled=both)


def _over_prompts(
    plan: Plan, contrast: Contrast, runs: Mapping[str, Mapping[int, Run]]
) -> Estimate | None:
    """Seeds and held-out prompts resampled, where all runs kept the bits of the same prompts."""
    sides = [
        [runs[cell][seed].outcome for seed in contrast.seeds]
        for cell in (contrast.cell, contrast.against)
    ]
    tables = [[bits(outcome, plan.last) for outcome in side] for side in sides]
    rows = [row for table in tables for row in table]
    same = {outcome.heldout for side in sides for outcome in side}
    if len(contrast.seeds) < 2 or None in rows or len(same) > 1:
        return None
    sizes = {len(row) for row in rows if row is not None}
    if len(sizes) != 1 or min(sizes) < 2:
        return None
    level = 1 - plan.alpha
    return two_level_bootstrap(np.array(tables[0]), np.array(tables[1]), 1000, 0, level)
