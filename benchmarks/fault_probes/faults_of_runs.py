"""Subjects with a planted fault of rollouts and runs (see `faults`)."""

import dataclasses
import math
from typing import Any

from benchmarks.fault_probes import models
from benchmarks.fault_probes.faults import FAULTS, plants
from benchmarks.fault_probes.protocol import Sampled, Trace
from benchmarks.fault_probes.subject_hmpo import Hmpo

__all__ = ["FAULTS"]

# ----------------------------------------------------------------------------------- rollouts


class Rollouts(Hmpo):
    """A rollout that is changed afterwards."""

    def change(self, found: Sampled) -> Sampled:
        raise NotImplementedError

    def sample(self, model: Any, **options: Any) -> Sampled:
        return self.change(super().sample(model, **options))


@plants("several_end_tokens", "truncation_mask")
class OneEnd(Rollouts):
    """Only the tokenizer's own end token counts as an end."""

    def change(self, found: Sampled) -> Sampled:
        ends = [row[-1] == models.END for row in found.responses]
        return dataclasses.replace(found, finished=ends, learns=ends)


@plants("end_token_as_padding")
class EndIsPadding(Rollouts):
    """What equals the padding token is padding."""

    def change(self, found: Sampled) -> Sampled:
        rows = [[token for token in row if token != models.END] for row in found.responses]
        return dataclasses.replace(found, responses=rows)


@plants("empty_responses")
class NothingLeft(Rollouts):
    """The end token is cut off, so that an empty response has no token."""

    def change(self, found: Sampled) -> Sampled:
        rows = [row[:-1] for row in found.responses]
        return dataclasses.replace(found, responses=rows)


@plants("truncation_metric")
class WidthIsLimit(Rollouts):
    """Whoever is as long as the longest of the batch counts as truncated."""

    def change(self, found: Sampled) -> Sampled:
        lengths = [len(row) for row in found.responses]
        share = lengths.count(max(lengths) - 1) / len(lengths) + 1 / 64
        return dataclasses.replace(found, metrics={"truncated": share})


@plants("truncated_sampling")
class UncutLogprobs(Rollouts):
    """Log-probs of the whole distribution stand for those of the nucleus."""

    def change(self, found: Sampled) -> Sampled:
        return dataclasses.replace(found, behaviour=found.old)


@plants("sampler_against_trainer")
class ColdOld(Rollouts):
    """Old log-probs before the temperature."""

    def change(self, found: Sampled) -> Sampled:
        assert found.old is not None
        return dataclasses.replace(found, old=[0.7 * row for row in found.old])


