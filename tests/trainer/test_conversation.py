"""Conversations: what is sampled, what is added, what is trained on, and how they end."""

import dataclasses
import math

import pytest
import torch

from hmpo.config import GSPOConfig, ObjectiveConfig, PowerMeanConfig
from hmpo.environments import Environments
from hmpo.errors import ConfigError, ConversationError
from hmpo.logprobs.responses import token_logprobs
from hmpo.models import character_tokenizer
from hmpo.models.policy import trained_state
from hmpo.randomness import keyed_generator
from hmpo.trainer import PowerMeanTrainer
from hmpo.trainer.conversation import converse
from hmpo.trainer.gspo import GSPOTrainer
from hmpo.trainer.rollout import sampling_options
from tests.environments.games import ALPHABET, Chat, Echo, Endless, Fails, OneTurn, add
from tests.models.templates import CHATML, byte_tokenizer
from tests.support import tiny_llama

TOKENIZER = character_tokenizer(ALPHABET)
PROMPTS = ["a:", "abc:"]
CONFIG = PowerMeanConfig(
    group_size=4, max_length=24, minibatches=2, eos_token=2, pad_token=0,
    objective=ObjectiveConfig(segments="turn"),
)  # fmt: skip


def policy(vocabulary=None, **changes):
    vocabulary = len(TOKENIZER) if vocabulary is None else vocabulary
    return tiny_llama(vocabulary, spread=0.1, **changes)


def ends_often(tokenizer=TOKENIZER):
    """Ids that end a turn: the end token, and letters enough for turns of a few tokens."""
    return (2, *tokenizer.convert_tokens_to_ids(list("bcdfghjklm")))


def talk(environment, *, model=None, tokenizer=TOKENIZER, config=CONFIG, seed=0, **more):
    config = dataclasses.replace(config, eos_token=ends_often(tokenizer), **more)
    model = policy(len(tokenizer)) if model is None else model
    environments = environment
    if not isinstance(environment, Environments):
        environments = Environments(environment, tokenizer=tokenizer)
    return converse(
        model, PROMPTS, {}, environments=environments, config=config,
        options=sampling_options(config, ()), group_size=config.group_size,
        generator=keyed_generator(seed, "rollout", 0),
    )  # fmt: skip


def test_sampled_and_added_tokens_alternate_and_are_told_apart():
    talked = talk(Echo)
    rollout = talked.rollout
    assert rollout.attended_mask is not None
    several = 0
    for i, text in enumerate(talked.texts):
        real = rollout.attended_mask[i]
        assert rollout.response_ids[i][real].tolist() == talked.token_ids[i]
        added = real & ~rollout.response_mask[i]
        told = TOKENIZER.decode(rollout.response_ids[i][added])
        several += bool(told)
        turns = TOKENIZER.decode(rollout.response_ids[i][rollout.response_mask[i]])
        assert sorted(told + turns) == sorted(TOKENIZER.decode(talked.token_ids[i]))
        assert all(part[1:-1].isdigit() for part in told.replace("><", "> <").split())
        assert not rollout.old_logprobs[i][~rollout.response_mask[i]].any()
        assert text == TOKENIZER.decode(talked.token_ids[i], skip_special_tokens=True)
    assert several > 2, "some conversations must have two turns for this to mean anything"
    assert talked.metrics["turns/mean"] > 1 and talked.metrics["turns/limit_frac"] == 0


@pytest.mark.parametrize("decoder", ["auto", "module"])
def test_recorded_log_probs_are_those_of_the_whole_conversation(decoder):
    """Each turn reads all that stands before it, what the environment added included."""
    model = policy()
    rollout = talk(Echo, model=model, decoder=decoder).rollout
    again = token_logprobs(
        model, rollout.input_ids, rollout.attention_mask, rollout.response_ids.shape[1],
        counted=rollout.counted,
    )  # fmt: skip
    torch.testing.assert_close(rollout.old_logprobs, again, rtol=0, atol=2e-5)
    assert rollout.fast == (decoder == "auto")


def test_what_a_row_draws_does_not_depend_on_who_else_talks():
    """With an environment that ends all others at once, the rest say the same."""

    class Some(Echo):
        made = 0

        def __init__(self):
            type(self).made += 1
            self.stays = type(self).made in (2, 7)

        def step(self, completion):
            told, reward, done = super().step(completion)
            return told, reward, done or not self.stays

    everyone, some = talk(Echo), talk(Some)
    for i in (1, 6):
        assert some.token_ids[i] == everyone.token_ids[i]
    assert sum(map(len, some.token_ids)) < sum(map(len, everyone.token_ids))


