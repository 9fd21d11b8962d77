"""Conversations of messages through a trainer: ends, openings, faults, and their rewards."""

import dataclasses
import math

import pytest
import torch

from hmpo.environments import Environments
from hmpo.environments.pool import environment_reward
from hmpo.errors import ConfigError, ConversationError, ModelError, RewardError
from hmpo.models.chat import PromptOptions, render, turn_end_ids
from hmpo.rewards import Rewards
from hmpo.trainer import PowerMeanTrainer
from hmpo.trainer.conversation_rewards import with_environment
from tests.environments.games import add
from tests.models.templates import CHATML, SPECIAL, byte_tokenizer
from tests.trainer.test_conversation import CONFIG, Scripted

ASK = [{"role": "user", "content": "hi"}]
SETTINGS = dataclasses.replace(
    CONFIG, max_length=120, eos_token=None, pad_token=None, group_size=2, qk_clip=False
)
TURNS = ("one<|im_end|>", "two<|im_end|>")


class Twice:
    """Two turns, a reward of 1 for each; remembers the texts that it saw."""

    seen: list[str] = []

    def reset(self, **columns):
        self.turns = 0

    def step(self, completion):
        self.turns += 1
        self.seen.append(completion)
        return "again", 1.0, self.turns == 2


def zero(prompts, completions, **_):
    return [0.0] * len(completions)


def talking(tokenizer, reward=None, *, turns=TURNS, on_reward_error="raise", **given):
    """A trainer whose policy says these turns."""
    model = Scripted(tokenizer, turns)
    settings = dataclasses.replace(SETTINGS, on_reward_error=on_reward_error)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    given = {"environment": Twice} | given
    return PowerMeanTrainer(model, None, optimizer, settings, reward, tokenizer=tokenizer, **given)


def begun(trainer, prompt=ASK, columns=None):
    """Texts of prompt and response of the first conversation of a rollout."""
    trainer.begin_rollout([prompt], columns or {})
    rollout, decode = trainer.batch.rollout, trainer.collector.tokenizer.decode
    mask = rollout.attention_mask[0][rollout.prompt_ids.shape[1] :]
    response = rollout.response_ids[0][mask]
    return decode(rollout.prompt_ids[0][rollout.prompt_mask[0]]), decode(response)


@pytest.mark.parametrize("special", [True, False])
def test_a_turn_ends_where_the_template_ends_turns_and_its_text_does_not_hold_that(special):
    """The tokenizer's own end token is another one, and the template's may be no special token."""
    words = SPECIAL[CHATML] if special else ["<|endoftext|>"]
    tokenizer = byte_tokenizer(CHATML, special=words)
    if not special:
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turn_end_ids(tokenizer) == (end,) and tokenizer.eos_token_id != end
    Twice.seen.clear()
    trainer = talking(tokenizer)
    _, response = begun(trainer)
    header = "<|im_start|>assistant\n"
    between = f"<|im_end|>\n<|im_start|>user\nagain<|im_end|>\n{header}"
    assert response == f"one{between}two<|im_end|>"
    assert Twice.seen == ["one", "one", "two", "two"]
    assert trainer.batch.rollout.finished.all() and trainer.rollout_metrics["turns/mean"] == 2


def test_a_begun_turn_of_the_assistant_is_gone_on_with():
    tokenizer = byte_tokenizer(CHATML)
    asked = [*ASK, {"role": "assistant", "content": "<b>"}]
    prompt, _ = begun(talking(tokenizer, turns=("<b>one<|im_end|>", "two<|im_end|>")), asked)
    assert prompt == tokenizer.decode(render(tokenizer, asked)) and prompt.endswith("\n<b>")


