"""Which prompts a rollout trains on."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hmpo.config.checks import within_reason
from hmpo.errors import require

if TYPE_CHECKING:
    from hmpo.config.run import TaskConfig


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Which prompts a rollout trains on."""

    filter_groups: bool = False
    """Dynamic sampling as DAPO has it (arXiv 2503.14476): prompts whose groups carry no signal are
    replaced by the next ones of the task until `prompts_per_rollout` do, and those alone are
    trained on (docs/signal.md). A group carries one where its accuracies are not all equal."""
    signal: str = ""
    """Name of the reward function whose values are the accuracy, as `math` of
    `rewards.functions = ["math", "length"]`; the weighted sum is never looked at. Empty takes the
    only function, or the task's own check."""
    max_num_gen_batches: int = 10
    """filter_groups: most attempts of one rollout, the first included. An attempt draws as many
    prompts as are still missing; after the last one the run trains on what there is."""
    max_tokens: int = 0
    """filter_groups: tokens, of prompts and responses, from which on a rollout makes no further
    attempt; 0 sets no limit."""
    max_responses: int = 0
    """filter_groups: most responses that a rollout draws; 0 sets no limit."""
    prompt_records: bool = False
    """Keep of each training prompt how often it was tried and right, and when last, in the
    checkpoints and as `prompts.jsonl`. For tasks with a finite set of prompts."""
    rest: int = 0
    """Rollouts for which a prompt is passed over whose answers were all right or all wrong when it
    was last asked; 0 passes over none. Keeps `prompt_records` too."""

    describe: bool = False
    """Log what each rollout has to learn from (`signal/*`), and write the tokens that each update's
    gradient came from most into `completions.jsonl`, for the report."""

    def __post_init__(self) -> None:
        within_reason(self)
        attempts = self.max_num_gen_batches
        require(attempts >= 1, "max_num_gen_batches", attempts, "an integer >= 1")
        for name in ("max_tokens", "max_responses", "rest"):
            value = getattr(self, name)
            require(value >= 0, name, value, "an integer >= 0")

    @property
    def records_prompts(self) -> bool:
        """Whether records of prompts are kept."""
        return self.prompt_records or self.rest > 0

    @property
    def judges(self) -> bool:
        """Whether groups are judged by their accuracy."""
        return self.filter_groups or self.records_prompts or self.describe

    def check(self, task: "TaskConfig", responses: int, *, climbs: bool, grows: float) -> None:
        """Refuse what does not go together.

        Args:
            task: of the run.
            responses: of a rollout without dynamic sampling.
            climbs: whether a curriculum chooses the level.
            grows: by how much a controller may multiply the prompts; 1 where none does.

        Raises:
            ConfigError: one line that names the setting.
        """
        name = "rest" if self.rest else "prompt_records"
        expected = "none with a curriculum, whose prompts are of several levels"
        apart = not (climbs and self.records_prompts)
        require(apart, f"batch.{name}", getattr(self, name), expected)
        if not self.filter_groups:
            return
        expected = "false with an environment, whose conversations are not drawn again"
        require(not task.talks_with, "batch.filter_groups", True, expected)
        limit, most = self.max_responses, math.ceil(responses * grows)
        by = f", which a controller may make {grows:g} times as many," if grows > 1 else ""
        expected = f"0, or at least the {most} responses of a rollout{by}"
        require(limit == 0 or limit >= most, "batch.max_responses", limit, expected)
