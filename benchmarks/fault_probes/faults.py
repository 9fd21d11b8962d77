"""For each probe a subject that has the fault: hmpo, with one thing done as it was reported.

Those of rollouts and runs stand in `faults_of_runs`.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.fault_probes import models
from benchmarks.fault_probes.of_policy import alone
from benchmarks.fault_probes.protocol import Loss, Option, Tokens
from benchmarks.fault_probes.subject_hmpo import Hmpo

FAULTS: dict[str, type[Hmpo]] = {}
"""By name of the probe that has to find it."""


def plants(*names: str) -> Callable[[type[Hmpo]], type[Hmpo]]:
    """Register a subject as one that these probes must fail."""

    def register(kind: type[Hmpo]) -> type[Hmpo]:
        FAULTS.update(dict.fromkeys(names, kind))
        return kind

    return register


# ---------------------------------------------------------------------------------- objective


@plants(
    "accumulation_of_tokens",
    "accumulation_of_geometric_means",
    "accumulation_of_sequences",
    "loss_of_a_window",
)
class AveragedMicroBatches(Hmpo):
    """Each micro-batch by its own denominators, and their sum."""

    def part(self, tokens: Tokens, config: Any, whole: Tokens) -> Tensor:
        return super().part(tokens, config, tokens)


class Changed(Hmpo):
    """A loss whose result is changed afterwards."""

    def change(self, tokens: Tokens, loss: Loss) -> Loss:
        raise NotImplementedError

    def objective(self, tokens: Tokens, **options: Any) -> Loss:
        return self.change(tokens, super().objective(tokens, **options))


@plants("order_of_responses")
class ByRowNumber(Changed):
    """A row's place in the batch is in its gradient."""

    def change(self, tokens: Tokens, loss: Loss) -> Loss:
        place = torch.arange(1.0, len(tokens.new) + 1)[:, None]
        return dataclasses.replace(loss, gradient=loss.gradient * place)


@plants("sequence_weight_counted_once", "sequence_level_under_defaults")
class WeightBroadcast(Changed):
    """A response's weight on each of its tokens, not divided by their number."""

    def change(self, tokens: Tokens, loss: Loss) -> Loss:
        lengths = tokens.mask.sum(1, keepdim=True)
        return dataclasses.replace(loss, gradient=loss.gradient * lengths)


@plants("nan_in_padding")
class MaskedByProduct(Hmpo):
    """Padding is multiplied by 0 where it should be left out."""

    def part(self, tokens: Tokens, config: Any, whole: Tokens) -> Tensor:
        return super().part(tokens, config, whole) + 0 * (tokens.new * 0).sum()


@plants("padding_width")
class WidthInDenominator(Changed):
    """Divided by columns, not by tokens."""

    def change(self, tokens: Tokens, loss: Loss) -> Loss:
        return dataclasses.replace(loss, gradient=loss.gradient / tokens.mask.shape[1])


@plants("empty_response", "empty_batch")
class NoClamp(Changed):
    """0 / 0 for a row without tokens."""

    def change(self, tokens: Tokens, loss: Loss) -> Loss:
        rows = tokens.mask.sum(1) == 0
        return dataclasses.replace(loss, value=loss.value + (math.nan if rows.any() else 0.0))


@plants("masked_responses_in_denominator")
class MaskedRowsCount(Changed):
    """All rows stand in the denominator."""

    def change(self, tokens: Tokens, loss: Loss) -> Loss:
        share = tokens.mask.any(1).double().mean()
        return dataclasses.replace(loss, gradient=loss.gradient * share)


@plants("clip_direction")
class WrongSide(Hmpo):
    """Advantages of the other sign decide which bound holds."""

    def objective(self, tokens: Tokens, **options: Any) -> Loss:
        loss = super().objective(
            dataclasses.replace(tokens, advantages=-tokens.advantages), **options
        )
        return dataclasses.replace(loss, gradient=-loss.gradient)


@plants("clip_bounds_asymmetric")
class OneBound(Hmpo):
    """The upper bound is the lower one's."""

    def objective(self, tokens: Tokens, *, high: float | None = None, **options: Any) -> Loss:
        return super().objective(tokens, high=options.get("low"), **options)


@plants("clip_metric_counts_what_is_held")
class BandExits(Changed):
    """Every ratio outside the band counts as clipped."""

    def change(self, tokens: Tokens, loss: Loss) -> Loss:
        ratio = (tokens.new - tokens.old).exp()
        outside = ((ratio - 1).abs() > 0.2)[tokens.mask]
        return dataclasses.replace(loss, clip_frac=float(outside.double().mean()))