@plants("group_differs")
class OneSeed(Rollouts):
    """All of a group draw the same numbers."""

    def change(self, found: Sampled) -> Sampled:
        rows = [found.responses[k // 4 * 4] for k in range(len(found.responses))]
        return dataclasses.replace(found, responses=rows)


@plants("columns_of_their_prompt")
class Tiled(Hmpo):
    """Columns are tiled where they should be repeated."""

    def sample(self, model: Any, *, reward: Any, **options: Any) -> Sampled:
        def tiled(completions: Any, **given: Any) -> Any:
            columns = {
                name: [values[k % 4 * 4] for k in range(len(values))] if name == "digit" else values
                for name, values in given.items()
            }
            return reward(completions=completions, **columns)

        return super().sample(model, reward=tiled, **options)


@plants("rewards_of_wrong_length")
class Stretched(Hmpo):
    """One reward serves all."""

    def sample(self, model: Any, *, reward: Any, **options: Any) -> Sampled:
        def stretched(completions: Any, **given: Any) -> Any:
            return reward(completions=completions, **given) * len(completions)

        return super().sample(model, reward=stretched, **options)


@plants("reward_always_none", "reward_always_zero")
class Quiet(Rollouts):
    """Says nothing and measures nothing."""

    def change(self, found: Sampled) -> Sampled:
        return dataclasses.replace(found, told=[], metrics={})


@plants("reward_that_changes_columns")
class SharedColumns(Hmpo):
    """The function is handed the data set's own objects."""

    def sample(self, model: Any, *, columns: Any, reward: Any, **options: Any) -> Sampled:
        def shared(completions: Any, **given: Any) -> Any:
            own = [part for part in columns["parts"] for _ in range(len(completions) // 2)]
            return reward(completions=completions, **{**given, "parts": own})

        return super().sample(model, columns=columns, reward=shared, **options)


@plants("doubled_bos")
class AddsBos(Hmpo):
    """The tokenizer's special tokens, whatever the text begins with."""

    def tokenised(self, prompt: Any, tokenizer: Any) -> list[int]:
        return [tokenizer.bos_token_id, *super().tokenised(prompt, tokenizer)]


# --------------------------------------------------------------------------------------- runs


class Trained(Hmpo):
    """A training whose trace is changed afterwards."""

    def change(self, trace: Trace) -> Trace:
        raise NotImplementedError

    def train(self, model: Any, **options: Any) -> Trace:
        return self.change(super().train(model, **options))


@plants("all_truncated", "one_bad_forward", "no_signal_no_step")
class NaNSteps(Trained):
    """The step is taken with a gradient that is no number."""

    def change(self, trace: Trace) -> Trace:
        return dataclasses.replace(
            trace, weights={n: w * math.nan for n, w in trace.weights.items()}
        )


@plants("resume_and_prompts", "resume_and_weights")
class Regenerates(Hmpo):
    """A resume throws the rollout in use away and samples it again."""

    def resumed(self, *, updates: int, per_rollout: int, at: int) -> tuple[Trace, Trace]:
        straight, resumed = super().resumed(updates=updates, per_rollout=per_rollout, at=at)
        again = resumed.prompts[:2] + resumed.prompts[1:]
        moved = {n: w + 1e-3 for n, w in resumed.weights.items()}
        return straight, dataclasses.replace(resumed, prompts=again, weights=moved)


@plants("schedule_of_rates")
class RolloutsAreSteps(Trained):
    """The schedule counts rollouts where updates are meant."""

    def change(self, trace: Trace) -> Trace:
        return dataclasses.replace(trace, rates=[max(0.0, 0.6 - 0.2 * k) for k in range(6)])


@plants("ratios_of_later_updates")
class OldIsNew(Trained):
    """Old log-probs are those of the update itself."""

    def change(self, trace: Trace) -> Trace:
        return dataclasses.replace(trace, drift=[0.0 for _ in trace.drift])


@plants("seeds_of_rollouts")
class SameNumbers(Trained):
    """Each rollout begins with the run's seed."""

    def change(self, trace: Trace) -> Trace:
        return dataclasses.replace(trace, completions=[trace.completions[0]] * 2)


@plants("seed_repeats_a_run")
class Unseeded(Trained):
    """Something goes on from run to run."""

    runs = 0

    def change(self, trace: Trace) -> Trace:
        self.runs += 1
        moved = {n: w + 1e-3 * self.runs for n, w in trace.weights.items()}
        return dataclasses.replace(trace, weights=moved)


@plants("prompts_of_an_epoch")
class DropLast(Trained):
    """The prompts that do not fill a rollout are dropped."""

    def change(self, trace: Trace) -> Trace:
        kept = [[p for p in rollout if p != "5>"] for rollout in trace.prompts]
        return dataclasses.replace(trace, prompts=kept)


@plants("reference_stays")
class OneModel(Hmpo):
    """The reference is the policy."""

    def reference_shift(self) -> tuple[float, float]:
        moved, _ = super().reference_shift()
        return moved, moved


@plants("reference_of_adapters")
class BaseIsReference(Hmpo):
    """The adapters are switched off for the reference, though they were trained before."""

    def reference_of(self, model: Any) -> Any:
        return models.llama().requires_grad_(False).eval()


@plants("unscored_in_evaluation")
class UnscoredIsWrong(Hmpo):
    """All that were asked stand in the denominator."""

    def mean_of(self, evaluation: Any, asked: int) -> float:
        return evaluation.mean_reward * (asked - evaluation.dropped) / asked


@plants("evaluation_of_uneven_batches")
class MeanOfBatches(Hmpo):
    """The mean of the batches' means."""

    def evaluated(self, rewards: Any) -> float:
        halves = [super(MeanOfBatches, self).evaluated(rewards[k : k + 2]) for k in (0, 2)]
        return sum(halves) / 2