def test_prompt_options_reach_the_opening_and_what_stands_between_turns():
    whole = "message.role + '\\n' + message.content"
    flagged = CHATML.replace(whole, f"{whole} + ('!' if flag and message.role == 'user' else '')")
    assert flagged != CHATML
    tokenizer = byte_tokenizer(flagged, special=SPECIAL[CHATML])
    prompt, response = begun(
        talking(tokenizer, prompt_options=PromptOptions(template={"flag": True}))
    )
    assert "hi!<|im_end|>" in prompt and "again!<|im_end|>" in response
    cut, _ = begun(talking(tokenizer, prompt_options=PromptOptions(max_tokens=5)))
    assert cut == begun(talking(tokenizer))[0][-5:] != ""
    for kind in ("raise", "skip"):  # no fault of the environment, so never dropped
        wrong = {"prompt_options": PromptOptions(template={"mood": 1}), "on_reward_error": kind}
        with pytest.raises(ModelError, match=r"^template_options.mood: .*does not mention it"):
            begun(talking(tokenizer, **wrong))


class RaisesAtReset(Twice):
    made = 0

    def reset(self, **columns):
        type(self).made += 1
        if type(self).made % 2:
            raise ValueError("no game")
        self.turns = 0


class OpensWithSurrogate(RaisesAtReset):
    def reset(self, **columns):
        type(self).made += 1
        self.turns = 0
        return "\ud800" if type(self).made % 2 else None


class SpeaksAsThePolicy(RaisesAtReset):
    def reset(self, **columns):
        type(self).made += 1
        self.odd, self.turns = type(self).made % 2, 0

    def step(self, completion):
        told, reward, done = super().step(completion)
        return [{"role": "assistant", "content": "x"}] if self.odd else told, reward, done


class EndsTheTurn(SpeaksAsThePolicy):
    def step(self, completion):
        told, reward, done = Twice.step(self, completion)
        return "so<|im_end|>" if self.odd and not done else told, reward, done


class OpensWithEnd(RaisesAtReset):
    def reset(self, **columns):
        type(self).made += 1
        self.turns = 0
        return "<|im_end|>" if type(self).made % 2 else None


class GivesNoNumber(SpeaksAsThePolicy):
    def step(self, completion):
        told, reward, done = Twice.step(self, completion)
        return told, math.nan if self.odd else reward, done


FAULTY = (
    RaisesAtReset,
    OpensWithSurrogate,
    SpeaksAsThePolicy,
    EndsTheTurn,
    OpensWithEnd,
    GivesNoNumber,
)


@pytest.mark.parametrize("reward", [None, zero, Rewards(zero)], ids=["none", "one", "Rewards"])
@pytest.mark.parametrize("environment", FAULTY)
def test_whatever_an_environment_does_wrong_can_be_dropped_and_counted(environment, reward):
    tokenizer = byte_tokenizer(CHATML)
    environment.made = 0
    with pytest.raises(ConversationError, match=r"conversation 0, turn [01] .*skip'") as info:
        begun(talking(tokenizer, environment=environment))
    assert "\n" not in str(info.value)
    environment.made = 0
    trainer = talking(tokenizer, reward, environment=environment, on_reward_error="skip")
    begun(trainer)
    assert trainer.batch.valid.tolist() == [False, True]
    assert trainer.rollout_metrics["environment/errors"] == 1
    assert trainer.rollout_metrics["reward/dropped"] == 1
    assert [event.name for event in trainer.drain_events()] == ["environment_error"]
    assert trainer.batch.rollout.response_mask.any(1).all(), "every row has a token"
    assert trainer.next_update()["update_skipped"] == 0


def test_a_rollout_of_which_no_conversation_began_is_dropped_as_a_whole():
    class Never(Twice):
        def reset(self, **columns):
            raise ValueError("no game")

    trainer = talking(byte_tokenizer(CHATML), environment=Never, on_reward_error="skip")
    trainer.begin_rollout(["hi"], {})
    assert not trainer.batch.valid.any() and trainer.rollout_metrics["environment/errors"] == 2


def of_length(prompts, completions, **_):
    return [float(len(completion)) for completion in completions]


