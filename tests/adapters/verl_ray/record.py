"""Names of what a run leaves in its folder for the comparison."""

from pathlib import Path

RECORD = "HMPO_VERL_RECORD"
"""The environment variable that holds the run's folder."""
WORKERS = 2
STEPS = 2
FIELDS = ("prompts", "responses", "response_mask", "old_log_probs", "advantages")
"""What is kept of a minibatch: one tensor for each response."""


def update_file(folder: Path, update: int, rank: int) -> Path:
    """Rank's share of update number `update` (from 1), and the loss and norm that verl found."""
    return folder / f"update-{update}-rank-{rank}.pt"


def weights_file(folder: Path, step: int) -> Path:
    """The policy's weights after so many steps, as the rollout got them."""
    return folder / f"weights-{step}.pt"


def log_file(folder: Path) -> Path:
    """verl's own log of metrics, one JSON object for each step."""
    return folder / "metrics.jsonl"