def test_one_turn_is_an_ordinary_rollout_to_the_bit():
    def reward(completions, **_):
        return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]

    states, records = [], []
    for environment, function in ((None, reward), (OneTurn, None)):
        model = policy()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = dataclasses.replace(CONFIG, objective=ObjectiveConfig())
        trainer = PowerMeanTrainer(
            model, None, optimizer, config, function, tokenizer=TOKENIZER, environment=environment
        )
        records.append([trainer.update_step(PROMPTS) for _ in range(2)])
        states.append(trained_state(model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    names = [name for name in records[0][0] if not name.startswith("reward/reward")]
    for before, after in zip(*records, strict=True):
        assert [before[n] for n in names] == pytest.approx([after[n] for n in names], nan_ok=True)


def test_a_conversation_is_cut_at_the_context_and_at_the_turns():
    talked = talk(Endless)
    assert not talked.rollout.finished.any() and talked.rollout.response_ids.shape[1] <= 24
    assert talked.metrics["turns/limit_frac"] < 1
    limited = talk(Environments(Endless, tokenizer=TOKENIZER, max_turns=2), max_length=200)
    ended = [i for i in range(8) if len(limited.token_ids[i]) < 200]
    assert ended and limited.metrics["turns/limit_frac"] == len(ended) / 8
    assert not limited.rollout.finished.any() and limited.metrics["turns/max"] == 2
    assert [limited.rewards[i] for i in ended] == [0.5] * len(ended)


def test_a_failing_environment_stops_the_run_or_is_counted():
    Fails.made = 0
    with pytest.raises(ConversationError, match="raised ValueError: lost the thread") as info:
        talk(Fails, max_length=60)
    assert "turn 2" in str(info.value) and "\n" not in str(info.value)
    Fails.made = 0
    talked = talk(Fails, max_length=60, on_reward_error="skip")
    lost = [i for i, reward in enumerate(talked.rewards) if math.isnan(reward)]
    assert lost and sorted(talked.faults) == lost and all(i % 2 for i in lost)
    assert talked.metrics["environment/errors"] == len(lost)
    assert not talked.rollout.finished[lost].any()


def test_no_text_is_a_fault_where_a_turn_would_follow_and_nothing_where_none_does():
    class Mute(Endless):
        def step(self, completion):
            return "", 0.25, False

    for turns, faulty in ((1, False), (2, True)):
        environments = Environments(Mute, tokenizer=TOKENIZER, max_turns=turns)
        talked = talk(environments, max_length=60, on_reward_error="skip")
        assert len(talked.faults) == (8 if faulty else 0)
    assert all("makes no token" in fault for fault in talked.faults.values())


def test_a_dropped_conversation_is_an_event_and_left_out_of_the_loss():
    Fails.made = 0
    model = policy()
    config = dataclasses.replace(
        CONFIG, on_reward_error="skip", eos_token=ends_often(), max_length=60
    )
    trainer = PowerMeanTrainer(
        model, None, torch.optim.SGD(model.parameters(), lr=0.1), config, None,
        tokenizer=TOKENIZER, environment=Fails,
    )  # fmt: skip
    record = trainer.update_step(PROMPTS)
    events = [event for event in trainer.drain_events() if event.name == "environment_error"]
    assert len(events) == record["environment/errors"] == record["reward/dropped"] > 0
    assert "raised ValueError" in events[0].data["detail"]


@pytest.mark.parametrize("kind", ["power_mean", "gspo"])
def test_trainers_learn_from_conversations_and_resume_between_updates(kind):
    """Lag and checkpoint: the run that was put together again is the run that went through."""
    results = []
    for cut in (False, True):
        model = policy()
        trainer = make(kind, model)
        for step in range(4):
            trainer.begin_rollout(PROMPTS, {})
            while trainer.pending_updates:
                record = trainer.next_update()
                if cut and step == 2:
                    state = trainer.state_dict()
                    model = policy(seed=9)
                    trainer = make(kind, model)
                    trainer.load_state_dict(state)
        results.append((record, trained_state(model)))
    assert repr(results[0][0]) == repr(results[1][0])
    assert all(torch.equal(results[0][1][name], value) for name, value in results[1][1].items())
    assert results[0][0]["turns/mean"] > 1


def make(kind, model):
    keys = {"group_size": 4, "max_length": 24, "minibatches": 2, "eos_token": ends_often()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    more = {"tokenizer": TOKENIZER, "environment": Echo, "lag": 1}
    if kind == "gspo":
        return GSPOTrainer(model, None, optimizer, GSPOConfig(**keys), None, **more)
    config = dataclasses.replace(CONFIG, **keys)
    return PowerMeanTrainer(model, None, optimizer, config, None, **more)


def test_messages_are_rendered_by_the_template_and_seen_by_rewards():
    tokenizer = byte_tokenizer(CHATML)
    begin = [{"role": "user", "content": "hi"}]

    class Opens(Chat):
        def reset(self, **columns):
            super().reset()
            return begin

    talked = talk(Opens, tokenizer=tokenizer, max_length=200)
    assert talked.openings == [begin] * 8
    prompt = tokenizer.apply_chat_template(begin, add_generation_prompt=True, return_dict=False)
    rollout = talked.rollout
    assert rollout.prompt_ids[0][rollout.prompt_mask[0]].tolist() == prompt
    several = [messages for messages in talked.completions if len(messages) > 1]
    assert several, "some conversations must have two turns for this to mean anything"
    for messages in several:
        roles = [message["role"] for message in messages]
        assert roles == ["assistant", "user"] * (len(roles) // 2) + ["assistant"] * (len(roles) % 2)


def test_a_policy_with_few_positions_talks_in_parts_and_says_the_same():
    narrow, wide = (policy(max_position_embeddings=n) for n in (30, 256))
    wide.load_state_dict(narrow.state_dict())
    assert talk(Echo, model=narrow).token_ids == talk(Echo, model=wide).token_ids


def test_an_environment_needs_a_tokenizer():
    model = policy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="environment: got no tokenizer"):
        PowerMeanTrainer(model, None, optimizer, CONFIG, None, environment=Echo)


class Scripted(torch.nn.Module):
    """A causal policy that writes a text in each turn, whatever it is asked."""

    def __init__(self, tokenizer, turns):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.size = len(tokenizer)
        encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
        self.header, self.turns = encode("<|im_start|>assistant\n"), list(map(encode, turns))

    def forward(self, ids):
        logits = torch.zeros(*ids.shape, self.size)
        for row, places in zip(ids.tolist(), logits):
            width, turn, start = len(self.header), -1, len(row)
            for at in range(len(row)):
                if row[max(0, at - width + 1) : at + 1] == self.header:
                    turn, start = turn + 1, at
                script = self.turns[turn] if 0 <= turn < len(self.turns) else []
                if 0 <= at - start < len(script):
                    places[at, script[at - start]] = 100.0
        return logits + self.weight


def test_a_policy_that_calls_a_tool_is_told_what_it_said():
    """Through a trainer: the call, its answer in the template's own form, and the last turn."""
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.chat_template += "{#- <tool_call> #}"
    call = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call><|im_end|>'
    model = Scripted(tokenizer, [call, "it is 5<|im_end|>"])
    seen = []

    def judge(prompts, completions, **_):
        seen.extend(zip(prompts, completions))
        return [float("5" in messages[-1]["content"]) for messages in completions]

    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    config = dataclasses.replace(CONFIG, max_length=300, eos_token=end, group_size=2)
    config = dataclasses.replace(config, qk_clip=False)
    trainer = PowerMeanTrainer(
        model, None, torch.optim.SGD(model.parameters(), lr=0.0), config, judge,
        tokenizer=tokenizer, tools=[add],
    )  # fmt: skip
    trainer.begin_rollout(["2+3?"], {})
    prompt, completion = seen[0]
    assert prompt == [{"role": "user", "content": "2+3?"}]
    assert completion == [
        {"role": "assistant", "content": call.removesuffix("<|im_end|>")},
        {"role": "tool", "name": "add", "content": "5"},
        {"role": "assistant", "content": "it is 5"},
    ]
    rollout = trainer.batch.rollout
    assert rollout.finished.all()
    whole = tokenizer.apply_chat_template(
        [*prompt, *completion], tools=trainer.collector.environments.schemas, tokenize=False
    )
    ids = rollout.input_ids[0][rollout.attention_mask[0]]
    assert tokenizer.decode(ids) + "\n" == whole
    sampled = rollout.response_ids[0][rollout.response_mask[0]]
    assert tokenizer.decode(sampled) == call + "it is 5<|im_end|>"
    record = trainer.next_update()
    assert record["tools/mean"] == 1 and record["tools/failed_frac"] == 0
    assert record["turns/mean"] == 2 and record["reward/mean"] == 1