GIVEN = {
    "a function": zero,
    "Rewards": Rewards(zero),
    "weighted Rewards": Rewards({"zero": zero, "length": of_length}, (1.0, 0.5)),
    "in a worker": Rewards(zero, timeout=60.0),
    "Rewards that have it": Rewards({"own": environment_reward, "zero": zero}, (0.5, 1.0)),
}


@pytest.mark.parametrize("name", GIVEN)
def test_the_environments_rewards_are_added_whatever_form_functions_are_given_in(name):
    given = GIVEN[name]
    before = dict(given.functions) if isinstance(given, Rewards) else None
    trainer = talking(byte_tokenizer(CHATML), given)
    begun(trainer)
    messages = 3  # two turns, and what was told between them
    more = {"weighted Rewards": 0.5 * messages, "Rewards that have it": -1.0}
    assert [sample["reward"] for sample in trainer.samples] == [2.0 + more.get(name, 0.0)] * 2
    if before is not None:
        assert given.functions == before, "the caller's own are left alone"
    trainer.collector.rewards.close()


def test_a_conversation_that_failed_has_no_reward_where_only_functions_give_some():
    """An environment of tools without get_reward: nothing of its own is summed up."""

    class Tooled(RaisesAtReset):
        step = None

        def look(self, at: int) -> int:
            """Look.

            Args:
                at: where.
            """
            return at

    Tooled.made = 0
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.chat_template += "{#- <tool_call> #}"
    trainer = talking(tokenizer, zero, environment=Tooled, on_reward_error="skip")
    begun(trainer)
    assert not trainer.collector.environments.rewards
    assert trainer.batch.valid.tolist() == [False, True]
    assert math.isnan(trainer.samples[0]["reward"]) and trainer.samples[1]["reward"] == 0.0


def test_settings_beside_an_environment_that_has_its_own_are_refused():
    tokenizer = byte_tokenizer(CHATML)
    made = Environments(Twice, tokenizer=tokenizer, max_turns=3)
    for given, name in (({"max_turns": 1}, "max_turns"), ({"tools": [add]}, "tools")):
        with pytest.raises(ConfigError, match=f"^{name}: got it beside Environments") as info:
            talking(tokenizer, environment=made, **given)
        assert "\n" not in str(info.value)
    with pytest.raises(ConfigError, match=r"^max_turns: got 4 without environment or tools"):
        talking(tokenizer, zero, environment=None, max_turns=4)
    assert talking(tokenizer, environment=made).collector.environments.max_turns == 3
    assert talking(tokenizer).collector.environments.max_turns == 16


def test_a_column_or_a_function_by_a_name_of_the_environments_is_refused():
    tokenizer = byte_tokenizer(CHATML)
    for name in ("environment_reward", "prompt"):
        with pytest.raises(ConfigError, match=f"^column {name}: the name is taken"):
            begun(talking(tokenizer), columns={name: ["mine"]})
    with pytest.raises(ConfigError, match=r"^reward 'environment': the name"):
        with_environment({"environment": zero}, Environments(Twice, tokenizer=tokenizer))
    with pytest.raises(RewardError, match=r"^reward 'environment': the name is taken"):
        talking(tokenizer, Rewards({"environment": zero}))


def test_a_trainer_without_any_reward_is_refused_in_one_line():
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.chat_template += "{#- <tool_call> #}"
    for environment, tools in ((None, ()), (None, [add])):
        with pytest.raises(ConfigError, match=r"^reward_fn: got None, and .*no reward;") as info:
            talking(tokenizer, environment=environment, tools=tools)
        assert "\n" not in str(info.value)


def test_an_empty_message_is_told_as_one():
    class Silent(Twice):
        def step(self, completion):
            return "", *super().step(completion)[1:]

    _, response = begun(talking(byte_tokenizer(CHATML), environment=Silent))
    assert "<|im_start|>user\n<|im_end|>" in response
