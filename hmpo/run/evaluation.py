"""Success of a policy on held-out prompts, sampled, greedy and pass@k, with intervals."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hmpo.config import TrainerConfig
from hmpo.randomness import keyed_generator
from hmpo.rewards import Rewards
from hmpo.stats import wilson_interval
from hmpo.tasks import Example, Task
from hmpo.trainer.rollout import sample_and_score, sampling_options
from hmpo.types import Metrics

SUCCESS = 1.0
"""A response succeeds when its total reward reaches this."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A success rate.

    Example: `Rate(successes=430, trials=512)`: 0.840 with 95 % interval 0.806 to 0.869.
    """

    successes: int
    trials: int

    @property
    def value(self) -> float:
        """Share of successes, in [0, 1]."""
        return self.successes / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval."""
        return wilson_interval(self.successes, self.trials)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}] n={self.trials}"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One measurement on held-out prompts; every rate counts prompts once."""

    sampled: Rate
    """One response a prompt at the training temperature."""
    greedy: Rate | None = None
    """The most probable tokens."""
    pass_at: Rate | None = None
    """Prompts of which at least one of `k` samples succeeds."""
    k: int = 0
    mean_reward: float = 0.0
    """Of the sampled responses that have one."""

    def record(self) -> Metrics:
        """Metrics by telemetry name."""
        metrics: Metrics = {"eval/mean": self.mean_reward, "eval/n": self.sampled.trials}
        rates = {"sampled": self.sampled, "greedy": self.greedy, "pass_at_k": self.pass_at}
        for name, rate in rates.items():
            if rate is None:
                continue
            low, high = rate.interval
            metrics |= {
                f"eval/{name}": rate.value,
                f"eval/{name}_k": rate.successes,
                f"eval/{name}_n": rate.trials,
                f"eval/{name}_low": low,
                f"eval/{name}_high": high,
            }
        if self.pass_at is not None:
            metrics["eval/k"] = self.k
        return metrics

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Evaluation":
        """The evaluation that `record` described."""

        def rate(name: str) -> Rate | None:
            if f"eval/{name}_n" not in record:
                return None
            return Rate(
                successes=int(record[f"eval/{name}_k"]), trials=int(record[f"eval/{name}_n"])
            )

        sampled = rate("sampled")
        assert sampled is not None, "every evaluation samples"
        return cls(
            sampled=sampled,
            greedy=rate("greedy"),
            pass_at=rate("pass_at_k"),
            k=int(record.get("eval/k", 0)),
            mean_reward=float(record["eval/mean"]),
        )


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Measures a policy on the first held-out prompts of a task.

    The sampling noise is the same at each call, so that two measurements of one run differ by
    the policy alone.
    """

    policy: nn.Module
    tokenizer: Any
    task: Task
    rewards: Rewards
    config: TrainerConfig
    batch_size: int = 128
    seed: int = 0

    def evaluate(self, prompts: int, *, greedy: bool = True, pass_at: int = 0) -> Evaluation:
        """Success on `prompts` held-out prompts.

        Args:
            prompts: how many.
            greedy: measure the most probable response as well.
            pass_at: k of pass@k; 0 leaves it out.
        """
        examples = [self.task.heldout(index) for index in range(prompts)]
        samples = max(1, pass_at)
        totals = self._run(examples, samples, self.config.temperature)
        successes = [[reward >= SUCCESS for reward in row] for row in totals]
        rewards = [row[0] for row in totals if not math.isnan(row[0])]
        best = None
        if greedy:
            best = Rate(
                successes=sum(row[0] >= SUCCESS for row in self._run(examples, 1, 0.0)),
                trials=prompts,
            )
        passed = Rate(successes=sum(any(row) for row in successes), trials=prompts)
        return Evaluation(
            sampled=Rate(successes=sum(row[0] for row in successes), trials=prompts),
            greedy=best,
            pass_at=passed if pass_at else None,
            k=pass_at,
            mean_reward=sum(rewards) / len(rewards) if rewards else math.nan,
        )

    def _run(
        self, examples: Sequence[Example], samples: int, temperature: float
    ) -> list[list[float]]:
        """Total rewards, `samples` for each example; in the precision of the rollouts.

        Nothing is truncated and no copy in another dtype is sampled from: what is measured is the
        policy itself.
        """
        options = dataclasses.replace(
            sampling_options(self.config, self.task.stop),
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            dtype=None,
        )
        totals: list[list[float]] = []
        size = max(1, self.batch_size // samples)
        for start in range(0, len(examples), size):
            part = examples[start : start + size]
            scored = sample_and_score(
                self.policy,
                [example.prompt for example in part],
                gather_columns(part),
                config=self.config,
                options=options,
                rewards=self.rewards,
                group_size=samples,
                generator=keyed_generator(self.seed, "evaluation", start),
                tokenizer=self.tokenizer,
            )
            totals += scored.rewards.view(-1, samples).tolist()
        return totals


def gather_columns(examples: Sequence[Example]) -> dict[str, list[Any]]:
    """Columns of several examples, side by side; a column that one lacks holds None there."""
    names = sorted({name for example in examples for name in example.columns})
    return {name: [example.columns.get(name) for example in examples] for name in names}
