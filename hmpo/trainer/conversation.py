"""Conversations of a policy with environments, turn after turn, as one rollout.

Every turn is drawn by the sampler of ordinary rollouts, all conversations that go on as one batch.
What a row draws in a turn depends on the rollout's seed, the turn and the row alone: not on which
others still talk. The first turn of all is an ordinary rollout, to the bit.

The ids that were drawn are the ids that stand in the rollout; only what an environment adds is
encoded (`hmpo.models.turns`). `TrainerConfig.max_length` bounds everything behind the prompt, what
is added included.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hmpo.config import TrainerConfig
from hmpo.environments.pool import Environments, Session
from hmpo.environments.protocol import Opening
from hmpo.environments.protocol import opening as opening_of
from hmpo.errors import ConversationError, ModelError
from hmpo.models.chat import PromptOptions, prompt_rows, turn_end_ids
from hmpo.models.policy import autocast
from hmpo.models.probe import policy_facts
from hmpo.models.tokens import left_padded
from hmpo.models.turns import ids_behind, text_ids_behind
from hmpo.randomness import keyed_generator
from hmpo.rewards.values import shown
from hmpo.sampling.options import SamplingOptions
from hmpo.sampling.responses import Noise, sample_rollout
from hmpo.stopwatch import section
from hmpo.trainer.responses import texts_of, with_ends
from hmpo.types import Metrics, Rollout


@dataclass(eq=False, kw_only=True)
class Conversation:
    """One conversation while it is had."""

    session: Session
    opening: Opening
    prompt: list[int] = field(default_factory=list)
    """Ids of the opening."""
    ids: list[int] = field(default_factory=list)
    """Everything behind it."""
    sampled: list[bool] = field(default_factory=list)
    """Which of them the policy wrote."""
    old: list[float] = field(default_factory=list)
    sampling: list[float] = field(default_factory=list)
    """Log-probs of those ids; 0 where nothing was sampled."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    turn: list[int] = field(default_factory=list)
    """Ids of the turn that was drawn last."""
    text: str = ""
    """That turn as environments see it."""
    drawn: list[int] = field(default_factory=list)
    """Ids of all turns as the sampler gave them."""
    turns: int = 0
    reward: float = 0.0
    over: bool = False
    finished: bool = False
    """Over by itself, not at a limit or by a fault."""
    at_limit: bool = False
    """Over because of `max_turns`."""
    fault: str = ""

    def write(self, ids: list[int], old: list[float], sampling: list[float]) -> None:
        """Take ids that the policy wrote."""
        self.ids += ids
        self.sampled += [True] * len(ids)
        self.old += old
        self.sampling += sampling
        self.turns += 1

    def add(self, ids: list[int]) -> None:
        """Take ids that the environment adds."""
        self.ids += ids
        self.sampled += [False] * len(ids)
        self.old += [0.0] * len(ids)
        self.sampling += [0.0] * len(ids)


@dataclass(frozen=True, kw_only=True)
class Conversations:
    """Those of a rollout, over.

    Example: 2 prompts, groups of 4: 8 openings, 8 completions, 8 rewards.
    """

    rollout: Rollout
    openings: list[Any]
    """How each began: text or messages."""
    completions: list[Any]
    """What reward functions see: the messages behind the opening, or all of the text."""
    texts: list[str]
    """All of each behind its opening as text."""
    token_ids: list[list[int]]
    """And as ids, without padding."""
    rewards: list[float]
    """What environments gave; NaN where one failed."""
    metrics: Metrics
    faults: dict[int, str]
    """By conversation, what failed."""