@plants("clip_metric_of_a_window")
class MeanOfMeans(Hmpo):
    """The metric of each micro-batch, averaged."""

    def clip_metric(self, parts: Sequence[Tokens], config: Any, whole: Tokens) -> float:
        found = [super(MeanOfMeans, self).clip_metric([part], config, part) for part in parts]
        return sum(found) / len(found)


@plants("kl_gradient")
class PlainK3(Hmpo):
    """k3 differentiated as it stands."""

    def objective(self, tokens: Tokens, *, beta: float = 0.0, **options: Any) -> Loss:
        loss = super().objective(tokens, **options)
        if not beta or tokens.ref is None:
            return loss
        gap = tokens.ref - tokens.new
        count = len(tokens.new)
        return dataclasses.replace(loss, gradient=loss.gradient + beta * (1 - gap.exp()) / count)


@plants("extreme_ratio")
class ExpFirst(Changed):
    """0 times an infinite ratio."""

    def change(self, tokens: Tokens, loss: Loss) -> Loss:
        ratio = (tokens.new - tokens.old).exp()
        return dataclasses.replace(loss, gradient=loss.gradient * ratio / ratio)


@plants("options_without_effect")
class Ignoring(Hmpo):
    """Takes an option and does nothing with it."""

    def options(self) -> list[Option]:
        return [*super().options(), Option("gmpo.delta", changes=False, told=False)]


@plants("correction_weights")
class WeightsLost(Hmpo):
    """Corrections are dropped on the way."""

    def part(self, tokens: Tokens, config: Any, whole: Tokens) -> Tensor:
        return super().part(dataclasses.replace(tokens, weights=None), config, whole)


# --------------------------------------------------------------------------------- advantages


@plants("group_of_one")
class RawAlone(Hmpo):
    """The reward itself where there is nothing to compare with."""

    def advantages(self, groups: Any) -> list[list[float]]:
        found = super().advantages(groups)
        return [list(g) if len(g) == 1 else a for g, a in zip(groups, found, strict=True)]


class Formula(Hmpo):
    """Advantages by a formula of one group (n,) and the batch."""

    def formula(self, r: Tensor, batch: Tensor) -> Tensor:
        raise NotImplementedError

    def advantages(self, groups: Any) -> list[list[float]]:
        batch = torch.tensor([r for group in groups for r in group])
        return [self.formula(torch.tensor(list(g)), batch).tolist() for g in groups]


@plants("dropped_reward", "infinite_reward")
class NoneIsZero(Formula):
    """A reward that is missing counts as 0, one that is infinite silences the group."""

    def formula(self, r: Tensor, batch: Tensor) -> Tensor:
        r = r.nan_to_num(nan=0.0, posinf=math.inf)
        return ((r - r.mean()) / r.std()).nan_to_num(0.0)


@plants("equal_rewards")
class TinyEpsilon(Formula):
    """Rounding noise over an epsilon of its own size."""

    def formula(self, r: Tensor, batch: Tensor) -> Tensor:
        return (r - r.sum() / len(r)) / (r.std() + 1e-8)


@plants("deviation")
class Population(Formula):
    """n where n - 1 is said."""

    def formula(self, r: Tensor, batch: Tensor) -> Tensor:
        return (r - r.mean()) / r.std(correction=0)


@plants("groups_apart")
class BatchDeviation(Formula):
    """The deviation of the batch."""

    def formula(self, r: Tensor, batch: Tensor) -> Tensor:
        return (r - r.mean()) / batch.std()


@plants("small_rewards")
class LargeEpsilon(Formula):
    """1e-4 beside the deviation."""

    def formula(self, r: Tensor, batch: Tensor) -> Tensor:
        return (r - r.mean()) / (r.std() + 1e-4)


@plants("groups_in_any_order")
class ByPlace(Hmpo):
    """Neighbours are a group, whatever their prompt."""

    def grouped_advantages(self, rewards: Any, groups: Any) -> list[float]:
        return super().grouped_advantages(rewards, sorted(groups))


# ------------------------------------------------------------------------------------- policy


