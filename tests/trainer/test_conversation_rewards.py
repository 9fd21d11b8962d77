"""Conversations of messages through a trainer: ends, openings, faults, and their rewards."""

import dataclasses

import pytest
import torch

from hmpo.errors import ConversationError
from hmpo.models.chat import PromptOptions, render, turn_end_ids
from hmpo.trainer import PowerMeanTrainer
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
    with pytest.raises(ConversationError, match="template_options.mood: .*does not mention it"):
        begun(talking(tokenizer, prompt_options=PromptOptions(template={"mood": 1})))


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


class SaysNothing(SpeaksAsThePolicy):
    def step(self, completion):
        told, reward, done = Twice.step(self, completion)
        return "" if self.odd and not done else told, reward, done


FAULTY = (RaisesAtReset, OpensWithSurrogate, SpeaksAsThePolicy, SaysNothing)


@pytest.mark.parametrize("environment", FAULTY)
def test_whatever_an_environment_does_wrong_can_be_dropped_and_counted(environment):
    tokenizer = byte_tokenizer(CHATML)
    environment.made = 0
    with pytest.raises(ConversationError, match="conversation 0, turn [01] .*skip'") as info:
        begun(talking(tokenizer, environment=environment))
    assert "\n" not in str(info.value)
    environment.made = 0
    trainer = talking(tokenizer, zero, environment=environment, on_reward_error="skip")
    begun(trainer)
    assert trainer.batch.valid.tolist() == [False, True]
    assert trainer.rollout_metrics["environment/errors"] == 1
    assert trainer.batch.rollout.response_mask.any(1).all(), "every row has a token"
    assert trainer.next_update()["update_skipped"] == 0


def test_a_rollout_of_which_no_conversation_began_is_dropped_as_a_whole():
    class Never(Twice):
        def reset(self, **columns):
            raise ValueError("no game")

    trainer = talking(byte_tokenizer(CHATML), environment=Never, on_reward_error="skip")
    trainer.begin_rollout(["hi"], {})
    assert not trainer.batch.valid.any() and trainer.rollout_metrics["environment/errors"] == 2
