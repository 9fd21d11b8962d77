"""How large a run may be: what a preset wishes, and what the machine's memory leaves of it."""

import dataclasses
import importlib.util
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hmpo.config import RunConfig
from hmpo.errors import ModelError, byte_size
from hmpo.models.loading import checkpoint_layers
from hmpo.models.memory import meta_policy
from hmpo.models.policy import unwrap
from hmpo.proposal.policy import PolicyFacts, count_of
from hmpo.run.memory import Estimate, available_bytes, estimate, resident_bytes

ROOM = 0.8
"""Part of the memory that an estimate, which is rather low than high, may come to."""
CARD = 24_000_000_000
"""Bytes of the GPU that a run for one is sized for where there is none."""
RANK = 16
FEWEST = 4
"""Prompts of a rollout below which it is not made smaller."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a kind of machine is good for.

    Example: `PRESETS["laptop"].group_size == 4`.
    """

    group_size: int
    prompts: int
    """Of one rollout."""
    minibatches: int
    micro: int
    """Responses of a forward pass at most."""
    thoughts: int
    """Tokens of a response to a question that wants some thought."""
    longest: int
    """Tokens of a response at most."""
    prompt_tokens: int
    """Of a prompt at most, unless more than one in twenty is longer."""
    gpu: bool
    adapters_from: float
    """Parameters from which on adapters are trained in place of all weights."""
    evaluated: int
    """Held-out prompts of an evaluation on the way."""
    final: int
    """Of those before and after."""

    @property
    def dtype(self) -> str:
        """Precision of the weights: bfloat16 on a GPU, unless it has no instructions for that."""
        if not self.gpu:
            return "float32"
        there = torch.cuda.is_available()
        able = not there or torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if able else "float32"