@plants("left_padding_rotary")
class PaddingAttended(Hmpo):
    """Padding is read as if it were prompt."""

    def logprobs(self, model: Any, prompts: Any, responses: Any, **options: Any) -> list[Tensor]:
        width = max(map(len, prompts))
        padded = [[models.PAD] * (width - len(p)) + p for p in prompts]
        return super().logprobs(model, padded, responses, **options)


@plants("left_padding_absolute")
class PositionsFromZero(Hmpo):
    """No position ids: a padded row's first token is not at 0."""

    def logprobs(self, model: Any, prompts: Any, responses: Any, **options: Any) -> list[Tensor]:
        rollout = self.rollout_of(prompts, responses)
        out = model.eval()(
            input_ids=rollout.input_ids, attention_mask=rollout.attention_mask.long()
        )
        begin = rollout.prompt_ids.shape[1] - 1
        logits = out.logits[:, begin:-1].log_softmax(-1)
        values = logits.gather(-1, rollout.response_ids[..., None])[..., 0]
        return [row[m] for row, m in zip(values, rollout.response_mask, strict=True)]


@plants("packed_rows")
class OneSequence(Hmpo):
    """Packed rows without bounds between them."""

    def packed_logprobs(self, model: Any, prompts: Any, responses: Any) -> Any:
        before: list[int] = []
        found = []
        for prompt, response in zip(prompts, responses, strict=True):
            found.append(alone(model, before + prompt, response))
            before = before + prompt + response
        return found, True


@plants("batch_invariance")
class SharedScale(Hmpo):
    """Something is normalised over the batch."""

    def logprobs(self, model: Any, prompts: Any, responses: Any, **options: Any) -> list[Tensor]:
        found = super().logprobs(model, prompts, responses, **options)
        return [values / torch.cat(found).abs().mean() for values in found]


@plants("temperature_in_logprobs")
class Untempered(Hmpo):
    """Log-probs at temperature 1, whatever was sampled at."""

    def logprobs(self, model: Any, prompts: Any, responses: Any, **options: Any) -> list[Tensor]:
        return super().logprobs(model, prompts, responses)


@plants("recomputation_with_dropout")
class DropoutOn(Hmpo):
    """The forward pass of an update runs in training mode."""

    def logprobs(self, model: Any, prompts: Any, responses: Any, **options: Any) -> list[Tensor]:
        model.train()
        pairs = zip(prompts, responses, strict=True)
        found = []
        for prompt, response in pairs:
            logits = model(input_ids=torch.tensor([prompt + response])).logits
            rows = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            found.append(rows.gather(-1, torch.tensor(response)[:, None])[:, 0])
        return found


@plants("every_token_counts")
class ShiftedMask(Hmpo):
    """The first token is lost, and the padding behind the last is scored."""

    def logprobs(self, model: Any, prompts: Any, responses: Any, **options: Any) -> list[Tensor]:
        moved = [[*response[1:], models.PAD] for response in responses]
        longer = [p + r[:1] for p, r in zip(prompts, responses, strict=True)]
        return super().logprobs(model, longer, moved, **options)


@plants("tied_gradient")
class HeadOnly(Hmpo):
    """The embedding's own share of a tied gradient is lost."""

    def gradient(self, model: Any, *rows: Any, **options: Any) -> dict[str, Tensor]:
        found = super().gradient(model, *rows, **options)
        return {name: g * (0.3 if "embed" in name else 1.0) for name, g in found.items()}


@plants("gradient_checkpointing", "checkpointing_with_dropout")
class DrawnAnew(Hmpo):
    """Recomputed layers differ from those of the forward pass."""

    def gradient(
        self, model: Any, *rows: Any, checkpointing: bool = False, **options: Any
    ) -> dict[str, Tensor]:
        found = super().gradient(model, *rows, checkpointing=checkpointing, **options)
        return {name: g * (1.1 if checkpointing else 1.0) for name, g in found.items()}


@plants("accumulation_of_a_model")
class Averaged(Hmpo):
    """The mean of the micro-batches' means."""

    def gradient(
        self, model: Any, prompts: Any, responses: Any, advantages: Any, **options: Any
    ) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for k in range(len(prompts)):
            row = ([prompts[k]], [responses[k]], [advantages[k]])
            found = super().gradient(model, *row)
            total = {n: total.get(n, 0) + g.clone() for n, g in found.items()}
        return total


@plants("saved_policy")
class Untied(Hmpo):
    """Saved in float32."""

    def saved(self, model: Any) -> Any:
        return copy.deepcopy(model).float()
