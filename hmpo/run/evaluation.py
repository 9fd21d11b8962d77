"""Success of a policy on held-out prompts, sampled, greedy and pass@k, with intervals."""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hmpo.config import RunConfig, TrainerConfig
from hmpo.environments import Environments
from hmpo.models import LoadedPolicy
from hmpo.models.chat import PromptOptions
from hmpo.randomness import keyed_generator, keyed_seed
from hmpo.ranks.world import Ranks
from hmpo.rewards import Rewards
from hmpo.stats import wilson_interval
from hmpo.tasks import Example, Task
from hmpo.tasks.base import gather_columns
from hmpo.trainer.conversation_rewards import environment_events
from hmpo.trainer.prompts import with_tokens
from hmpo.trainer.responses import reward_events
from hmpo.trainer.rollout import sample_and_score, sampling_options
from hmpo.trainer.rows import ALONE
from hmpo.types import Event

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A success rate.

    Example: `Rate(successes=430, trials=512)`: 0.840 with 95 % interval 0.806 to 0.869.
    """

    successes: int
    trials: int

    @property
    def value(self) -> float:
        """Share of successes, in [0, 1]; NaN of no trial."""
        return self.successes / self.trials if self.trials else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval."""
        return wilson_interval(self.successes, self.trials)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}] n={self.trials}"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One measurement on held-out prompts.

    Every rate counts each distinct prompt once, and only prompts all of whose responses have a
    reward: what was not scored is neither right nor wrong.
    """

    sampled: Rate
    """One response a prompt at the training temperature."""
    greedy: Rate | None = None
    """The most probable tokens."""
    pass_at: Rate | None = None
    """Prompts of which at least one of `k` samples succeeds."""
    k: int = 0
    mean_reward: float = 0.0
    """Of the first sampled response to each prompt, where it has one."""
    dropped: int = 0
    """Responses without a reward, of all that were sampled."""
    events: tuple[Event, ...] = ()
    """Why."""
    passed: str = ""
    """`sampled` prompt by prompt: hex digits of four bits each, the first prompt in the highest
    bit of the first digit, 1 for a success; the last digit is filled up with 0. As many bits as
    `sampled.trials`: a prompt that was not scored has none."""
    heldout: str = ""
    """SHA-256 (hex) of the prompts that these bits are of, as a JSON list."""

    def record(self) -> dict[str, Any]:
        """Metrics by telemetry name, and two texts that tell which prompts were passed, if any.

        Without a scored prompt there are no such texts.
        """
        metrics: dict[str, Any] = {
            "eval/mean": self.mean_reward,
            "eval/n": self.sampled.trials,
            "eval/dropped": self.dropped,
        }
        if self.passed:
            metrics |= {"eval/passed": self.passed, "eval/heldout": self.heldout}
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
            dropped=int(record.get("eval/dropped", 0)),
            passed=record.get("eval/passed", ""),
            heldout=record.get("eval/heldout", ""),
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
    success: float = 1.0
    """A response succeeds when its total reward reaches this."""
    prompt_options: PromptOptions | None = None
    """How prompts become token ids."""
    environments: Environments | None = None
    """What the policy talks with."""
    ranks: Ranks = ALONE
    """That share the work; all of them evaluate."""

    def evaluate(
        self,
        prompts: int,
        *,
        greedy: bool = True,
        pass_at: int = 0,
        step: int = 0,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Evaluation:
        """Success on held-out prompts.

        Args:
            prompts: how many; where the task has fewer distinct ones, all of them.
            greedy: measure the most probable response as well.
            pass_at: k of pass@k; 0 leaves it out.
            step: updates done, for messages and events.
            progress: told how many of all responses are sampled and scored.
        """
        examples = self._examples(prompts)
        events: list[Event] = []
        samples = max(1, pass_at)
        total, done = len(examples) * (samples + int(greedy)), 0

        def scored_more(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        scored_more(0)
        drawn = self._run(examples, samples, self.config.temperature, step, events, scored_more)
        first = [row[0] for row in drawn]
        best = self._run(examples, 1, 0.0, step, events, scored_more) if greedy else []
        pairs = [(e.prompt, r) for e, r in zip(examples, first) if not math.isnan(r)]
        scored = [reward for _, reward in pairs]
        return Evaluation(
            sampled=self._rate([[reward] for reward in first]),
            greedy=self._rate(best) if greedy else None,
            pass_at=self._rate(drawn) if pass_at else None,
            k=pass_at,
            mean_reward=sum(scored) / len(scored) if scored else math.nan,
            dropped=sum(math.isnan(reward) for row in (*drawn, *best) for reward in row),
            events=tuple(events),
            passed=hex_bits([reward >= self.success for reward in scored]),
            heldout=hash_prompts([prompt for prompt, _ in pairs]),
        )

    def _rate(self, rewards: Sequence[Sequence[float]]) -> Rate:
        """Prompts with a success, of those all of whose responses were scored."""
        scored = [row for row in rewards if not any(map(math.isnan, row))]
        return Rate(successes=sum(max(row) >= self.success for row in scored), trials=len(scored))

    def _examples(self, prompts: int) -> list[Example]:
        """The first held-out examples with prompts that differ, `prompts` of them if there are."""
        found: dict[str, Example] = {}
        for index in range(prompts):
            example = self.task.heldout(index)
            prompt = example.prompt
            found.setdefault(prompt if isinstance(prompt, str) else json.dumps(prompt), example)
        if len(found) < prompts:
            logger.warning(
                "evaluation: %d held-out prompts asked for, task %s has %d that differ: n = %d",
                prompts,
                self.task.name,
                len(found),
                len(found),
            )
        return list(found.values())

    def _run(
        self,
        examples: Sequence[Example],
        samples: int,
        temperature: float,
        step: int,
        events: list[Event],
        scored_more: Callable[[int], None],
    ) -> list[list[float]]:
        """Total rewards, `samples` for each example; in the precision of the rollouts.

        Nothing is truncated and no copy in another dtype is sampled from: what is measured is the
        policy itself. Reward faults are added to `events`; `scored_more` is told of each batch.
        """
        config = with_tokens(self.config, self.policy, self.tokenizer, self.task.stop)
        options = dataclasses.replace(
            sampling_options(config, self.task.stop),
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
                config=config,
                options=options,
                rewards=self.rewards,
                group_size=samples,
                generator=keyed_generator(self.seed, "evaluation", start),
                tokenizer=self.tokenizer,
                step=step,
                reward_seed=keyed_seed(self.seed, "evaluation rewards", start),
                prompt_options=self.prompt_options,
                environments=self.environments,
                ranks=self.ranks,
            )
            totals += scored.rewards.view(-1, samples).tolist()
            events += reward_events(scored.result, step)
            events += environment_events(scored.conversations, step)
            scored_more(len(part) * samples)
        return totals


def hex_bits(passed: Sequence[bool]) -> str:
    """Four of these to a hex digit, the first in its highest bit; the last is filled up with 0."""
    fours = (passed[start : start + 4] for start in range(0, len(passed), 4))
    return "".join(f"{sum(8 >> i for i, one in enumerate(four) if one):x}" for four in fours)


def hash_prompts(prompts: Sequence[Any]) -> str:
    """SHA-256 (hex) of prompts in their order: of the JSON list of them, in ASCII."""
    return hashlib.sha256(json.dumps(list(prompts)).encode("ascii")).hexdigest()


def make_evaluator(
    config: RunConfig,
    loaded: LoadedPolicy,
    task: Task,
    rewards: Rewards,
    settings: TrainerConfig,
    options: PromptOptions,
    environments: Environments | None,
    ranks: Ranks = ALONE,
) -> Evaluator:
    """What measures a run's policy, in the run itself and afterwards.

    Args:
        config: the run.
        loaded: its policy.
        task: where prompts come from.
        rewards: what scores responses.
        settings: the trainer's, with token ids.
        options: how prompts become token ids.
        environments: what the policy talks with; None for one turn a response.
        ranks: that share the work.
    """
    return Evaluator(
        policy=loaded.model,
        tokenizer=loaded.tokenizer,
        task=task,
        rewards=rewards,
        config=settings,
        batch_size=config.eval.batch_size,
        seed=config.seed,
        success=config.eval.success,
        prompt_options=options,
        environments=environments,
        ranks=ranks,
    )