def converse(
    policy: nn.Module,
    prompts: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    *,
    environments: Environments,
    config: TrainerConfig,
    options: SamplingOptions,
    group_size: int,
    generator: torch.Generator,
    prompt_options: PromptOptions | None = None,
) -> Conversations:
    """Have a conversation for each response to these prompts.

    Args:
        policy: a causal language model.
        prompts: B of them, text or messages.
        columns: per-prompt values, told to the environments.
        environments: what the policy talks with.
        config: precision, and what becomes of faults.
        options: how turns are drawn.
        group_size: G, conversations per prompt.
        generator: of the first turn; those of the others are made from its seed.
        prompt_options: variables of the chat template, and a limit of the openings' length.

    Raises:
        ConversationError: an environment failed, and that is not to be skipped.
    """
    tokenizer, device = environments.tokenizer, next(policy.parameters()).device
    asked = prompt_options or PromptOptions()
    with section("rewards"):
        talks = _begin(prompts, columns, environments, config, group_size, asked)
    ends = turn_end_ids(tokenizer) if any(talk.session.chat for talk in talks) else ()
    options = with_ends(options, ends)
    rounds, drawn = 0, None
    while active := [i for i, talk in enumerate(talks) if not talk.over]:
        for part in _parts(policy, talks, active, options.max_length):
            draw = generator if rounds == 0 else _of_turn(generator, rounds)
            with section("sampling"), autocast(device, config):
                drawn = _sample(policy, talks, part, options, group_size, draw, tokenizer)
            with section("rewards"):
                _take(talks, part, drawn, options, tokenizer, ends)
        with section("rewards"):
            for i in active:
                _answer(talks[i], environments, options.max_length, asked)
                _stop_at(talks[i], i, config)
        rounds += 1
    assert drawn is not None, "a rollout has conversations"
    with section("rewards"):
        for i, talk in enumerate(talks):
            try:
                talk.reward += 0.0 if talk.fault else talk.session.end()
            except ConversationError as error:
                talk.fault = str(error)
                _stop_at(talk, i, config)
        return _over(talks, drawn, group_size, options.pad_token, tokenizer)