PRESETS = {
    "laptop": Preset(
        group_size=4, prompts=8, minibatches=2, micro=8, thoughts=128, longest=256,
        prompt_tokens=512, gpu=False, adapters_from=2e8, evaluated=32, final=64,
    ),
    "one-gpu": Preset(
        group_size=8, prompts=32, minibatches=4, micro=16, thoughts=512, longest=1024,
        prompt_tokens=2048, gpu=True, adapters_from=2e9, evaluated=64, final=256,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A run that the memory holds.

    Example: `Fit(config=..., estimate=..., available=16 * 10**9, adapters="more than 200.0M ...")`.
    """

    config: RunConfig
    estimate: Estimate
    available: int | None
    """Bytes of the machine or card; None where nobody knows."""
    adapters: str
    """Why adapters are trained; empty where all weights are."""
    card: bool
    """Whether the size of a card was assumed."""


def response_tokens(preset: Preset, *, worked: Sequence[int], short: Sequence[int],
                    template: bool, thinks: bool) -> tuple[int, str]:  # fmt: skip
    """Tokens of a response, and why so many.

    Args:
        preset: what the machine is good for.
        worked: tokens of whole solutions in the data, if it has them.
        short: tokens of its answers.
        template: whether the policy answers messages.
        thinks: whether the policy always thinks before it answers.
    """
    if thinks:
        most = 4 * preset.longest
        return most, "the model thinks before it answers; many responses may want more"
    wanted, why = preset.thoughts, "a guess"
    if worked:
        least = preset.thoughts if template else 16
        wanted = max(least, round(1.5 * _high(worked)) + 16)
        why = f"a guess; the solutions in the data have {_high(worked)}"
    elif short and not template:
        wanted, why = max(short) + 8, f"the longest answer has {max(short)}"
    wanted = min(max(16, -(-wanted // 16) * 16), preset.longest)
    return wanted, why


def prompt_tokens(preset: Preset, lengths: Sequence[int]) -> int:
    """Tokens that a prompt may have: all that were looked at, unless few are far longer.

    Args:
        preset: what the machine is good for.
        lengths: tokens of prompts, at least one.
    """
    longest = max(lengths)
    if longest > preset.prompt_tokens:
        longest = max(preset.prompt_tokens, _high(lengths))
    return -(-longest // 16) * 16


def _high(lengths: Sequence[int]) -> int:
    """The 95th percentile, of the lengths themselves."""
    return sorted(lengths)[min(len(lengths) - 1, 95 * len(lengths) // 100)]


def fit_memory(
    config: RunConfig, preset: Preset, policy: PolicyFacts, prompt: int, fixed: Collection[str]
) -> Fit:
    """The run as large as the preset wishes and the memory allows.

    Micro batches are made smaller first, then rollouts; then layers are run again in the backward
    pass; then adapters are trained, then over bfloat16 weights.

    Args:
        config: the run, its batches as the preset has them.
        preset: where adapters begin.
        policy: what is trained.
        prompt: tokens of the longest prompts.
        fixed: settings by dotted name that are not changed.

    Raises:
        ModelError: nothing fits; one line.
        MissingDependencyError: only adapters would fit, and peft is not there.
    """
    card = preset.gpu and not torch.cuda.is_available()
    available = CARD if card else available_bytes(config)
    process = 0 if preset.gpu else resident_bytes()
    room = None if available is None else ROOM * available
    least = None
    for tried, why in _policies(config, preset, policy, fixed):
        model = meta_policy(tried.policy)
        if tried.policy.gradient_checkpointing and not _checkpoints(tried):
            continue
        while True:
            found = estimate(model, tried, prompt, process)
            if room is None or found.peak <= room:
                return Fit(
                    config=tried, estimate=found, available=available, adapters=why, card=card
                )
            least = min(found.peak, least or found.peak)
            smaller = _smaller(tried, found, room, fixed)
            if smaller is None:
                break
            tried = smaller
    raise ModelError(
        f"memory: the smallest run of this model takes about {byte_size(least or 0)}, more than "
        f"{byte_size(int(room or 0))}, which is {ROOM:.0%} of what there is; take a smaller model"
    )


def _policies(
    config: RunConfig, preset: Preset, policy: PolicyFacts, fixed: Collection[str]
) -> Iterator[tuple[RunConfig, str]]:
    """Ways to hold the policy, those that leave most of it free first, and why adapters are."""
    targets: dict[str, Any] = {} if policy.projections else {"lora_targets": "all-linear"}
    lora = {"lora_rank": RANK, "lora_alpha": 2.0 * RANK, **targets}
    again = {"gradient_checkpointing": True}
    small = "all weights would not fit into the memory"
    ways: list[tuple[dict[str, Any], str]] = [({}, ""), (again, "")]
    adapted = [lora, lora | {"dtype": "bfloat16"}, lora | {"dtype": "bfloat16"} | again]
    adapters = [(changes, small) for changes in adapted]
    if policy.adapter or "policy.lora_rank" in fixed:
        adapters = [({"dtype": "bfloat16"}, ""), ({"dtype": "bfloat16"} | again, "")]
    elif policy.parameters > preset.adapters_from:
        large = f"more than {count_of(int(preset.adapters_from))} parameters"
        there = importlib.util.find_spec("peft") is not None
        first = [(changes, large) for changes in adapted]
        ways, adapters = (first, []) if there else (ways, first)
    for changes, why in (*ways, *adapters):
        free = {name: v for name, v in changes.items() if f"policy.{name}" not in fixed}
        if len(free) == len(changes):
            way: Any = changes
            yield (
                dataclasses.replace(config, policy=dataclasses.replace(config.policy, **way)),
                why,
            )


def _checkpoints(config: RunConfig) -> bool:
    """Whether transformers can run the layers of the policy again."""
    model: nn.Module = meta_policy(config.policy)
    try:
        checkpoint_layers(unwrap(model))
    except ModelError:
        return False
    return True


def _smaller(
    config: RunConfig, found: Estimate, room: float, fixed: Collection[str]
) -> RunConfig | None:
    """The run with half of what is too large; None where it cannot be halved."""
    trainer = config.trainer
    micro, prompts = trainer.micro_batch_size or 1, config.prompts_per_rollout
    if found.update > room and micro > 1 and "trainer.micro_batch_size" not in fixed:
        half = dataclasses.replace(trainer, micro_batch_size=micro // 2)
        return dataclasses.replace(config, trainer=half)
    if found.rollout > room and prompts > FEWEST and "prompts_per_rollout" not in fixed:
        rows = prompts // 2 * trainer.group_size
        evaluation = dataclasses.replace(config.eval, batch_size=rows)
        return dataclasses.replace(config, prompts_per_rollout=prompts // 2, eval=evaluation)
    return None
