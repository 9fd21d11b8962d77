"""What a report says of a run's training prompts, from prompts.jsonl."""

from typing import Any

from hmpo.lab.folder import RunData


def prompt_rows(run: RunData) -> list[tuple[str, str]]:
    """How many prompts were always right, always wrong, and neither; empty without records."""
    known = [row for row in map(_counts, run.prompts) if row is not None]
    if not known:
        return []
    counts = {
        "always right": sum(k == n for k, n in known),
        "sometimes right": sum(0 < k < n for k, n in known),
        "always wrong": sum(k == 0 for k, _ in known),
    }
    silent = sum(row.get("signal") is False for row in run.prompts)
    rows = {"asked": len(known), **counts, "without a signal when last asked": silent}
    tries = sum(n for _, n in known)
    told = [(name, f"{n}, {100 * n / len(known):.0f} %") for name, n in rows.items()]
    return [*told, ("responses for each", f"{tries / len(known):.1f}")]


def _counts(row: dict[str, Any]) -> tuple[int, int] | None:
    """(successes, tries) of a record that has them."""
    k, n = row.get("successes"), row.get("tries")
    sound = type(k) is int and type(n) is int and 0 <= k <= n and n > 0
    return (k, n) if sound else None