def _begin(
    prompts: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    environments: Environments,
    config: TrainerConfig,
    group_size: int,
    options: PromptOptions,
) -> list[Conversation]:
    """The conversations as their environments open them.

    One that could not be opened begins with the prompt, in the form of the others, and ends at its
    first turn: a row of a rollout has at least a token.
    """
    talks: list[Conversation] = []
    sessions = environments.take(len(prompts) * group_size)
    for i, session in enumerate(sessions):
        row = i // group_size
        talk = Conversation(session=session, opening=prompts[row])
        try:
            talk.opening = session.open(prompts[row], {k: v[row] for k, v in columns.items()})
            talk.prompt = _opened(talk, environments, options)
        except (ConversationError, ModelError) as error:
            talk.fault = str(error)
            _stop_at(talk, i, config)
        talks.append(talk)
    chat = bool(environments.schemas) or any(t.session.chat for t in talks if not t.fault)
    for i, talk in enumerate(talks):
        if talk.fault:
            talk.opening = opening_of(prompts[i // group_size], None, chat=chat)
            talk.session.chat = not isinstance(talk.opening, str)
            talk.prompt, talk.over = _opened(talk, environments, options), False
    return talks


def _opened(talk: Conversation, environments: Environments, options: PromptOptions) -> list[int]:
    """Token ids of an opening."""
    tokenizer, tools = environments.tokenizer, environments.schemas
    return prompt_rows(tokenizer, [talk.opening], options, tools=tools)[0]


def _of_turn(generator: torch.Generator, turn: int) -> torch.Generator:
    """The generator of a later turn, made anew for each part of a batch."""
    return keyed_generator(generator.initial_seed(), "turn", turn)


def _parts(
    policy: nn.Module, talks: list[Conversation], active: list[int], length: int
) -> list[list[int]]:
    """The conversations that go on, in as few batches as the policy's positions allow: one.

    A batch draws as many tokens as its emptiest conversation has room for, behind its longest.
    """
    facts = policy_facts(policy)
    limits = [limit for limit in (facts.context, facts.one_rope) if limit is not None]
    widest = min(limits, default=math.inf)
    widest = max(widest, *(len(talks[i].prompt) + length for i in active))  # refused elsewhere
    parts: list[list[int]] = []
    ends: list[tuple[int, int]] = []
    for i in sorted(active, key=lambda i: (len(talks[i].ids), i)):
        read, room = len(talks[i].prompt) + len(talks[i].ids), length - len(talks[i].ids)
        longest, most = (max(ends[-1][0], read), ends[-1][1]) if ends else (0, 0)
        if ends and longest + most <= widest:
            parts[-1].append(i)
            ends[-1] = longest, most
        else:
            parts.append([i])
            ends.append((read, room))
    return [sorted(part) for part in parts]


def _sample(
    policy: nn.Module,
    talks: list[Conversation],
    part: list[int],
    options: SamplingOptions,
    group_size: int,
    generator: torch.Generator,
    tokenizer: Any,
) -> Rollout:
    """One turn of each of these conversations, a row each."""
    device = next(policy.parameters()).device
    rows = [talks[i].prompt + talks[i].ids for i in part]
    room = max(options.max_length - len(talks[i].ids) for i in part)
    groups = [rows[i : i + group_size] for i in range(0, len(rows), group_size)]
    alike = len(part) == len(talks) and all(row == group[0] for group in groups for row in group)
    first = alike and not any(talk.ids for talk in talks)
    ids, mask = left_padded([group[0] for group in groups] if first else rows, options.pad_token)
    return sample_rollout(
        policy,
        ids.to(device),
        mask.to(device),
        dataclasses.replace(options, max_length=room),
        group_size=group_size if first else 1,
        generator=generator,
        tokenizer=tokenizer,
        noise=None if first else Noise(tuple(part), len(talks)),
    )


def _take(
    talks: list[Conversation],
    part: list[int],
    rollout: Rollout,
    options: SamplingOptions,
    tokenizer: Any,
    ends: Sequence[int],
) -> None:
    """Add what was drawn to the conversations, each up to its own room."""
    ids, mask = rollout.response_ids.cpu(), rollout.response_mask.cpu()
    old, sampling = rollout.old_logprobs.cpu(), rollout.sampling_logprobs.cpu()
    room = torch.tensor([options.max_length - len(talks[i].ids) for i in part])
    kept = mask & (torch.arange(mask.shape[1]) < room.unsqueeze(1))
    whole = ((kept == mask).all(1) & rollout.finished.cpu()).tolist()
    texts = texts_of(tokenizer, ids, kept, options.stop, ends)
    for row, i in enumerate(part):
        talk, here = talks[i], kept[row]
        talk.finished, talk.text = whole[row], texts[row]
        talk.turn = ids[row, here].tolist()
        talk.drawn += talk.turn
        talk.write(talk.turn, old[row, here].tolist(), sampling[row, here].tolist())


def _answer(
    talk: Conversation, environments: Environments, length: int, options: PromptOptions
) -> None:
    """Let the environment answer the turn that was drawn last, and add what it says.

    A turn that was cut has no room behind it: an environment with `step` sees it, tools do not.
    """
    tokenizer, cut = environments.tokenizer, not talk.finished
    talk.messages.append({"role": "assistant", "content": talk.text})
    talk.over = cut
    if talk.fault or (cut and not environments.steps):
        return
    try:
        before = talk.prompt + talk.ids[: len(talk.ids) - len(talk.turn)]
        told, reward, done = talk.session.step(talk.text, before, talk.turn, cut=cut)
        talk.reward += reward
        talk.at_limit = not (cut or done) and talk.turns == environments.max_turns
        if cut or done or talk.at_limit:
            talk.over, talk.finished = True, done and not cut
            return
        if isinstance(told, str):
            ids, said = text_ids_behind(tokenizer, told), [{"role": "user", "content": told}]
        else:
            shown_with = {"tools": environments.schemas, "options": options.template}
            ids, said = ids_behind(tokenizer, talk.turn, told, **shown_with), told
    except (ConversationError, ModelError) as error:
        talk.fault = str(error)
        return
    if len(talk.ids) + len(ids) >= length:  # no room for another turn
        talk.over, talk.finished = True, False
        return
    talk.add(ids)
    talk.messages += said


def _stop_at(talk: Conversation, row: int, config: TrainerConfig) -> None:
    """End a conversation whose environment failed, or the run.

    Raises:
        ConversationError: faults are not to be skipped.
    """
    if not talk.fault:
        return
    if config.on_reward_error == "raise":
        raise ConversationError(
            f"conversation {row}, turn {talk.turns} (it began {shown(talk.opening, 60)}): "
            f"{talk.fault}; or drop and count with on_reward_error = 'skip'"
        )
    talk.reward, talk.over, talk.finished = math.nan, True, False


def _rollout(talks: list[Conversation], drawn: Rollout, group_size: int, pad_token: int) -> Rollout:
    """The rollout of conversations that are over, of which `drawn` is some turn."""
    prompt_ids, prompt_mask = left_padded([talk.prompt for talk in talks], pad_token)
    lengths = torch.tensor([len(talk.ids) for talk in talks])
    attended = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)

    def table(rows: list[list[Any]], fill: bool | int, like: Tensor) -> Tensor:
        flat = torch.tensor([x for row in rows for x in row], dtype=like.dtype)
        whole = torch.full(attended.shape, fill, dtype=like.dtype)
        return whole.masked_scatter(attended, flat).to(like.device)

    mask = table([talk.sampled for talk in talks], False, drawn.response_mask)
    rollout = Rollout(
        prompt_ids=prompt_ids.to(mask.device),
        prompt_mask=prompt_mask.to(mask.device),
        response_ids=table([talk.ids for talk in talks], pad_token, drawn.response_ids),
        response_mask=mask,
        old_logprobs=table([talk.old for talk in talks], 0, drawn.old_logprobs),
        sampling_logprobs=table([talk.sampling for talk in talks], 0, drawn.sampling_logprobs),
        finished=torch.tensor([talk.finished for talk in talks], device=mask.device),
        group_size=group_size,
        fast=drawn.fast,
        attended_mask=None if bool((mask.cpu() == attended).all()) else attended.to(mask.device),
    )
    trained = rollout.response_ids[mask].tolist()
    assert trained == [x for talk in talks for x in talk.drawn], "what was drawn is trained on"
    return rollout


def _over(
    talks: list[Conversation], drawn: Rollout, group_size: int, pad_token: int, tokenizer: Any
) -> Conversations:
    """Conversations that are over, and what was said in them."""
    rollout = _rollout(talks, drawn, group_size, pad_token)
    texts = [tokenizer.decode(t.ids, skip_special_tokens=not t.session.chat) for t in talks]
    return Conversations(
        rollout=rollout,
        openings=[talk.opening for talk in talks],
        completions=[t.messages if t.session.chat else x for t, x in zip(talks, texts)],
        texts=texts,
        token_ids=[talk.ids for talk in talks],
        rewards=[talk.reward for talk in talks],
        metrics=_metrics(talks),
        faults={i: talk.fault for i, talk in enumerate(talks) if talk.fault},
    )


def _metrics(talks: list[Conversation]) -> Metrics:
    """Metrics of a rollout's conversations."""
    count = len(talks)
    calls, failed = (sum(getattr(t.session, n) for t in talks) for n in ("calls", "failed"))
    metrics: Metrics = {
        "turns/mean": sum(talk.turns for talk in talks) / count,
        "turns/max": float(max(talk.turns for talk in talks)),
        "turns/limit_frac": sum(talk.at_limit for talk in talks) / count,
        "environment/errors": float(sum(bool(talk.fault) for talk in talks)),
    }
    if talks[0].session.all.schemas:
        metrics |= {"tools/mean": calls / count, "tools/failed_frac": failed / max(calls, 1)}
    return metrics
