"""The reward that verl's reward workers load by path: the task's own check."""

from typing import Any

from hmpo.config import TaskConfig
from hmpo.tasks import make_task

TASK = make_task(TaskConfig(name="sort", level=10), seed=0)


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any
) -> float:
    """1.0 for a sorted string, else 0.0."""
    return TASK.reward([""], [solution_str], [[]], answer=[ground_truth])[0]
