"""Which checkpoint did best on held-out prompts, as the log of its run tells. No torch in here.

Compared are the success rates of sampled responses after at least one update: those measured on the
way, and the one after the last update, which is of more prompts and so counts on the first ones
alone. Of equal ones the earlier is best.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hmpo.config import RunConfig
from hmpo.telemetry.ingest import read_run

ON_THE_WAY, AFTER = "during", "after"
"""Names of evaluations that compete, as `eval/name` has them."""


def keeps_best(config: RunConfig) -> bool:
    """Whether a run keeps the checkpoint that did best."""
    checkpoint = config.checkpoint
    return checkpoint.keep_best and checkpoint.every != 0 and config.eval.every > 0


def best_evaluation(evaluations: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The record of the best evaluation; None where none competes.

    Args:
        evaluations: `eval` records in the order of the log.
    """
    best: Mapping[str, Any] | None = None
    for record in evaluations:
        if record.get("eval/name") not in (ON_THE_WAY, AFTER) or record["step"] < 1:
            continue
        if best is None or beats(record, best):
            best = record
    return best


def beats(record: Mapping[str, Any], best: Mapping[str, Any]) -> bool:
    """Whether an evaluation has a higher success rate than an earlier one, on the same prompts.

    Without a scored prompt there is no rate, and nothing is beaten.
    """
    trials = min(record["eval/sampled_n"], best["eval/sampled_n"])
    if not record["eval/sampled_n"]:
        return False
    return not best["eval/sampled_n"] or _rate(record, trials) > _rate(best, trials)


def _rate(record: Mapping[str, Any], trials: int) -> float:
    """Share of successes among the first prompts; of all where not every prompt was scored."""
    total, passed = record["eval/sampled_n"], record.get("eval/passed", "")
    if trials == total or record.get("eval/dropped", 0) or 4 * len(passed) < total:
        return record["eval/sampled_k"] / total
    bits = f"{int(passed, 16):0{4 * len(passed)}b}"
    return bits[:trials].count("1") / trials


def logged_evaluations(run: Path) -> Sequence[Mapping[str, Any]]:
    """The `eval` records of a run's log; none where it has no log.

    Raises:
        TelemetryError: the log cannot be read.
    """
    for name in ("telemetry.jsonl", "telemetry.jsonl.gz"):
        if (run / name).is_file():
            return read_run(run / name).evals
    return ()
