"""One turn for each response to some prompts: by our sampler on every rank, or by an engine."""

import functools
from typing import Any, NamedTuple

import torch
from torch import nn

from hmpo.config import TrainerConfig
from hmpo.engines.protocol import RolloutEngine
from hmpo.errors import EngineError
from hmpo.models.chat import PromptOptions
from hmpo.models.policy import autocast
from hmpo.ranks.world import Ranks
from hmpo.sampling.options import SamplingOptions
from hmpo.sampling.responses import Noise, sample_rollout
from hmpo.stopwatch import section
from hmpo.trainer.prompts import EncodedPrompts, Prompts, prompts_for
from hmpo.trainer.responses import with_ends
from hmpo.trainer.rows import joined_rollout
from hmpo.types import Rollout


class EngineTurn(NamedTuple):
    """An engine, and the number that the policy's present weights get.

    Example: `EngineTurn(engine, 3)` for the fourth rollout.
    """

    engine: RolloutEngine
    version: int
    send: bool = True
    """Whether it is to be given these weights; False where it has them."""


def sampled(
    policy: nn.Module,
    prompts: Prompts,
    config: TrainerConfig,
    options: SamplingOptions,
    group_size: int,
    generator: torch.Generator,
    tokenizer: Any,
    prompt_options: PromptOptions | None,
    ranks: Ranks,
    engine: EngineTurn | None,
) -> tuple[Rollout, EncodedPrompts]:
    """One turn for each response, and the prompts that were asked.

    Noise is drawn for the whole rollout, and each rank takes its rows.
    """
    if engine is not None:
        shared = (policy, prompts, config, options, group_size, generator, tokenizer)
        return _sampled_by_engine(*shared, prompt_options, *engine)
    device = next(policy.parameters()).device
    with section("sampling"), autocast(device, config):
        asked = prompts_for(policy, prompts, tokenizer, config, prompt_options)
        ids, mask = asked.ids.to(device), asked.mask.to(device)
        own = ranks.own([1.0] * len(ids))
        sample = functools.partial(
            sample_rollout,
            policy,
            options=with_ends(options, asked.ends),
            group_size=group_size,
            generator=generator,
            tokenizer=tokenizer,
        )
        if ranks.alone:
            return sample(ids, mask), asked
        ranks.agree("list of prompts", repr(torch.where(mask, ids, -1).tolist()))
        rows = tuple(prompt * group_size + g for prompt in own for g in range(group_size))
        noise = Noise(rows, len(ids) * group_size)
        part = sample(ids[own], mask[own], noise=noise) if own else None
    whole = joined_rollout(part, own, (ids, mask), group_size, options, ranks)
    return whole, asked


def _sampled_by_engine(
    policy: nn.Module,
    prompts: Prompts,
    config: TrainerConfig,
    options: SamplingOptions,
    group_size: int,
    generator: torch.Generator,
    tokenizer: Any,
    prompt_options: PromptOptions | None,
    engine: RolloutEngine,
    version: int,
    send: bool,
) -> tuple[Rollout, EncodedPrompts]:
    """One turn for each response by the present weights, and the prompts that were asked."""
    device = next(policy.parameters()).device
    with section("sampling"):
        asked = prompts_for(policy, prompts, tokenizer, config, prompt_options)
        if send:
            engine.sync(policy, version)
        drawn = engine.sample(
            asked.ids.to(device),
            asked.mask.to(device),
            with_ends(options, asked.ends),
            group_size=group_size,
            generator=generator,
            tokenizer=tokenizer,
        )
    other = drawn.versions[drawn.rollout.response_mask] != version
    if bool(other.any()):
        raise EngineError(
            f"rollout.engine: got {int(other.sum())} tokens drawn by weights other than those of "
            f"rollout {version}, expected none; start the engine anew, then resume the run"
        )
    return drawn.rollout, asked
